#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" rtx4090 24GB "$@"
