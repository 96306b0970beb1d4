"""What `--print_plan` adds to the usual start: every option with the reason for its value, and what headers tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from wan.cli.checkpoint import components_of
from wan.engine.errors import BadCheckpoint
from wan.engine.optimizations import LoRA
from wan.engine.options import options_of

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.engine.plan import Plan
    from wan.engine.types import Component

PLAIN = "default"


def option_lines(plan: Plan) -> list[str]:
    """A row for every option there is: value, where it comes from, why; those that somebody chose come first."""
    rows = []
    for optimization in plan.optimizations:
        for o in options_of(type(optimization)):
            source, _, why = plan.reasons.get(o.name, PLAIN).partition(": ")
            rows.append((o.name, _spelled(getattr(optimization, o.name)), source, why))
    rows.sort(key=lambda row: row[2] == PLAIN)
    return list(_columns([("option", "value", "from", "why"), *rows]))


def network_lines(job: Job) -> list[str]:
    """What one forward computes on, and what each network takes, as the headers of the files say."""
    wanted = job.wanted
    stride, patch = tuple(wanted.config.vae_stride), tuple(wanted.config.patch_size)
    grid = (
        (wanted.num_frames - 1) // stride[0] + 1, wanted.height // stride[1] // patch[1],
        wanted.width // stride[2] // patch[2],
    )  # fmt: skip
    lines = [f"tokens  {math.prod(grid)} = {' x '.join(map(str, grid))} of the whole video"]
    try:
        dummy = wanted.load_format == "dummy"
        components = components_of(wanted.task, None if dummy else wanted.checkpoint, None if dummy else wanted.files)
    except BadCheckpoint:
        if wanted.repository is None:
            raise
        return [*lines, f"weights of {wanted.repository.name} are known once they are downloaded"]
    sizes = {component.name: _stored_bytes(component, job.plan) for component in components}
    said = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items())
    lines.append(f"weights {said}; {sum(sizes.values()) / 2**30:.2f} GiB in all")
    return [*lines, *_lora_lines(components, job.plan)]


def _lora_lines(components: Iterable[Component], plan: Plan) -> Iterator[str]:
    """What LoRAs take beside each expert, counted from headers."""
    lora = plan.get(LoRA)
    if not lora.paths:
        return
    if lora.mode == "merge":
        yield "LoRA    merged while the weights are read: takes nothing beside them"
        return
    for component in components:
        if component.is_expert:
            blocks = len(component.build().all_blocks())  # type: ignore[operator]
            found = lora.beside(component, plan.enabled())
            yield (
                f"LoRA    {component.name}: {_mib(found.host)} in RAM, {_mib(found.on_card(blocks, 0))} on the GPU, of "
                f"which {_mib(found.in_block)} come and go with each of {blocks} blocks; {_mib(found.for_call)} more "
                "while a block computes"
            )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _stored_bytes(component: Component, plan: Plan) -> int:
    import torch

    from wan.engine.engine import on_meta

    with torch.inference_mode(False), torch.no_grad():
        tensors = on_meta(component, plan.enabled()).state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _spelled(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "-"}[value]
    return str(value)


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The rows with their columns under each other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
