#!/usr/bin/env bash
# Rung 1: every network stays on the GPU.
source "$(dirname "${BASH_SOURCE[0]}")/ladder.sh"
rung test1_baseline --offload_model False "$@"
