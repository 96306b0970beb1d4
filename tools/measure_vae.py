"""Times the VAE computed in its several ways, interleaved, and says how far each is from the plain one.

python tools/measure_vae.py --out docs/benchmarks/vae/cpu.json
python tools/measure_vae.py --device cuda --size 832*480 --frames 17 --out vae_h100.json

On a CPU one thread works and its CPU seconds are counted, which other work on the machine disturbs least; on a GPU CUDA
events are. Each variant runs once unmeasured. The file is written after every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from wan.engine.hardware import probe  # noqa: E402
from wan.engine.optimizations import registry  # noqa: E402
from wan.engine.plan import Plan  # noqa: E402
from wan.modules.vae import WanVAEModel, load_vae  # noqa: E402
from wan.modules.vae_config import VAE_2_1, VAE_2_2, VAEConfig  # noqa: E402

LAST, SUBPIXEL, ATTENTION = ({name: True} for name in ("vae_channels_last", "vae_subpixel", "vae_matmul_attention"))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "channels last": LAST, "sub-pixel": SUBPIXEL, "matmul attention": ATTENTION,
    "channels last, sub-pixel": LAST | SUBPIXEL,
}  # fmt: skip
DTYPES = ("fp32", "bf16")


def random_vae(config: VAEConfig, device: torch.device) -> WanVAEModel:
    """Random weights under which values keep their size."""
    with device:
        model = WanVAEModel(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            value.fill_(1.0)
        else:
            value.normal_(std=0.6 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.01)
    return model


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, WanVAEModel, tuple[int, ...], int]]:
    """(name, model, shape of its latents, latent frames at a time)."""
    if args.size:
        width, height = map(int, args.size.split("*"))
        for name, config, side in (("VAE 2.1", VAE_2_1, 8), ("VAE 2.2", VAE_2_2, 16)):
            shape = (1, config.z_dim, (args.frames - 1) // 4 + 1, height // side, width // side)
            yield f"{name}, {args.size}, {args.frames} frames", random_vae(config, device), shape, args.frames_per_call
        return
    demo = load_vae(ROOT / "demo" / "Wan2.1_VAE.pth", torch.float32, device)
    yield "demo, 96x64, 13 frames", demo, (1, 16, 4, 8, 12), 4
    small = random_vae(VAEConfig(num_res_blocks=1), device)
    yield "VAE 2.1 with one block a level, 64x32, 5 frames", small, (1, 16, 2, 4, 8), 2


def variant(model: WanVAEModel, dtype: str, values: dict[str, Any]) -> WanVAEModel:
    """A copy of the model as these options make it."""
    copy, active = deepcopy(model), list(Plan.of(registry(), {"vae_dtype": dtype, **values}).enabled())
    for optimization in active:
        optimization.convert(copy, "vae")
    for optimization in active:
        optimization.finish(copy, "vae", cast("Any", None))
    return copy


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """What one run takes: CPU seconds of this process, or those between two events on the GPU."""
    if device.type == "cpu":
        before = time.process_time()
        run()
        return time.process_time() - before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured(runs: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each run: seconds, how many times as fast as the first, relative distance to it."""
    first, distances, times = next(iter(runs.values()))().float(), {}, {name: [] for name in runs}
    for name, run in runs.items():
        distances[name] = float((run().float() - first).norm() / first.norm())
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    plain = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        middle = statistics.median(taken)
        yield {
            "variant": name, "seconds": round(middle, 4), "min": round(min(taken), 4), "max": round(max(taken), 4),
            "speedup": round(plain / middle, 2), "distance": float(f"{distances[name]:.2g}"),
        }  # fmt: skip


def about(device: torch.device, repeats: int) -> dict[str, Any]:
    """What was measured on and how."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    features = "AMX bf16" if torch.cpu._is_amx_tile_supported() else "no AMX"  # type: ignore[attr-defined]
    return {
        "command": " ".join(["python", *sys.argv]), "commit": commit.stdout.strip(), "torch": torch.__version__,
        "device": str(probe()), "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {features}",
        "threads": torch.get_num_threads(), "repeats": repeats,
        "seconds": "CPU seconds, median" if device.type == "cpu" else "CUDA events, median",
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="width*height of the published VAEs; else the demo's and a small one")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--frames_per_call", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    result: dict[str, Any] = {"about": about(device, args.repeats), "rows": []}
    for name, model, shape, chunk in cases(args, device):
        time_stride, side, _ = model.stride
        latents = torch.randn(shape, device=device)
        pixels = 1, 3, (shape[2] - 1) * time_stride + 1, shape[3] * side, shape[4] * side
        video = torch.rand(pixels, device=device) * 2 - 1
        for dtype in DTYPES:
            models = {each: variant(model, dtype, values) for each, values in VARIANTS.items()}
            for way, code in (
                ("decode", lambda vae: vae.decode(latents, frames_per_chunk=chunk)),  # noqa: B023
                ("encode", lambda vae: vae.encode(video)),  # noqa: B023
            ):
                for row in measured({key: partial(code, vae) for key, vae in models.items()}, device, args.repeats):
                    result["rows"].append({"vae": name, "dtype": dtype, "way": way, **row})
                    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                    print(result["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
