"""Instructions to language models: one for every task upstream has, in both languages, whatever there is to see."""

from __future__ import annotations

import re

import pytest

from wan.configs import SUPPORTED_SIZES
from wan.engine.errors import BadRequest
from wan.prompting.system import LANGUAGES, system_prompt, user_text

HAN = re.compile(r"[\u4e00-\u9fff]")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", SUPPORTED_SIZES)
@pytest.mark.parametrize(
    "given", [{}, {"pictures": 1}, {"pictures": 2}, {"unseen": True}, {"pictures": 1, "words": False}]
)
def test_every_task_has_an_instruction_in_the_language_asked_for(
    task: str, language: str, given: dict[str, int]
) -> None:
    text = system_prompt(task, language, **given)  # type: ignore[arg-type]
    assert 300 < len(text) * (3 if language == "zh" else 1) < 3000
    if language == "zh":
        assert len(HAN.findall(text)) > 0.7 * len(text)
    else:
        assert text.isascii()


@pytest.mark.parametrize("language", LANGUAGES)
def test_tasks_and_what_they_lack_are_told_apart(language: str) -> None:
    kinds = ("t2v-14B", "t2i-14B", "i2v-14B", "flf2v-14B", "vace-14B", "s2v-14B", "animate-14B")
    assert len({system_prompt(task, language, pictures=1) for task in kinds}) == len(kinds)
    forms = ({"pictures": 1}, {"pictures": 1, "words": False}, {"unseen": True})
    assert len({system_prompt("i2v-A14B", language, **form) for form in forms}) == 3  # type: ignore[arg-type]


def test_ti2v_and_a_task_without_a_name_are_what_their_pictures_make_them() -> None:
    for task in ("ti2v-5B", None):
        assert system_prompt(task, "en") == system_prompt("t2v-A14B", "en")
        assert system_prompt(task, "en", pictures=1) == system_prompt("i2v-A14B", "en", pictures=1)
        assert system_prompt(task, "en", unseen=True) == system_prompt("i2v-A14B", "en", unseen=True)
    assert system_prompt(None, "zh", pictures=2) == system_prompt("flf2v-14B", "zh", pictures=2)


def test_a_picture_alone_comes_with_a_sentence_and_words_stay_as_they_are() -> None:
    assert user_text("  \n", "en") == "Write the prompt for this picture."
    assert HAN.search(user_text("", "zh"))
    assert user_text(" a cat ", "en") == " a cat "


def test_another_language_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadRequest, match="in zh or en, not in 'de'"):
        system_prompt("t2v-14B", "de")
