#!/usr/bin/env bash
# Shared by the launch_*.sh beside it: CARD MEMORY, then flags of generate.py, which win.
set -euo pipefail

card=$1 vram=$2
shift 2
model=Wan-AI/Wan2.1-T2V-1.3B size=480p
if [ "${vram%GB}" -ge 40 ]; then model=Wan-AI/Wan2.2-T2V-A14B size=720p; fi
CKPT=${CKPT:-$model}
if [ -d "$CKPT" ]; then CKPT=$(cd "$CKPT" && pwd); fi # as the caller's folder has it
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ $# -eq 0 ]; then
    read -r -p "Prompt: " prompt
    set -- --prompt "$prompt"
fi
exec "$PYTHON" generate_optimized.py --preset "$card" --vram_budget "$vram" --ckpt_dir "$CKPT" --size "$size" "$@"
