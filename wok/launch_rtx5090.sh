#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" rtx5090 32GB "$@"
