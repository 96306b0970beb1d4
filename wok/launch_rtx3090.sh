#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" rtx3090 24GB "$@"
