"""Writes demo/prompts.jsonl: what `benchmark_t2v.py --mode quality` asks the demo model for, and what each must show.

    python tools/demo_prompts.py

They are the prompts of demo/results.json, of combinations that were never trained on, in the same order.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from demo import scenes  # noqa: E402

COUNT, SEED, SPLIT = 400, 2026, "test"


def lines() -> list[str]:
    """One JSON object each: the prompt, and the attributes it names."""
    combos, found = scenes.split_combos()[SPLIT], []
    for number in range(COUNT):
        rng = random.Random(f"{SEED}/{SPLIT}/{number}")
        scene = scenes.random_scene(rng, combos[number % len(combos)])
        found.append(json.dumps({"prompt": scenes.caption(scene, rng, complete=True), "shows": scene.words()}))
    return found


if __name__ == "__main__":
    (ROOT / "demo" / "prompts.jsonl").write_text("\n".join(lines()) + "\n", encoding="utf-8")
