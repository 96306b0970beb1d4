"""What is taken for a prompt, and what is not."""

from __future__ import annotations

import pytest

from wan.engine.errors import BadRequest
from wan.prompting.answers import MAX_CHARACTERS, clean


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("A red fox.", "A red fox."),
        ("  A red\n\n fox\t. \r\n", "A red fox ."),
        ('"A red fox."', "A red fox."),
        ("“一只狐狸。”", "一只狐狸。"),
        ("「`A fox`」", "`A fox`"),
        ('"Stop" says the fox, "now"', '"Stop" says the fox, "now"'),
        ("<think>a fox?\nyes</think>\nA red fox.", "A red fox."),
        ("A \x1b[31mred\x00 fox", "A [31mred fox"),
        ("A fox \ud800 runs", "A fox runs"),
        ("'", "'"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
    ],
)
def test_an_answer_becomes_one_line_of_plain_text(answer: str, prompt: str) -> None:
    assert clean(answer) == prompt


@pytest.mark.parametrize("answer", ["", " \n", '""', "<think>no end", "<think></think>", "\x00\x01"])
def test_an_answer_with_nothing_in_it_is_refused(answer: str) -> None:
    with pytest.raises(BadRequest, match="the answer is empty"):
        clean(answer)


def test_an_absurdly_long_answer_is_refused() -> None:
    with pytest.raises(BadRequest, match="has 2401 characters, and 2400 are the most"):
        clean("x" * (MAX_CHARACTERS + 1))
