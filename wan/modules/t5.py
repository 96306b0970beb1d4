"""The umT5 text encoder, under upstream's names and parameter keys.

It differs from upstream in cost only: the network computes the real tokens of all prompts of a call at once instead
of 512 positions a prompt (padding is masked and cut off, so the result is the same), the buckets of the position
table are found once per forward, and weights go straight from the file to where they are used.

Letters: B batch, S text tokens, D width, N heads. Source: Raffel et al. 2020, arXiv:1910.10683; Chung et al. 2023
(umT5: one position table per layer), arXiv:2304.09151.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.stream import load_into, open_weights
from wan.modules.t5_layers import (
    T5Attention,
    T5FeedForward,
    T5LayerNorm,
    T5RelativeEmbedding,
    fp16_clamp,
    hide,
    init_weights,
    relative_buckets,
)
from wan.modules.tokenizers import HuggingfaceTokenizer

__all__ = ["T5Decoder", "T5Encoder", "T5EncoderModel", "T5Model", "build_text_encoder", "encode_texts", "umt5_xxl"]


class T5SelfAttention(nn.Module):
    """One encoder block: attention and feed-forward, each behind its norm."""

    def __init__(
        self,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = T5LayerNorm(dim)
        self.attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm2 = T5LayerNorm(dim)
        self.ffn = T5FeedForward(dim, dim_ffn, dropout)
        self.pos_embedding = None if shared_pos else T5RelativeEmbedding(num_buckets, num_heads, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = fp16_clamp(x + self.dropout(self.attn(self.norm1(x), bias=bias)))
        return fp16_clamp(x + self.dropout(self.ffn(self.norm2(x))))


class T5CrossAttention(nn.Module):
    """One decoder block: causal attention, attention to the encoder, feed-forward."""

    def __init__(
        self,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm1 = T5LayerNorm(dim)
        self.self_attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm2 = T5LayerNorm(dim)
        self.cross_attn = T5Attention(dim, dim_attn, num_heads, dropout)
        self.norm3 = T5LayerNorm(dim)
        self.ffn = T5FeedForward(dim, dim_ffn, dropout)
        self.pos_embedding = None if shared_pos else T5RelativeEmbedding(num_buckets, num_heads, bidirectional=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor, encoder_states: Tensor, encoder_bias: Tensor | None) -> Tensor:
        x = fp16_clamp(x + self.dropout(self.self_attn(self.norm1(x), bias=bias)))
        x = fp16_clamp(x + self.dropout(self.cross_attn(self.norm2(x), encoder_states, encoder_bias)))
        return fp16_clamp(x + self.dropout(self.ffn(self.norm3(x))))


def call_block(block: nn.Module, x: Tensor, bias: Callable[[nn.Module], Tensor], *encoder: Tensor | None) -> Tensor:
    """The plain `run_block`: all that touches a layer's weights is done in here."""
    out: Tensor = block(x, bias(block), *encoder)
    return out


class _Stack(nn.Module):
    """What encoder and decoder share: embedding, blocks, final norm and the position tables."""

    block: type[nn.Module]
    bidirectional: bool

    def __init__(
        self,
        vocab: int | nn.Embedding,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_layers: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.dim_attn = dim_attn
        self.dim_ffn = dim_ffn
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.num_buckets = num_buckets
        self.shared_pos = shared_pos
        self.token_embedding = vocab if isinstance(vocab, nn.Embedding) else nn.Embedding(vocab, dim)
        shared = T5RelativeEmbedding(num_buckets, num_heads, self.bidirectional) if shared_pos else None
        self.pos_embedding = shared
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            self.block(dim, dim_attn, dim_ffn, num_heads, num_buckets, shared_pos, dropout) for _ in range(num_layers)
        )
        self.norm = T5LayerNorm(dim)
        self.run_block: Callable[..., Tensor] = call_block
        self.apply(init_weights)

    def all_blocks(self) -> list[nn.Module]:
        """The layers in the order they run."""
        return list(self.blocks)

    def run(self, ids: Tensor, visible: Tensor | None, *encoder: Tensor | None) -> Tensor:
        """Token numbers [B, S] -> hidden states [B, S, D]; `visible` [1 or B, 1, S, S] is False where keys hide."""
        x = self.dropout(self.token_embedding(ids))
        buckets = relative_buckets(ids.shape[1], ids.shape[1], self.num_buckets, self.bidirectional).to(x.device)

        def bias(block: nn.Module) -> Tensor:
            positions = (self.pos_embedding or block.pos_embedding)(buckets)
            return positions if visible is None else hide(positions, visible)

        for block in self.blocks:
            x = self.run_block(block, x, bias, *encoder)
        return self.dropout(self.norm(x))


class T5Encoder(_Stack):
    """The umT5 encoder. Source: wan/modules/t5.py of Wan 2.1 (names and keys)."""

    block = T5SelfAttention
    bidirectional = True

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token numbers ids [B, S] and mask [B, S] (0 = padding; None = all real) -> hidden states [B, S, D].

        Rows of padding hold values without meaning; they do not reach the rows of real tokens.
        """
        return self.run(ids, None if mask is None else (mask != 0)[:, None, None, :])


class T5Decoder(_Stack):
    """The umT5 decoder. No Wan pipeline uses it; it completes `T5Model` for code that imports it from here."""

    block = T5CrossAttention
    bidirectional = False

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Token numbers ids [B, S], encoder_states [B, S', D] -> hidden states [B, S, D], each seeing only the past."""
        if encoder_states is None:
            raise ValueError("T5Decoder needs encoder_states: the result of T5Encoder for the source text.")
        size = ids.shape[1]
        visible = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()[None, None]
        if mask is not None:
            visible = visible & (mask != 0)[:, None, None, :]
        encoder_bias = None
        if encoder_mask is not None:
            encoder_bias = hide(encoder_states.new_zeros(1, 1, 1, 1), (encoder_mask != 0)[:, None, None, :])
        return self.run(ids, visible, encoder_states, encoder_bias)


class T5Model(nn.Module):
    """Encoder, decoder and language-model head with one shared token embedding."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        encoder_layers: int,
        decoder_layers: int,
        num_buckets: int,
        shared_pos: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        sizes = (self.token_embedding, dim, dim_attn, dim_ffn, num_heads)
        self.encoder = T5Encoder(*sizes, encoder_layers, num_buckets, shared_pos, dropout)
        self.decoder = T5Decoder(*sizes, decoder_layers, num_buckets, shared_pos, dropout)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(
        self, encoder_ids: Tensor, encoder_mask: Tensor | None, decoder_ids: Tensor, decoder_mask: Tensor | None
    ) -> Tensor:
        """Logits [B, S, vocab] of the next decoder token."""
        states = self.encoder(encoder_ids, encoder_mask)
        return self.head(self.decoder(decoder_ids, decoder_mask, states, encoder_mask))


def build_text_encoder(shapes: Mapping[str, Sequence[int]]) -> T5Encoder:
    """The encoder whose sizes are those of a state dict, on the meta device, in eval mode.

    `shapes` maps upstream's keys to shapes. Raises BadCheckpoint when a key that fixes a size is absent.
    """
    shared_pos = "pos_embedding.embedding.weight" in shapes
    layers = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    try:
        vocab, dim = shapes["token_embedding.weight"]
        dim_attn = shapes["blocks.0.attn.q.weight"][0]
        dim_ffn = shapes["blocks.0.ffn.fc1.weight"][0]
        table = "pos_embedding.embedding.weight" if shared_pos else "blocks.0.pos_embedding.embedding.weight"
        num_buckets, num_heads = shapes[table]
    except KeyError as error:
        raise BadCheckpoint(
            f"the text encoder's weights have no {error.args[0]!r}; "
            "expected upstream's file models_t5_umt5-xxl-enc-bf16.pth (keys token_embedding, blocks.N, norm)."
        ) from error
    with torch.device("meta"):
        encoder = T5Encoder(vocab, dim, dim_attn, dim_ffn, num_heads, len(layers), num_buckets, shared_pos)
    return encoder.eval()


def umt5_xxl(
    encoder_only: bool = False,
    decoder_only: bool = False,
    return_tokenizer: bool = False,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> nn.Module | tuple[nn.Module, HuggingfaceTokenizer]:
    """A umT5 with fresh weights, in umt5-xxl's sizes but for those given (`vocab_size`, `dim`, `encoder_layers`, ...).

    22.7 GB in float32: to load weights use `build_text_encoder`, or device="meta" and `load_state_dict(assign=True)`.
    """
    config: dict[str, Any] = {
        "vocab_size": 256384,
        "dim": 4096,
        "dim_attn": 4096,
        "dim_ffn": 10240,
        "num_heads": 64,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "num_buckets": 32,
        "shared_pos": False,
        "dropout": 0.1,
    } | sizes
    if encoder_only or decoder_only:
        config["vocab"] = config.pop("vocab_size")
        layers = {"encoder": config.pop("encoder_layers"), "decoder": config.pop("decoder_layers")}
        config["num_layers"] = layers["encoder" if encoder_only else "decoder"]
    network = T5Encoder if encoder_only else T5Decoder if decoder_only else T5Model
    with torch.device(device):
        model = network(**config).to(dtype)
    if not return_tokenizer:
        return model
    return model, HuggingfaceTokenizer("google/umt5-xxl", **(tokenizer_kwargs or {}))


def encode_texts(
    model: nn.Module, tokenizer: HuggingfaceTokenizer, texts: str | Sequence[str], device: torch.device | str
) -> list[Tensor]:
    """Hidden states [S_i, D] of each text's real tokens, </s> included, from one forward of `model` on `device`.

    Only as many positions are computed as the longest text has; the rest of the tokenizer's padding is masked anyway.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        return []
    ids, mask = tokenizer(texts, return_mask=True, add_special_tokens=True)
    lengths: list[int] = mask.sum(dim=1).tolist()
    longest = max(lengths)
    ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
    states = model(ids, None if min(lengths) == longest else mask)
    return [row[:length] for row, length in zip(states, lengths, strict=True)]


class T5EncoderModel:
    """Encoder and tokenizer behind upstream's call: `(texts, device) -> [tensor [S_i, D], ...]`.

    `checkpoint_path` is a state dict file (models_t5_umt5-xxl-enc-bf16.pth), `tokenizer_path` a tokenizer folder. The
    network's sizes come from the file. `device` None is the current CUDA device, or the CPU without one; it is looked
    up here, never at import. `shard_fn(model, sync_module_states=False)` replaces the move to `device` (FSDP).
    """

    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        tokenizer_path: str | os.PathLike[str] | None = None,
        shard_fn: Callable[..., nn.Module] | None = None,
    ) -> None:
        if checkpoint_path is None or tokenizer_path is None:
            raise BadCheckpoint(
                f"T5EncoderModel got checkpoint_path={checkpoint_path!r}, tokenizer_path={tokenizer_path!r}; it needs "
                "both: models_t5_umt5-xxl-enc-bf16.pth and the folder google/umt5-xxl of a Wan checkpoint."
            )
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.text_len = text_len
        self.dtype = dtype
        self.device = torch.device(device)
        self.checkpoint_path = checkpoint_path
        self.tokenizer_path = tokenizer_path
        self.tokenizer = HuggingfaceTokenizer(tokenizer_path, seq_len=text_len, clean="whitespace")
        model = _load_encoder(os.fspath(checkpoint_path), dtype, "cpu" if shard_fn is not None else self.device)
        self.model: nn.Module = model if shard_fn is None else shard_fn(model, sync_module_states=False)

    @classmethod
    def of(cls, model: nn.Module, tokenizer: HuggingfaceTokenizer) -> T5EncoderModel:
        """The same callable over a network and a tokenizer that stand already."""
        self = cls.__new__(cls)
        parameter = next(model.parameters())
        self.text_len = tokenizer.seq_len or 512
        self.dtype, self.device = parameter.dtype, parameter.device
        self.checkpoint_path, self.tokenizer_path = None, tokenizer.name
        self.tokenizer, self.model = tokenizer, model
        return self

    def __call__(self, texts: str | Sequence[str], device: torch.device | str) -> list[Tensor]:
        return encode_texts(self.model, self.tokenizer, texts, device)


def _load_encoder(path: str, dtype: torch.dtype, device: torch.device | str) -> T5Encoder:
    if not os.path.isfile(path):
        raise BadCheckpoint(
            f"text encoder file {path!r} does not exist; it is models_t5_umt5-xxl-enc-bf16.pth of a Wan checkpoint."
        )
    weights = open_weights(Path(path))
    model = build_text_encoder(weights.shapes())
    where = torch.device(device)
    load_into(model, weights.stream(), dtype=lambda key: dtype, place=lambda key, value: where)
    return model.requires_grad_(False)
