#!/usr/bin/env bash
exec "$(dirname "$0")/launch.sh" h200 141GB "$@"
