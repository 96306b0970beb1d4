"""Prompt cleaning and tokens: what upstream's tokenizer class makes of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.modules.tokenizers import HuggingfaceTokenizer, basic_clean, canonicalize, whitespace_clean

TOKENIZER = Path(__file__).parent / "data" / "umt5-tiny"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a   cat \n\t walks ", "a cat walks"),
        ("tom &amp;amp; jerry", "tom & jerry"),
        ("tom &amp; jerry &lt;3", "tom & jerry <3"),
        ("caf\u00c3\u00a9", "café"),
        ("一只猫\u3000在走", "一只猫 在走"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("", ""),
    ],
)
def test_whitespace_cleaning(text: str, cleaned: str) -> None:
    assert whitespace_clean(basic_clean(text)) == cleaned


def test_canonicalize() -> None:
    assert canonicalize("A_Red,  Ball!") == "a red ball"
    assert canonicalize("a {} b, {}!", keep_punctuation_exact_string="{}") == "a {} b {}"


@pytest.mark.parametrize(
    ("clean", "expected"),
    [(None, "Cat &lt;3  HELLO_x!"), ("whitespace", "Cat <3 HELLO_x!"), ("lower", "cat <3 hello_x!"),
     ("canonicalize", "cat 3 hello x")],
)  # fmt: skip
def test_clean_modes(clean: str | None, expected: str) -> None:
    tokenizer = HuggingfaceTokenizer(TOKENIZER, seq_len=32, clean=clean)
    assert tokenizer._clean("Cat &lt;3  HELLO_x!") == expected


def test_tokens_and_mask_are_padded_to_seq_len() -> None:
    tokenizer = HuggingfaceTokenizer(name=str(TOKENIZER), seq_len=24, clean="whitespace")
    ids, mask = tokenizer(["a cat", "a white cat walks on the beach"], return_mask=True, add_special_tokens=True)
    assert ids.shape == mask.shape == (2, 24)
    assert ids.dtype == torch.int64
    for row, shown in zip(ids, mask, strict=True):
        length = int(shown.sum())
        assert row[length - 1] == 1 and not row[length:].any() and shown[:length].all()
    assert torch.equal(tokenizer("a cat"), ids[:1])
    assert tokenizer.vocab_size == 202 and tokenizer.seq_len == 24


def test_without_seq_len_nothing_is_padded() -> None:
    assert HuggingfaceTokenizer(TOKENIZER)("a cat").shape[1] < 10


def test_missing_folder_names_the_path_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"absent.*does not exist.*google/umt5-xxl"):
        HuggingfaceTokenizer(tmp_path / "absent")
    with pytest.raises(BadCheckpoint, match=r"no tokenizer can be read.*tokenizer\.json"):
        HuggingfaceTokenizer(tmp_path)
    with pytest.raises(BadRequest, match="'loud'.*whitespace"):
        HuggingfaceTokenizer(TOKENIZER, clean="loud")
