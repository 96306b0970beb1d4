# Shared by the test*.sh beside it: one measured run of generate.py with that rung's flags.
#
#   wok/test1_baseline.sh                                        random weights, nothing to download
#   CKPT_DIR=/models/Wan2.2-T2V-A14B wok/test1_baseline.sh       a real checkpoint
#
# TASK, SIZE, FRAMES, STEPS and PYTHON can be set the same way; further arguments go to generate.py unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TASK=${TASK:-t2v-A14B}
SIZE=${SIZE:-832*480}
FRAMES=${FRAMES:-81}
STEPS=${STEPS:-4}

rung() { # name, then the flags of this rung; the script's own arguments follow
    local name=$1
    shift
    local weights=(--load_format dummy)
    if [ -n "${CKPT_DIR:-}" ]; then
        weights=(--ckpt_dir "$CKPT_DIR")
    fi
    mkdir -p results
    "$PYTHON" tools/measure_run.py --name "$name" --table wok/README.md -- \
        "$PYTHON" generate.py --task "$TASK" --size "$SIZE" --frame_num "$FRAMES" --sample_steps "$STEPS" \
        --prompt "A cat walks on the beach" --base_seed 42 --save_file "results/$name.mp4" "${weights[@]}" "$@"
}
