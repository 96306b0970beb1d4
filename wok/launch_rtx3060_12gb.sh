#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" rtx3060_12gb 12GB "$@"
