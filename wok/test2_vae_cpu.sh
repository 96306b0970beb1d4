#!/usr/bin/env bash
# Rung 2: the VAE waits in RAM and enters the GPU only to decode.
source "$(dirname "${BASH_SOURCE[0]}")/ladder.sh"
rung test2_vae_cpu --offload_model False --vae_cpu "$@"
