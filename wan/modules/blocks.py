"""The transformer block of the DiT, what it reads, and the places where a family may add to it.

Precision is explicit, never autocast: the residual stream, norms, modulation and rotary run in float32; Linear layers
run in the dtype of `inputs.context`. With float32 weights everything is float32.

Letters: B batch, L tokens, S text tokens, U distinct timesteps, N heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.engine.errors import BadRequest
from wan.engine.ops.attention import InCodes, masked, sdpa
from wan.engine.ops.float8 import Quantized
from wan.engine.ops.linear import gelu_between, linear, project
from wan.engine.ops.norms import norm_rotate, norm_rotate_quantize, rms_norm
from wan.engine.ops.rows import Around, accumulate, at_once, in_runs
from wan.engine.types import Condition, Layout, token
from wan.modules.joints import Entrance, leaving, modulated

if TYPE_CHECKING:
    from wan.modules.model import WanModel

__all__ = [
    "Adapter", "BlockInputs", "WanAttentionBlock", "WanCrossAttention", "WanI2VCrossAttention", "WanLayerNorm",
    "WanRMSNorm", "WanSelfAttention",
]  # fmt: skip

SITES = ("after_self_attn", "after_cross_attn", "after_ffn")

Attend = Callable[[Tensor, Tensor, Tensor, Layout | None], Tensor]
RunBlock = Callable[[nn.Module, Tensor, "BlockInputs"], Any]
"""What comes back is what the block returns: tokens, or for an adapter's block what its adapter expects."""
MakeKeys = Callable[[Tensor], tuple[Tensor, Tensor]]
KeepKeys = Callable[[MakeKeys, Tensor], tuple[Tensor, Tensor]]
"""(what makes keys and values of a text, the text) -> those, made now or before."""


def call_block(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Any:
    """The plain `run_block`."""
    return block(tokens, inputs)


def made_anew(make: MakeKeys, text: Tensor) -> tuple[Tensor, Tensor]:
    """The plain `keep_keys`."""
    return make(text)


def keep(tokens: Tensor) -> Tensor:
    """The plain `gather`: all tokens are here already."""
    return tokens


@dataclass(kw_only=True)
class BlockInputs:
    """What every block of one forward reads. Fields with `token(dim)` are aligned with tokens."""

    modulation: Tensor
    """[B, U, 6, D] float32, one row per distinct timestep."""
    rows: Tensor | None = token(dim=0, default=None)
    """[L] which row each token uses; None when one row serves all."""
    rope: Tensor = token(dim=0)
    """[L, 1, D_head / 2, 2] float32 cosine and sine."""
    frames: Tensor = token(dim=0)
    """[L] latent frame of each token, -1 outside the grid."""
    context: Tensor
    """[B, S, D] text tokens in the compute dtype."""
    layout: Layout
    """Token grid of the latents."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Adapters' tensors (audio, face, image), batch first."""
    aligned: dict[str, Tensor] = field(default_factory=dict, metadata={"token": 1})
    """Adapters' tensors that run along the tokens, [B, L, ...]."""
    residuals: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Given the tokens behind the block of that number, what is added to them; one is evaluated at a time."""
    constant_rows: Mapping[float, int] = field(default_factory=dict)
    """Row of each constant timestep that an adapter asked for."""
    branches: tuple[str, ...] = ("cond",)
    """Names of the equal parts of the batch."""
    expert: str = "dit"
    """Whose forward this is: names what an adapter keeps in the condition."""
    run_block: RunBlock = call_block
    """How adapters run their own blocks."""
    gather: Callable[[Tensor], Tensor] = keep
    """All tokens from local ones, for the rare adapter that needs them."""
    modulated: Tensor | None = None
    """`modulation` as the block at hand adds its own to it, see `modulated`; None: it does so itself."""
    given_away: bool = False
    """Whether whoever calls the trunk is through with its tokens, so that they need not be copied to be written."""

    def at(self, tokens: slice) -> BlockInputs:
        """The inputs of some of the tokens."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            value, dim = getattr(self, f.name), f.metadata.get("token")
            if isinstance(value, dict) and dim is not None:
                changes[f.name] = {name: each[:, tokens] for name, each in value.items()}
            elif value is not None and dim is not None:
                changes[f.name] = value[tokens]
        return replace(self, **changes)

    def of_samples(self, samples: slice) -> BlockInputs:
        """The inputs of some samples of the batch, all of one branch."""
        rows = None if self.modulated is None else self.modulated[samples]
        return replace(
            self, modulation=self.modulation[samples], modulated=rows,
            context=self.context[samples], branches=self.branches[:1],
            features={name: each[samples] for name, each in self.features.items()},
            aligned={name: each[samples] for name, each in self.aligned.items()},
        )  # fmt: skip


class Adapter(nn.Module):
    """What a family adds to the DiT. The base class adds nothing."""

    timesteps: tuple[float, ...] = ()
    """Constant timesteps whose modulation rows the adapter needs, see `BlockInputs.constant_rows`."""
    after: tuple[int, ...] = ()
    """Number of the main block after which each of `blocks` runs; empty puts them first."""

    appends: bool = False
    """Whether `embed` puts tokens behind those of the video."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def embed(
        self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition
    ) -> tuple[Tensor, BlockInputs]:
        """Before the trunk, on all tokens: add to them, or append tokens with their rope, row and frame -1."""
        return tokens, inputs

    def sides(self, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> None:
        """Inside the trunk, on local tokens: fill `inputs.residuals`, running own blocks by `inputs.run_block`.

        Blocks write the tokens: an adapter that looks at them later keeps a clone.
        """


class SideAdapter(Adapter):
    """An adapter whose blocks belong to the DiT, under upstream's names, and run after the main blocks `after`."""

    def __init__(self, blocks: nn.ModuleList, after: Iterable[int]) -> None:
        super().__init__()
        del self.blocks
        self.after = tuple(after)
        self._of_dit = (blocks,)  # in a tuple, so that they are not registered a second time

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self._of_dit[0]


class WanRMSNorm(nn.Module):
    """Root mean square norm over the last dim; statistics in float32, the weight applied in the input's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WanLayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever dtype its weights are stored in."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(dim, elementwise_affine=elementwise_affine, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class WanSelfAttention(nn.Module):
    """Attention of the tokens among themselves. `attend` and `project` may be replaced or wrapped from outside."""

    role = "self"

    def __init__(
        self, dim: int, num_heads: int, window_size: tuple[int, int] = (-1, -1), qk_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise BadRequest(f"dim {dim!r} cannot be split into {num_heads!r} heads; choose a multiple of num_heads")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.qk_norm, self.eps = window_size, qk_norm, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.extras = nn.ModuleDict()
        self.project = project
        self.attend: Attend = sdpa if tuple(window_size) == (-1, -1) else partial(masked, window_size=window_size)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, N, D / N]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def normed(self, x: Tensor, norm: nn.Module, rope: Tensor | None = None) -> Tensor:
        """The heads [B, L, N, D / N] of a projection just made, normed and turned by `rope`; may be written over it."""
        weight = norm.weight if isinstance(norm, WanRMSNorm) else None
        return norm_rotate(x, weight, rope, self.num_heads, self.eps)

    def keys(self, x: Tensor | Quantized, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, N, D / N] of the tokens that enter."""
        k, v = project(x, self.k, self.v)
        return self.normed(k, self.norm_k, inputs.rope), self.heads(v)

    def queries(self, x: Tensor | Quantized, inputs: BlockInputs) -> Tensor:
        """Queries [B, L, N, D / N] of the tokens that enter."""
        return self.normed(linear(x, self.q), self.norm_q, inputs.rope)

    def merge(self, out: Tensor, q: Tensor, inputs: BlockInputs) -> Tensor:
        """The attention output and that of every extra, summed, through the output projection."""
        for extra in self.extras.values():
            out = out + extra(q, inputs)
        return linear(out.flatten(2).to(inputs.context.dtype), self.o)

    def asked(self, q: Tensor, inputs: BlockInputs) -> Tensor | Quantized:
        """Queries of a projection just made; in 8 bits where attention alone reads them, and so."""
        if isinstance(self.attend, InCodes) and isinstance(self.norm_q, WanRMSNorm) and not self.extras:
            how = self.norm_q.weight, inputs.rope, self.num_heads, self.eps
            return Quantized(*norm_rotate_quantize(q, *how), q.dtype)
        return self.normed(q, self.norm_q, inputs.rope)

    def forward(self, x: Tensor | Quantized, inputs: BlockInputs) -> Tensor:
        q, k, v = self.project(x, self.q, self.k, self.v)
        del x  # as below: each is as large as the tokens, and not needed any more
        q = self.asked(q, inputs)
        k = self.normed(k, self.norm_k, inputs.rope)
        out = self.attend(q, k, self.heads(v), inputs.layout)
        del k, v
        if not self.extras:
            q = out  # nobody reads queries any more, which may lie in one piece of memory with keys and values
        return self.merge(out, q, inputs)


class WanCrossAttention(WanSelfAttention):
    """Attention of the tokens to the text."""

    role = "cross"

    def __init__(
        self, dim: int, num_heads: int, window_size: tuple[int, int] = (-1, -1), qk_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_heads, window_size, qk_norm, eps)
        self.keep_keys: KeepKeys = made_anew

    def keys(self, x: Tensor | Quantized, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, whatever tokens enter."""
        return self.keep_keys(self.keys_of, inputs.context)

    def keys_of(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, N, D / N] of a text."""
        k, v = project(context, self.k, self.v)
        return self.normed(k, self.norm_k), self.heads(v)

    def queries(self, x: Tensor | Quantized, inputs: BlockInputs) -> Tensor:
        return self.normed(linear(x, self.q), self.norm_q)

    def forward(self, x: Tensor | Quantized, inputs: BlockInputs) -> Tensor:
        q = self.queries(x, inputs)
        k, v = self.keys(x, inputs)
        del x
        return self.merge(self.attend(q, k, v, None), q, inputs)


class WanI2VCrossAttention(WanCrossAttention):
    """Attention to the text and, with keys and values of their own, to the tokens in `inputs.features["clip"]`."""

    def __init__(
        self, dim: int, num_heads: int, window_size: tuple[int, int] = (-1, -1), qk_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_heads, window_size, qk_norm, eps)
        self.k_img = nn.Linear(dim, dim)
        self.v_img = nn.Linear(dim, dim)
        self.norm_k_img = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        # Its own seam: what is done to the attention to the text is not meant for images.
        self.attend_image: Attend = sdpa

    def image_keys_of(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, I, N, D / N] of image tokens."""
        k, v = project(image, self.k_img, self.v_img)
        return self.normed(k, self.norm_k_img), self.heads(v)

    def merge(self, out: Tensor, q: Tensor, inputs: BlockInputs) -> Tensor:
        k, v = self.keep_keys(self.image_keys_of, inputs.features["clip"])
        return super().merge(accumulate(out, self.attend_image(q, k, v, None)), q, inputs)


CROSS_ATTENTION = {"i2v_cross_attn": WanI2VCrossAttention}
"""Upstream's name -> class; every other name is attention to the text alone."""


class FeedForward(nn.Sequential):
    """Linear, tanh-GELU, Linear, under upstream's keys `0` and `2`."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor | Quantized, inputs: BlockInputs | None = None) -> Tensor:
        """`inputs` is not looked at: all layers of a block are called alike."""
        expand, _, contract = self
        hidden = gelu_between(x, expand, contract)
        del x
        return linear(hidden, contract)


class WanAttentionBlock(nn.Module):
    """Self attention, cross attention and feed-forward on a float32 residual stream."""

    def __init__(
        self, cross_attn_type: str, dim: int, ffn_dim: int, num_heads: int, window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True, cross_attn_norm: bool = False, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.ffn_dim, self.num_heads, self.eps = dim, ffn_dim, num_heads, eps
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = WanSelfAttention(dim, num_heads, window_size, qk_norm, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        cross_attention = CROSS_ATTENTION.get(cross_attn_type, WanCrossAttention)
        self.cross_attn = cross_attention(dim, num_heads, (-1, -1), qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.around_attention: Around = at_once
        self.around_ffn: Around = at_once
        self.inserts = nn.ModuleDict({site: nn.ModuleList() for site in SITES})

    def insert(self, site: str, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """What the modules hung on this place make of the tokens."""
        for module in self.inserts[site]:
            tokens = module(tokens, inputs)
        return tokens

    def self_part(
        self, tokens: Tensor, inputs: BlockInputs, shift: Tensor, weight: Tensor, gate: Tensor,
        then: Entrance | None = None,
    ) -> Tensor:  # fmt: skip
        layer = self.self_attn
        enter = Entrance(layers=(layer.q, layer.k, layer.v), weight=weight, bias=shift, eps=self.eps)
        return self.around_attention(layer, tokens, inputs, enter, leaving(gate, then))

    def cross_part(
        self, tokens: Tensor, inputs: BlockInputs, enter: Entrance | None = None, then: Entrance | None = None
    ) -> Tensor:
        return self.around_attention(self.cross_attn, tokens, inputs, enter or _rounded, leaving(None, then))

    def ffn_part(self, tokens: Tensor, inputs: BlockInputs, enter: Entrance, gate: Tensor) -> Tensor:
        return self.around_ffn(self.ffn, tokens, inputs, enter, leaving(gate, None))

    def crossing(self) -> Entrance | None:
        """What enters cross-attention; None where there is no norm before it."""
        if isinstance(self.norm3, nn.Identity):
            return None
        weight, bias = (each.float().view(1, 1, -1) for each in (self.norm3.weight, self.norm3.bias))
        return Entrance(layers=(self.cross_attn.q,), weight=weight, bias=bias, eps=self.eps)

    def unbroken(self, then: Entrance | None, site: str, around: Around) -> Entrance | None:
        """`then`, where nothing hangs at `site` and both layers are computed for all tokens at once."""
        return then if self.around_attention is around is at_once and not self.inserts[site] else None

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """tokens float32 [B, L, D] -> the same shape. Without gradients the input is written and comes back."""
        made = modulated(self.modulation, inputs.modulation) if inputs.modulated is None else inputs.modulated
        rows = made.unbind(2)
        crossing = self.crossing()
        feeding = Entrance(layers=(self.ffn[0],), weight=rows[4], bias=rows[3], eps=self.eps)
        then = self.unbroken(crossing, "after_self_attn", self.around_attention)
        tokens = self.insert("after_self_attn", self.self_part(tokens, inputs, *rows[:3], then), inputs)
        then = self.unbroken(feeding, "after_cross_attn", self.around_ffn)
        tokens = self.insert("after_cross_attn", self.cross_part(tokens, inputs, crossing, then), inputs)
        return self.insert("after_ffn", self.ffn_part(tokens, inputs, feeding, rows[5]), inputs)


def _rounded(tokens: Tensor, inputs: BlockInputs) -> Tensor:
    return in_runs(lambda at: tokens[:, at], tokens, inputs.context.dtype)
