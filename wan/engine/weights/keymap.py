"""Other libraries' names for the same tensors, one to one and in both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise

from torch import Tensor

from wan.engine.errors import BadCheckpoint


@dataclass(frozen=True)
class KeyMap:
    """Pairs of name prefixes (ours, theirs). A `*` stands for a number, the same on both sides; the rest is kept."""

    pairs: tuple[tuple[str, str], ...]

    def to_theirs(self, key: str) -> str:
        """Their name of our `key`. Raises BadCheckpoint for one that no pair covers."""
        return _translate(key, self._forwards)

    def to_ours(self, key: str) -> str:
        """Our name of their `key`. Raises BadCheckpoint for one that no pair covers."""
        return _translate(key, self._backwards)

    def covers(self, key: str) -> bool:
        """Whether a pair translates their `key`."""
        return any(pattern.match(key) for pattern, _ in self._backwards)

    @cached_property
    def _forwards(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(ours, theirs) for ours, theirs in self.pairs]

    @cached_property
    def _backwards(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(theirs, ours) for ours, theirs in self.pairs]


@dataclass(frozen=True)
class Recut:
    """A layer that we call `name` is in parts called `of`, and some of our keys lack dims of 1 or are constants.

    `leading` and `trailing` say how many dims are missing, `constants` have the values the file does not store.
    """

    name: str
    of: tuple[str, ...]
    leading: Mapping[str, int]
    trailing: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Dialect:
    """How one file names the weights of a network: `prefix` before each name, `names` for the rest, some left out."""

    prefix: str = ""
    names: KeyMap | None = None
    left_out: Collection[str] = ()
    recut: Recut | None = None

    def ours(self, key: str) -> str | None:
        """Our name of the file's `key`; None for one to leave out, the key itself where nothing translates it."""
        if key in self.left_out:
            return None
        if not key.startswith(self.prefix):
            return key
        bare = key.removeprefix(self.prefix)
        try:
            return bare if self.names is None else self.names.to_ours(bare)
        except BadCheckpoint:
            return key

    def theirs(self, key: str) -> str:
        """The file's name of our `key`."""
        try:
            return self.prefix + (key if self.names is None else self.names.to_theirs(key))
        except BadCheckpoint:
            return key


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    numbers = count(1)
    pattern = re.escape(source).replace(r"\*", r"(\d+)") + r"(?=\.|$)"
    return re.compile(pattern), re.sub(r"\*", lambda match: rf"\g<{next(numbers)}>", target)


def _translate(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, target in rules:
        if match := pattern.match(key):
            return match.expand(target) + key[match.end() :]
    raise BadCheckpoint(f"no rule translates the weight {key!r}: it belongs to another network")


def _under(ours: str, theirs: str, parts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{ours}.{mine}", f"{theirs}.{other}") for mine, other in parts)


_NORMS = (("norm_q", "norm_q"), ("norm_k", "norm_k"))
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), *_NORMS)
_IMAGE_ATTENTION = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"))


def _block(name: str) -> tuple[tuple[str, str], ...]:
    """One block of the transformer, called alike on both sides."""
    return (
        (f"{name}.modulation", f"{name}.scale_shift_table"),
        (f"{name}.norm3", f"{name}.norm2"),
        *_under(f"{name}.self_attn", f"{name}.attn1", _ATTENTION),
        *_under(f"{name}.cross_attn", f"{name}.attn2", (*_ATTENTION, *_IMAGE_ATTENTION)),
        (f"{name}.ffn.0", f"{name}.ffn.net.0.proj"),
        (f"{name}.ffn.2", f"{name}.ffn.net.2"),
    )


DIFFUSERS_DIT = KeyMap(
    (
        ("patch_embedding", "patch_embedding"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
        *_block("blocks.*"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("vace_patch_embedding", "vace_patch_embedding"),
        *_block("vace_blocks.*"),
        ("vace_blocks.*.before_proj", "vace_blocks.*.proj_in"),
        ("vace_blocks.*.after_proj", "vace_blocks.*.proj_out"),
    )
)
"""`WanTransformer3DModel`, also with the image embedder of 2.1's image-to-video, and `WanVACETransformer3DModel`."""

TRANSFORMERS_T5 = KeyMap(
    (
        ("token_embedding", "shared"),
        ("norm", "encoder.final_layer_norm"),
        ("blocks.*.norm1", "encoder.block.*.layer.0.layer_norm"),
        ("blocks.*.norm2", "encoder.block.*.layer.1.layer_norm"),
        ("blocks.*.pos_embedding.embedding", "encoder.block.*.layer.0.SelfAttention.relative_attention_bias"),
        ("blocks.*.attn", "encoder.block.*.layer.0.SelfAttention"),
        ("blocks.*.ffn.gate.0", "encoder.block.*.layer.1.DenseReluDense.wi_0"),
        ("blocks.*.ffn.fc1", "encoder.block.*.layer.1.DenseReluDense.wi_1"),
        ("blocks.*.ffn.fc2", "encoder.block.*.layer.1.DenseReluDense.wo"),
    )
)
"""`UMT5EncoderModel`; it lists the token embedding a second time, as `encoder.embed_tokens`."""

TRANSFORMERS_CLIP = KeyMap(
    (
        ("visual.cls_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.patch_embedding", "vision_model.embeddings.patch_embedding"),
        ("visual.pos_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.pre_norm", "vision_model.pre_layrnorm"),
        ("visual.post_norm", "vision_model.post_layernorm"),
        ("visual.transformer.*.norm1", "vision_model.encoder.layers.*.layer_norm1"),
        ("visual.transformer.*.norm2", "vision_model.encoder.layers.*.layer_norm2"),
        ("visual.transformer.*.attn.q", "vision_model.encoder.layers.*.self_attn.q_proj"),
        ("visual.transformer.*.attn.k", "vision_model.encoder.layers.*.self_attn.k_proj"),
        ("visual.transformer.*.attn.v", "vision_model.encoder.layers.*.self_attn.v_proj"),
        ("visual.transformer.*.attn.proj", "vision_model.encoder.layers.*.self_attn.out_proj"),
        ("visual.transformer.*.mlp.0", "vision_model.encoder.layers.*.mlp.fc1"),
        ("visual.transformer.*.mlp.2", "vision_model.encoder.layers.*.mlp.fc2"),
    )
)
"""`CLIPVisionModel`, whose class and position embeddings lack our leading dims of 1, and whose `attn` is in parts."""

CLIP_CUT = Recut("to_qkv", ("q", "k", "v"), {"visual.cls_embedding": 2, "visual.pos_embedding": 1})
"""What `TRANSFORMERS_CLIP` says of the parts, for both directions."""

_RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_ENDS = (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))


def diffusers_vae(levels: int, num_res_blocks: int) -> KeyMap:
    """`AutoencoderKLWan` of VAE 2.1. Ours lists a decoder's levels flat, diffusers groups them, so sizes matter."""
    pairs = _vae_ends()
    pairs += _under("encoder.downsamples.*", "encoder.down_blocks.*", _RESIDUAL)
    pairs.append(("encoder.downsamples.*", "encoder.down_blocks.*"))
    blocks = num_res_blocks + 1
    starts = [level * (blocks + 1) for level in range(levels + 1)]
    for level, (start, end) in enumerate(pairwise(starts)):
        theirs = f"decoder.up_blocks.{level}"
        for index in range(blocks):
            pairs += _under(f"decoder.upsamples.{start + index}", f"{theirs}.resnets.{index}", _RESIDUAL)
        pairs.append((f"decoder.upsamples.{end - 1}", f"{theirs}.upsamplers.0"))
    return KeyMap(tuple(pairs))


def diffusers_vae22(num_res_blocks: int) -> KeyMap:
    """`AutoencoderKLWan` of VAE 2.2, where both sides group levels and the last of a group changes the size."""
    pairs = _vae_ends()
    pairs += _under("encoder.downsamples.*.downsamples.*", "encoder.down_blocks.*.resnets.*", _RESIDUAL)
    pairs.append((f"encoder.downsamples.*.downsamples.{num_res_blocks}", "encoder.down_blocks.*.downsampler"))
    pairs += _under("decoder.upsamples.*.upsamples.*", "decoder.up_blocks.*.resnets.*", _RESIDUAL)
    pairs.append((f"decoder.upsamples.*.upsamples.{num_res_blocks + 1}", "decoder.up_blocks.*.upsampler"))
    return KeyMap(tuple(pairs))


def _vae_ends() -> list[tuple[str, str]]:
    """All but the levels between first convolution and middle, the same in both VAEs."""
    pairs: list[tuple[str, str]] = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += _under(side, side, _ENDS)
        pairs += _under(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESIDUAL)
        pairs += _under(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESIDUAL)
        pairs.append((f"{side}.middle.1", f"{side}.mid_block.attentions.0"))
    return pairs
