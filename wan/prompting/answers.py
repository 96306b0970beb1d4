"""What a language model's answer must be before it replaces the prompt of a video that takes an hour."""

from __future__ import annotations

import re
import unicodedata

from wan.engine.errors import BadRequest

MAX_TOKENS = 512
"""Tokens an answer may have, upstream's; the text encoder reads no more either."""

MAX_CHARACTERS = 2400
"""Of an answer: more than 512 tokens hold in any language, so a longer one is something else than a prompt."""

_QUOTES = (('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"), ("‘", "’"), ("「", "」"), ("『", "』"))


def unended() -> BadRequest:
    """What to raise for an answer that was cut off."""
    return BadRequest(f"the answer did not come to its end within {MAX_TOKENS} tokens")


def clean(answer: str) -> str:
    """The prompt in `answer`: one line without thoughts, control characters and the quotation marks around it.

    Raises BadRequest for an answer that is empty or absurdly long.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL).encode("utf-8", "ignore").decode()
    text = " ".join(text.split())
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cc")
    for opening, closing in _QUOTES:
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and not {opening, closing} & set(inner):
            text = inner.strip()
    if not text:
        raise BadRequest("the answer is empty")
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"the answer has {len(text)} characters, and {MAX_CHARACTERS} are the most for a prompt")
    return text
