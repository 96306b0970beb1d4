#!/usr/bin/env bash
# Rung 4: both, and the DiT's experts leave the GPU when they are not needed.
source "$(dirname "${BASH_SOURCE[0]}")/ladder.sh"
rung test4_both --offload_model True --t5_cpu --vae_cpu "$@"
