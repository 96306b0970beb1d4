#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" l4 24GB "$@"
