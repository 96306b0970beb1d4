#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" a100_40gb 40GB "$@"
