#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" a6000 48GB "$@"
