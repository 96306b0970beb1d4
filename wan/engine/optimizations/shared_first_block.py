"""What the guidance branches of a step have in common: everything before they first look at their texts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wan.engine.ops.rows import at_once
from wan.engine.options import option
from wan.engine.plan import Conflict, Optimization, Order
from wan.engine.types import Condition, Denoiser, Denoising, Segment, Step

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class SharedFirstBlock(Optimization):
    """Compute the first block's self-attention once a step for all guidance branches, which have not looked at their
    texts yet and are the same there.

    Of the 2n self-attentions and their projections in a step one is left out (n blocks, two branches), at the price of
    one tensor of the tokens' size in the compute dtype that is kept meanwhile: 0.8 GB for 14B at 1280x720x81
    (computed). Branches that differ in more than text (S2V, Animate, image channels in context windows) are computed
    one by one, which is told. The bits are the same where branches are computed one by one or in step
    (`lockstep_cfg`); in one batch (`use_batched_cfg`) the attention has half the rows, which may round otherwise.
    """

    order = Order.TRUNK
    grade = "rounding"
    tolerance = 1e-2
    cost = "a tensor of the tokens' size in the compute dtype"
    per_call = True
    conflicts = (
        Conflict("Compile", "a compiled block is one piece, of which a part cannot be left out"),
        Conflict("AttentionRows", "it keeps the whole output of an attention that is to be made row by row"),
    )
    share_first_block: bool = option(False, "compute the first block's self-attention once for all guidance branches")

    def apply(self, engine: Engine) -> None:
        common = _Common()
        engine.wrap_segment(common.hooked)
        engine.wrap_denoiser(common.wrap)


class _Common:
    """The self-attention of the first block, kept from the first branch of a step for the others."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        """The branches at work that may share it."""
        self.kept: Tensor | None = None

    @contextmanager
    def hooked(self, dit: nn.Module, run: Denoising) -> Iterator[None]:
        if differing := differences(run.branches):
            logging.getLogger(__name__).warning(
                "--share_first_block shares nothing: the branches differ in %s, not in their texts alone", differing
            )
        first: Any = dit.blocks[0]  # type: ignore[index]
        plain = first.around_attention
        first.around_attention = self._around
        try:
            yield
        finally:
            first.around_attention = plain

    def wrap(self, inner: Denoiser, dit: nn.Module, segment: Segment) -> Denoiser:
        def shared(latents: Tensor, step: Step, branches: Mapping[str, Condition]) -> dict[str, Tensor]:
            if len(branches) > 1 and not differences(branches):
                self.names = frozenset(branches)
            try:
                return inner(latents, step, branches)
            finally:
                self.names, self.kept = frozenset(), None

        return shared

    def _around(
        self, layer: Any, tokens: Tensor, inputs: Any, enter: Callable[..., Tensor], leave: Callable[..., Tensor]
    ) -> Tensor:
        count = len(inputs.branches)
        if layer.role != "self" or not self.names.issuperset(inputs.branches):
            return at_once(layer, tokens, inputs, enter, leave)
        if self.kept is None:
            each = slice(tokens.shape[0] // count)
            entered = tree_map_only(Tensor, lambda whole: whole[each], enter(tokens, inputs))  # 8-bit codes are two
            self.kept = layer.forward(entered, inputs.of_samples(each))
        return leave(tokens, self.kept if count == 1 else self.kept.repeat(count, 1, 1), inputs)


def differences(branches: Mapping[str, Condition]) -> list[str]:
    """In what, beside their texts, branches differ; tensors are compared as objects, which waits for no device."""
    first, *others = branches.values()
    names = [f.name for f in dataclasses.fields(first) if f.name not in ("context", "memo")]
    return [name for name in names if any(getattr(other, name, None) is not getattr(first, name) for other in others)]
