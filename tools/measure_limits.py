"""How close a card is brought to what it can do: ceilings, kernels, transformers and VAEs, beside their rivals.

    python tools/measure_limits.py small            # docs/benchmarks/limits_small.json and the page
    python tools/measure_limits.py large
    python tools/measure_limits.py small --smoke --output /tmp/smoke.json

Each part takes less than nine minutes of an H100 (`--budget_s`); what does not fit any more is a row that says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from limits import ceilings, kernel_rows  # noqa: E402
from limits.book import FAULTS, Act, Book, Row, Work, distance  # noqa: E402
from limits.page import PARTS, RESULTS, page  # noqa: E402
from limits.subjects import Case, Forwards, inside, latent_size, network, rival_vae, usable  # noqa: E402

from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.hardware import Hardware, probe  # noqa: E402
from wan.engine.ops.attention import BACKENDS, InCodes, choose  # noqa: E402
from wan.engine.ops.float8_attention import attend_float8  # noqa: E402

DEMO = "t2v-demo"
SMALL = (
    Case(key="1.3B 480p", task="t2v-1.3B", width=832, height=480, frames=81),
    Case(key="5B 720p", task="ti2v-5B", width=1280, height=704, frames=121),
)
LARGE = (
    Case(key="A14B 720p", task="t2v-A14B", width=1280, height=720, frames=81, brief=True),
    Case(key="A14B 480p", task="t2v-A14B", width=832, height=480, frames=81),
)
VIDEOS = (
    Case(key="VAE 2.1 480p", task="t2v-1.3B", width=832, height=480, frames=81),
    Case(key="VAE 2.1 720p", task="t2v-1.3B", width=1280, height=720, frames=81),
    Case(key="VAE 2.2 720p", task="ti2v-5B", width=1280, height=704, frames=121),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_grad_enabled(False)
    hardware = probe("cpu" if args.smoke else None)
    output = args.output or RESULTS / f"limits_{args.part}.json"
    book = Book(output, about(args, hardware), hardware.device, args.budget_s)
    book.write()
    if hardware.is_cuda:
        ceilings.settle(hardware.device, 15.0)
    parts: dict[str, Callable[[Book, Hardware, bool], None]] = {"small": small, "large": large}
    with torch.inference_mode():
        parts[args.part](book, hardware, args.smoke)
    if output.parent == RESULTS:
        (RESULTS / "limits.md").write_text(page(), encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, help="small: ceilings, kernels, 1.3B, 5B, VAEs; large: A14B")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--output", type=Path, help="JSON to write (default: docs/benchmarks/limits_PART.json)")
    parser.add_argument("--budget_s", type=float, default=500.0, help="start nothing after this many seconds")
    args = parser.parse_args(argv)
    if args.smoke and args.output is None:
        parser.error("--smoke measures nothing worth keeping in docs/: name a file with --output")
    return args


def about(args: argparse.Namespace, hardware: Hardware) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "part": args.part,
        "smoke": args.smoke,
        "hardware": str(hardware),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python tools/measure_limits.py", args.part, *(["--smoke"] if args.smoke else [])]),
        "versions": {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": cudnn},
    }


def small(book: Book, hardware: Hardware, smoke: bool) -> None:
    ceilings.measure(book, hardware, ceilings.SMOKE if smoke else ceilings.REAL, runs=5)
    kernel_rows.measure(book, hardware, kernel_rows.SMOKE if smoke else kernel_rows.REAL, runs=20)
    for case in shrunk(SMALL, smoke):
        transformers(book, hardware, [case], runs=5)
    for case in shrunk(VIDEOS, smoke):
        video_networks(book, hardware, case, runs=2)
    text_encoder(book, hardware, DEMO if smoke else "t2v-1.3B", runs=5)


def large(book: Book, hardware: Hardware, smoke: bool) -> None:
    transformers(book, hardware, list(shrunk(LARGE, smoke)), runs=2)


def shrunk(cases: Sequence[Case], smoke: bool) -> Iterator[Case]:
    """The cases, or the demo model under their names."""
    for case in cases:
        yield replace(case, task=DEMO, width=32, height=32, frames=5) if smoke else case


def transformers(book: Book, hardware: Hardware, cases: Sequence[Case], runs: int) -> None:
    """One transformer at these sizes: everybody on one set of weights, then our own swapped, then ours with products in
    8 bits, then with attention in 8 bits too."""
    with torch.inference_mode(False):
        forwards = Forwards(cases[0], hardware, attention="auto")
        rival = usable(forwards.rival)
    for case in cases:
        forwards.resize(case)
        plain(book, forwards, rival, runs)
        compiled(book, forwards, rival, runs)
    if hardware.is_cuda:
        with forwards.swapped():
            alone(book, forwards, cases, "ours swapped", runs)
    del forwards, rival
    with torch.inference_mode(False):
        eight = Forwards(cases[0], hardware, attention="auto", fp8="scaled" if hardware.is_cuda else "auto")
    alone(book, eight, cases, "ours fp8", runs)
    backend = BACKENDS["flash3_fp8"]
    if hardware.is_cuda and (refusal := backend.refusal(hardware, torch.bfloat16, 128)) is not None:
        for case in cases:
            book.add(Row(key=f"{case.key}/ours 8-bit", failed=str(refusal)))
        return
    for block in eight.dit.blocks:
        block.self_attn.attend = backend.attend() if hardware.is_cuda else InCodes(attend_float8)
    alone(book, eight, cases, "ours 8-bit", runs)


def plain(book: Book, forwards: Forwards, rival: Any, runs: int) -> None:
    """Ours with and without kernels, the original's operations with each attention, diffusers."""
    acts: dict[str, Act] = {
        "ours kernels": inside(forwards.kernels, forwards.ours),
        **{f"original {name}": partial(forwards.original, name) for name in served(forwards.hardware)},
    }
    if not forwards.case.brief:
        acts["ours"] = forwards.ours
        if rival is not None:
            acts["diffusers"] = forwards.of_rival(rival)
    work = {name: Work(flop=forwards.flop, distance=apart(forwards, act)) for name, act in acts.items()}
    if not forwards.case.brief:
        acts["ours at t=10"] = partial(forwards.ours, forwards.time.new_tensor([10.0]))
        work["ours at t=10"] = Work(flop=forwards.flop)
    book.race({f"{forwards.case.key}/{name}": (act, work[name]) for name, act in acts.items()}, runs)


def apart(forwards: Forwards, act: Act) -> float | None:
    """How far an act's velocity is from ours; None where it fails, which the race will say."""
    with forwards.shortened():
        try:
            return distance(act(), forwards.ours())
        except FAULTS:
            return None


def served(hardware: Hardware) -> list[str]:
    """Attention for the original's operations: PyTorch's own choice, and the best that is here."""
    best = choose("auto", hardware, torch.bfloat16, 128)[0]
    return list(dict.fromkeys(["sdpa", best]))


def compiled(book: Book, forwards: Forwards, rival: Any, runs: int) -> None:
    """Ours and diffusers with compiled blocks: the first call, which compiles, is the turn that is not counted."""
    backend = "inductor" if forwards.hardware.is_cuda else "eager"
    work, key = Work(flop=forwards.flop, note=backend), forwards.case.key
    with forwards.compiled(backend):
        acts: dict[str, tuple[Act, Work]] = {f"{key}/ours compiled": (forwards.ours, work)}
        if rival is not None:
            rival.compile_repeated_blocks(fullgraph=True, backend=backend)
            acts[f"{key}/diffusers compiled"] = (forwards.of_rival(rival), work)
        book.race(acts, runs)
    for block in () if rival is None else rival.blocks:
        block._compiled_call_impl = None  # the next size starts uncompiled again


def alone(book: Book, forwards: Forwards, cases: Sequence[Case], name: str, runs: int) -> None:
    """Our forward in a form that changes the weights, so that nobody else can hold them meanwhile."""
    for case in cases:
        forwards.resize(case)
        act = inside(forwards.kernels, forwards.ours)
        book.race({f"{case.key}/{name}": (act, Work(flop=forwards.flop))}, runs)


LAYERS = ("vae_channels_last", "vae_subpixel", "vae_matmul_attention")
VAES: Mapping[str, Mapping[str, Any]] = {
    "ours fp32": {},
    "ours bf16": {"vae_dtype": "bf16"},
    **{f"ours bf16 {name}": {"vae_dtype": "bf16", name: True} for name in LAYERS},
    "ours fast": {"vae_dtype": "bf16", **dict.fromkeys(LAYERS, True)},
}
"""Our VAE under the options named, one by one and together."""


def video_networks(book: Book, hardware: Hardware, case: Case, runs: int) -> None:
    """Encode and decode a whole video: ours and diffusers, in both precisions."""
    device = hardware.device
    video = torch.rand(1, 3, case.frames, case.height, case.width, device=device) * 2 - 1
    with torch.inference_mode(False):
        ours = {name: network(case.task, hardware, "vae", **options) for name, options in VAES.items()}
        plain = ours["ours fp32"]
        rivals = {
            f"diffusers {name}": usable(partial(rival_vae, plain, dtype))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
    latents = torch.randn(1, plain.z_dim, *latent_size(case), device=device)
    decode: dict[str, Act] = {name: partial(drained, each, latents) for name, each in ours.items()}
    encode: dict[str, Act] = {name: partial(each.encode, video) for name, each in ours.items()}
    for name, each in rivals.items():
        if each is not None:
            decode[name] = partial(each.decode, latents.to(each.dtype), return_dict=False)
            encode[name] = partial(each.encode, video.to(each.dtype), return_dict=False)
    for what, acts in (("decode", decode), ("encode", encode)):
        book.race({f"{case.key} {what}/{name}": (act, Work()) for name, act in acts.items()}, runs)


def drained(vae: Any, latents: torch.Tensor) -> None:
    """Decode as a run does, chunk by chunk; each is written away."""
    for _ in vae.decode_chunks(latents):
        pass


def text_encoder(book: Book, hardware: Hardware, task: str, runs: int) -> None:
    with torch.inference_mode(False):
        encoder = network(task, hardware, "text_encoder")
    length = WAN_CONFIGS[task].text_len
    ids = torch.randint(1, 100, (1, length), device=hardware.device)
    mask = torch.ones_like(ids)
    book.race({"text encoder/ours": (lambda: encoder(ids, mask), Work())}, runs)


if __name__ == "__main__":
    sys.exit(main())
