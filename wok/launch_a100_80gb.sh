#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" a100_80gb 80GB "$@"
