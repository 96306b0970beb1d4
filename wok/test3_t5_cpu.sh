#!/usr/bin/env bash
# Rung 3: the text encoder stays and computes on the CPU (11 GB of GPU memory less, slower start).
source "$(dirname "${BASH_SOURCE[0]}")/ladder.sh"
rung test3_t5_cpu --offload_model False --t5_cpu "$@"
