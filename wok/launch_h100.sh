#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" h100 80GB "$@"
