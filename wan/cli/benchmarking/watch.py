"""Looks into one run: what its first forward computes and where its time goes, and what the first step did.

Only ever in a run that is not timed: counting and timing every module slows a forward down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wan.cli.benchmarking.timer import Mark, timer
from wan.engine.types import Step

PARTS = ("self_attn", "cross_attn", "ffn")
"""The modules of a block that are timed one by one."""


@dataclass
class Watch:
    """What was seen. `texts` are the embeddings [S, D] by guidance branch, `velocity` the guided one of the first step.

    `flop` and `parts` (seconds by kind of module) are of one forward of one branch, and empty unless `inside`: looking
    into compiled blocks would compile them again.
    """

    device: torch.device
    inside: bool = True
    flop: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    velocity: Tensor | None = None

    @contextmanager
    def over(self, dits: Sequence[Any]) -> Iterator[None]:
        """Look at the first forward made by each of `dits` inside."""
        seams = [dit.trunk for dit in dits]
        for dit, trunk in zip(dits, seams, strict=True):
            dit.trunk = self._watched(dit, trunk)
        try:
            yield
        finally:
            for dit, trunk in zip(dits, seams, strict=True):
                dit.trunk = trunk

    def first_step(self, step: Step, before: Tensor, after: Tensor) -> None:
        """Every solver's first step goes straight along the velocity, which can therefore be read off it."""
        self.velocity = (after.float() - before.float()) / (step.sigma_next - step.sigma)

    def _watched(self, dit: nn.Module, trunk: Any) -> Any:
        """Counting makes every operation slower, so the first forward is counted and the second one timed."""

        def watched(tokens: Tensor, inputs: Any, condition: Any, step: Step) -> Tensor:
            for branch, text in zip(inputs.branches, condition.context, strict=True):
                self.texts.setdefault(branch, text.detach().float().cpu())
            if self.parts or not self.inside:
                return trunk(tokens, inputs, condition, step)
            if self.flop:
                with self._timing(dit, len(inputs.branches)):
                    return trunk(tokens, inputs, condition, step)
            with _counting(dit) as counted:
                tokens = trunk(tokens, inputs, condition, step)
            self.flop = counted() // len(inputs.branches)
            return tokens

        return watched

    @contextmanager
    def _timing(self, dit: nn.Module, branches: int) -> Iterator[None]:
        now = timer(self.device)
        marks: list[tuple[str, Mark, Mark]] = []
        with ExitStack() as hooks:
            for name, module in dit.named_modules():
                kind = name.rpartition(".")[2]
                if kind in PARTS:
                    # Blocks call `forward` itself, which hooks do not see.
                    module.forward = _timed(module.forward, kind, now, marks)
                    hooks.callback(delattr, module, "forward")
            begin = now()
            yield
            end = now()
        took = {part: sum(start.until(stop) for kind, start, stop in marks if kind == part) for part in PARTS}
        took["norms, gates and residuals"] = begin.until(end) - sum(took.values())
        self.parts = {name: seconds / branches for name, seconds in took.items()}


def _timed(
    forward: Callable[..., Any], kind: str, now: Callable[[], Mark], marks: list[tuple[str, Mark, Mark]]
) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        begun = now()
        out = forward(*arguments, **named)
        marks.append((kind, begun, now()))
        return out

    return run


@contextmanager
def _counting(dit: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts FLOP: attention at its seams, as PyTorch knows no kernels from elsewhere; the rest where it computes."""
    attention = 0
    seams = [(m, name, value) for m in dit.modules() for name, value in vars(m).items() if name.startswith("attend")]

    def counted(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counts(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            nonlocal attention
            attention += 4 * q.numel() * k.shape[1]
            return attend(q, k, *rest)

        return counts

    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_KNOWN_ATTENTION, _not_twice))
    with ExitStack() as stack:
        for module, name, attend in seams:
            setattr(module, name, counted(attend))
            stack.callback(setattr, module, name, attend)
        for module in dit.modules():
            if isinstance(module, nn.Linear):
                # Listened to, it is not fused with the activation behind it, which the counter would miss.
                stack.callback(module.register_forward_hook(lambda m, a, out: None).remove)
        with counter:
            yield lambda: counter.get_total_flops() + attention


_KNOWN_ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention") for kind in ("flash", "efficient", "cudnn")
)


def _not_twice(*args: Any, **kwargs: Any) -> int:
    return 0
