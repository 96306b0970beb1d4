#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" l40s 48GB "$@"
