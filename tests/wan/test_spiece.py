"""A sentencepiece model read without sentencepiece gives the tokens sentencepiece gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wan.engine.errors import BadCheckpoint
from wan.modules.spiece import spiece_tokenizer
from wan.modules.tokenizers import HuggingfaceTokenizer

FOLDER = Path(__file__).parent / "data" / "umt5-spiece"
CONTENT = (FOLDER / "spiece.model").read_bytes()
TOKENS: dict[str, list[int]] = json.loads((FOLDER / "tokens.json").read_text())
"""Text -> what sentencepiece 0.2.3 makes of it with this model, </s> added: byte fallback, character map, spaces."""


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_sentencepieces(text: str) -> None:
    assert spiece_tokenizer(CONTENT, "spiece.model")(text).input_ids == TOKENS[text]


def test_content_file_and_folder_are_the_same_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(CONTENT)
    for name in (CONTENT, FOLDER / "spiece.model", tmp_path):
        ids, mask = HuggingfaceTokenizer(name, seq_len=24, clean="whitespace")(
            ["a  big red circle", "一只"], return_mask=True
        )
        expected = TOKENS["a big red circle moves to the right"][:4] + [1]
        assert ids[0, :5].tolist() == expected and ids.shape == (2, 24)
        assert not ids[mask == 0].any() and mask[0].sum() == 5


@pytest.mark.parametrize("cut", [1, 100, 3000, len(CONTENT) - 1])
def test_a_damaged_model_is_refused(cut: int) -> None:
    with pytest.raises(BadCheckpoint, match=r"x\.model"):
        spiece_tokenizer(CONTENT[:cut], "x.model")


def test_a_tokenizer_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, says in (("{", "cannot be read as JSON"), ('{"a": 1}', "is no tokenizer"), ("text", "sentencepiece")):
        path.write_text(content)
        with pytest.raises(BadCheckpoint, match=says):
            HuggingfaceTokenizer(path)
