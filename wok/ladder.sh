# Shared by the test*.sh beside it: one measured run of generate.py with that rung's flags.
set -euo pipefail

CKPT=${CKPT:-${CKPT_DIR:-}}
if [ -d "$CKPT" ]; then CKPT=$(cd "$CKPT" && pwd); fi # as the caller's folder has it
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

rung() { # name, then the flags of this rung; the script's own arguments follow
    local name=$1 video=results/wok/$1.mp4
    shift
    local weights=(--load_format dummy) limit=()
    if [ -n "$CKPT" ]; then weights=(--ckpt_dir "$CKPT"); fi
    if [ -n "${VRAM_LIMIT:-}" ]; then limit=(--vram_limit "$VRAM_LIMIT"); fi
    mkdir -p results/wok
    rm -rf "$video.run" # what a run that ended badly keeps would be in the way of the next
    exec "$PYTHON" tools/measure_run.py --name "$name" --table wok/README.md ${limit[@]+"${limit[@]}"} -- \
        --task "${TASK:-t2v-1.3B}" --size "${SIZE:-480*832}" --frame_num "${FRAMES:-81}" --sample_steps "${STEPS:-4}" \
        --prompt "A cat walks on the beach" --base_seed 42 --embedding_cache off --save_file "$video" \
        "${weights[@]}" "$@"
}
