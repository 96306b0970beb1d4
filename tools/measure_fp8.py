"""Measures on the demo model what weights in 8 bits lose, clip by clip and block by block, and times int8 products.

    OMP_NUM_THREADS=1 python tools/measure_fp8.py --clips 20 --out docs/benchmarks/fp8/t2v-demo_cpu.json
    OMP_NUM_THREADS=1 python tools/measure_fp8.py --clips 0 --out docs/benchmarks/fp8/int8_cpu.json

Every variant makes the clips of the plain model from the same noise, in float32. A block's error is that of what it
adds to the residual stream, each block being given what the plain model gives it. int8 (weights and inputs, a scale for
each row) lives in this script alone: it shows whether it would be worth having. `--clips 0` times products alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from demo import scenes  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import wan  # noqa: E402
from wan.cli.benchmarking.quality import compare  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.ops.float8 import Float8Linear, quantize_weight  # noqa: E402
from wan.video import to_pixels  # noqa: E402

Variant = dict[str, Any]
VARIANTS: dict[str, Variant] = {
    "weight": {"fp8": "weight"},
    "scaled": {"fp8": "scaled"},
    "scaled, first and last block kept": {"fp8": "scaled", "fp8_keep": "blocks.0.*,blocks.4.*"},
}
SIZE: dict[str, Any] = {"size": (96, 96), "frame_num": 17, "sampling_steps": 20, "offload_model": None}
PRODUCTS = [(324, 256, 256), (324, 256, 768), (1024, 1536, 8960), (1024, 5120, 5120), (1024, 5120, 13824)]
"""Rows, inputs and outputs: layers of the demo (a clip of 33 frames), of 1.3B and of A14B (a part of a clip's rows)."""
REPEATS = 5


class Int8Linear(nn.Module):
    """A linear layer whose weight and inputs are int8 with a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.codes, self.scale = int8_rows(layer.weight.data.float())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = int8_rows(x.flatten(0, -2))
        out = torch._int_mm(codes, self.codes.t()).float() * scale * self.scale.t()
        return (out + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round().to(torch.int8), scale


def pipeline(variant: Variant) -> Any:
    return wan.WanT2V(WAN_CONFIGS["t2v-demo"], ROOT / "demo", device="cpu", **variant)


def with_int8(pipe: Any) -> Any:
    for network in (pipe.high_noise_model, pipe.low_noise_model):
        for name, layer in list(network.blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                network.blocks.set_submodule(name, Int8Linear(layer))
    return pipe


def prompts(count: int) -> list[str]:
    """Captions of scenes the demo was not trained on."""
    rng = random.Random(0)
    combos = rng.sample(scenes.split_combos()["test"], count)
    return [scenes.caption(scenes.random_scene(rng, combo), rng, complete=True) for combo in combos]


def clips(pipe: Any, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """(frames, final latents) of each."""
    made = []
    for seed, text in enumerate(texts):
        steps: list[Tensor] = []
        keep = partial(_keep, steps)
        frames = pipe.generate(text, **SIZE, seed=seed, observe=(keep,))
        made.append((to_pixels(frames), steps[-1]))
    return made


def _keep(steps: list[Tensor], step: Any, latents: Tensor) -> None:
    steps.append(latents.clone())


def loss(made: Sequence[tuple[Tensor, Tensor]], plain: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Figure -> its middle and ends over the clips."""
    found: dict[str, list[float]] = {"latents_rel_l2": [], "psnr_db": [], "ssim": []}
    for (frames, latents), (reference, wanted) in zip(made, plain, strict=True):
        told, _ = compare(frames, reference)
        found["latents_rel_l2"].append(distance(latents, wanted))
        found["psnr_db"].append(told["psnr_db"])
        found["ssim"].append(told["ssim"])
    return {
        name: {"median": round(statistics.median(each), 4), "min": round(min(each), 4), "max": round(max(each), 4)}
        for name, each in found.items()
    }


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


def block_errors(text: str) -> dict[str, list[float]]:
    """Variant -> error of every block of the low-noise expert, at its first forward of a clip."""
    seen: list[tuple[int, Tensor, Any]] = []
    plain = pipeline({})
    network = plain.low_noise_model
    numbers = {block: number for number, block in enumerate(network.blocks)}

    def watch(block: nn.Module, tokens: Tensor, inputs: Any) -> Tensor:
        if len(seen) < len(numbers):
            seen.append((numbers[block], tokens.clone(), inputs))
        out: Tensor = block(tokens, inputs)
        return out

    network.run_block = watch
    plain.generate(text, **SIZE, seed=0)
    found = {}
    for name, make in {
        "weight": lambda: pipeline({"fp8": "weight"}), "scaled": lambda: pipeline({"fp8": "scaled"}),
        "int8": lambda: with_int8(pipeline({})),
    }.items():  # fmt: skip
        blocks = make().low_noise_model.blocks
        with torch.inference_mode():
            found[name] = [
                round(distance(*(part(tokens.clone(), inputs) - tokens for part in (blocks[n], network.blocks[n]))), 4)
                for n, tokens, inputs in seen
            ]
    return found


def dynamic_int8(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """PyTorch's own int8 layer, which takes and gives float32 and has one scale for all of its input."""
    with warnings.catch_warnings(action="ignore"):  # it is to be removed from PyTorch
        whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer.float()), {nn.Linear}, dtype=torch.qint8)
    return lambda x: whole(x.float()).to(x.dtype)


def product_seconds() -> list[dict[str, Any]]:
    """Seconds of a layer in bfloat16, with weights made anew from e4m3, and in int8 with quantising its input."""
    rows = []
    for count, inputs, outputs in PRODUCTS:
        layer, x = nn.Linear(inputs, outputs).bfloat16(), torch.randn(count, inputs).bfloat16()
        float8 = Float8Linear(layer)
        float8.weight.data, float8.weight_scale.data = quantize_weight(layer.weight.data)
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "bfloat16": partial(F.linear, weight=layer.weight, bias=layer.bias), "weight": float8,
            "int8": Int8Linear(layer), "int8, PyTorch's dynamic layer": dynamic_int8(copy.deepcopy(layer)),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in forms}
        with torch.inference_mode():
            for _ in range(1 + REPEATS):  # in turns, so that what else the machine does meets all alike
                for name, form in forms.items():
                    started = time.perf_counter()
                    form(x)
                    times[name].append(time.perf_counter() - started)
        seconds = {
            name: {"median": round(statistics.median(each[1:]), 6), "min": round(min(each[1:]), 6),
                   "max": round(max(each[1:]), 6)}
            for name, each in times.items()
        }  # fmt: skip
        rows.append({"rows": count, "in": inputs, "out": outputs, "repeats": REPEATS, "seconds": seconds})
    return rows


def instructions() -> list[str]:
    """What the processor has for products in few bits."""
    known = ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx_vnni")
    return [name for name in known if torch.cpu.get_capabilities().get(name)]


def losses(count: int) -> dict[str, Any]:
    """What the variants lose on that many clips."""
    texts = prompts(count)
    plain = clips(pipeline({}), texts)
    lost = {name: loss(clips(pipeline(variant), texts), plain) for name, variant in VARIANTS.items()}
    lost["int8"] = loss(clips(with_int8(pipeline({})), texts), plain)
    return {
        "clips": count, "size": "96x96, 17 frames, 20 steps, float32, seeds from 0", "loss_against_plain": lost,
        "block_errors_of_low": block_errors(texts[0]),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="how many clips of each variant, at most 40; 0: none")
    parser.add_argument("--out", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python tools/measure_fp8.py", *(sys.argv[1:] if argv is None else argv)])
    said = {
        "command": command, "commit": commit, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "instructions": instructions(), **(losses(args.clips) if args.clips else {}),
        "layer_seconds": product_seconds(),
    }  # fmt: skip
    text = json.dumps(said, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
