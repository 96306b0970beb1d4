"""The instruction for a language model, by task, language and what it gets to see: put together from three parts."""

from __future__ import annotations

from types import ModuleType

from wan.engine.errors import BadRequest
from wan.prompting import chinese, english

_TEXTS: dict[str, ModuleType] = {"zh": chinese, "en": english}

LANGUAGES = tuple(_TEXTS)


def system_prompt(
    task: str | None, language: str, *, pictures: int = 0, unseen: bool = False, words: bool = True
) -> str:
    """The instruction for `task` ("i2v-14B", or None: as the pictures suggest) with an answer in `language`.

    `pictures` is how many the language model sees; `unseen`: the task has some that it does not see. `words`: whether
    the user wrote anything. Raises BadRequest for a language other than zh and en.
    """
    texts = _of(language)
    return "\n\n".join((texts.TASKS[_kind(task, pictures, unseen, words)], texts.RULES, texts.FORM))


def user_text(prompt: str, language: str) -> str:
    """What the user says, or a sentence in its place for pictures alone."""
    return prompt if prompt.strip() else str(_of(language).NO_WORDS)


def _of(language: str) -> ModuleType:
    if language not in _TEXTS:
        raise BadRequest(f"prompts are extended in {' or '.join(LANGUAGES)}, not in {language!r}")
    return _TEXTS[language]


def _kind(task: str | None, pictures: int, unseen: bool, words: bool) -> str:
    """The key of `TASKS`. A task that is not there is described by its pictures, as one without a name is."""
    kind = (task or "").partition("-")[0]
    if kind not in english.TASKS:  # ti2v, and what later versions make
        kind = "flf2v" if pictures > 1 else "i2v" if pictures or unseen else "t2v"
    kind = "flf2v" if kind == "i2v" and pictures > 1 else kind  # 2.2's i2v can end at a picture too
    # A task that starts from pictures, or a video, has them even where none reached the language model.
    lacking = "unseen" if not pictures else "" if words else "wordless"
    form = f"{kind} {lacking}"
    return form if form in english.TASKS else kind
