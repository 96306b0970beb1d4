"""A sentencepiece model as a Hugging Face tokenizer, without the packages sentencepiece and protobuf.

ComfyUI's text encoder files carry their tokenizer in this form. Of the format (sentencepiece_model.proto) only what a
unigram model needs is read: pieces with scores and types, and how text is normalised.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from wan.engine.errors import BadCheckpoint

UNKNOWN, CONTROL = 2, 3
_UNIGRAM = 1
_END, _PAD = "</s>", "<pad>"


@dataclass
class _Spiece:
    """What the messages of a model file say."""

    pieces: list[tuple[str, float]] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    collapse: bool = True


def spiece_tokenizer(content: bytes, name: str) -> Any:
    """A `PreTrainedTokenizerFast` that ends texts with </s>; `name` is for errors. Raises BadCheckpoint."""
    spiece = _parse(content, name)
    complete = UNKNOWN in spiece.types and {_END, _PAD} <= {piece for piece, _ in spiece.pieces}
    if spiece.model_type != _UNIGRAM or not complete:
        raise BadCheckpoint(
            f"the sentencepiece model in {name!r} is not umT5's (a unigram model with <unk>, {_PAD} and {_END}); fetch "
            "tokenizer.json of google/umt5-xxl and pass it with --tokenizer"
        )
    from transformers import PreTrainedTokenizerFast

    unknown = spiece.pieces[spiece.types.index(UNKNOWN)][0]
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(spiece), pad_token=_PAD, eos_token=_END, unk_token=unknown, padding_side="right"
    )


def _tokenizer(spiece: _Spiece) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.Unigram(spiece.pieces, unk_id=spiece.types.index(UNKNOWN), byte_fallback=spiece.byte_fallback)
    )
    steps = [normalizers.Precompiled(spiece.charsmap)] if spiece.charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")] if spiece.collapse else []
    tokenizer.normalizer = normalizers.Sequence(steps)
    prepend = "always" if spiece.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    kinds = zip(spiece.pieces, spiece.types, strict=True)
    special = [AddedToken(piece, normalized=False) for (piece, _), kind in kinds if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", _END], pair=["$A", _END, "$B", _END], special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    return tokenizer


def _parse(content: bytes, name: str) -> _Spiece:
    """Fields by number, as sentencepiece_model.proto gives them: 1 piece, 2 trainer_spec, 3 normalizer_spec."""
    spiece = _Spiece()
    try:
        for number, value in _fields(content):
            if number == 1:
                row = dict(_fields(value))
                spiece.pieces.append((row[1].decode("utf-8"), struct.unpack("<f", row.get(2, b"\0\0\0\0"))[0]))
                spiece.types.append(row.get(3, 1))
            elif number == 2:
                row = dict(_fields(value))
                spiece.model_type, spiece.byte_fallback = row.get(3, _UNIGRAM), bool(row.get(35, 0))
            elif number == 3:
                row = dict(_fields(value))
                spiece.charsmap, spiece.dummy_prefix = row.get(2, b""), bool(row.get(3, 1))
                spiece.collapse = bool(row.get(4, 1))
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise BadCheckpoint(f"{name!r} holds no sentencepiece model ({error}); download it again") from error
    return spiece


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int for variable-length numbers, bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends within a field at byte {at}")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number without end at byte {at}")
