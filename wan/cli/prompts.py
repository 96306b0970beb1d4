"""The file of `--prompt_file`: a prompt a line, or JSON objects whose keys are flags, each a command line of its own.

A line says what the command line would say with its flags added; what it may not say is named with file and line.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wan.cli.args import CHECKPOINT, FLAGS, MISSING, RUN, Parser, build_parser, parse
from wan.engine.errors import BadRequest, WanError
from wan.engine.options import Option, merged, str2bool
from wan.engine.plan import Optimization, options

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")

SHARED = ("task", "from", "prompt_file", "results", "resume", "decode")
"""Flags of the whole command, beside those of the checkpoint and of how to run."""

REPLACES = {"frame_num": "duration", "duration": "frame_num", "save_file": "name"}
"""What a job says, and what of the command line it thereby overrules."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the file, as the command line it stands for. `seed` is the one it says itself, if it does."""

    path: Path
    line: int
    args: argparse.Namespace
    seed: int | None = None

    def refused(self, error: WanError) -> WanError:
        """`error`, saying which line it is about."""
        return type(error)(f"{_where(self.path, self.line)}: {error}")


def read_entries(path: Path, args: argparse.Namespace, registry: Sequence[type[Optimization]]) -> list[Entry]:
    """The jobs in the file, each `args` and what its line adds. Raises BadRequest naming file and line."""
    known = options(registry)
    reader = _Reader(path, args, known, may_differ(registry))
    entries = [reader.entry(line, text) for line, text in _lines(path)]
    if not entries:
        raise BadRequest(f"--prompt_file {str(path)!r} holds no prompt: write one a line")
    return entries


def may_differ(registry: Iterable[type[Optimization]]) -> set[str]:
    """What a job may say, by the names of the namespace: what to make, where to, and the options of one call."""
    flags = {flag.dest for flag in FLAGS if flag.group not in (CHECKPOINT, RUN) and flag.name not in SHARED}
    flags |= {flag.dest for flag in MISSING}  # the parser says what they wait for
    return flags | {o.name for kind in registry if kind.per_call for o in options((kind,))}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that count. A line ends at a line feed alone: other separators occur in prompts."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRequest(f"--prompt_file {str(path)!r} cannot be read: {reason}; pass a text file") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadRequest(f"--prompt_file {str(path)!r} is in UTF-16: save it as UTF-8")
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadRequest(f"{_where(path, number)}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
        if "\0" in text:
            raise BadRequest(f"{_where(path, number)}: it holds a zero byte, so this is no text file")
        if text and not text.startswith("#"):
            yield number, text


class _Reader:
    """Turns lines into namespaces, through the parser of the command line."""

    def __init__(self, path: Path, args: argparse.Namespace, known: Sequence[Option], able: set[str]) -> None:
        self._path = path
        self._args = args
        self._known = known
        self._is_json = path.suffix.lower() in JSON_ENDINGS
        self._parser: Parser = build_parser(known)
        self._may_differ = able

    def entry(self, line: int, text: str) -> Entry:
        try:
            said = self._fields(text)
            own = parse([word for key, value in said.items() for word in self._words(key, value)], self._known,
                        parser=self._parser)  # fmt: skip
            if own.prompt is None:
                raise BadRequest('there is no "prompt"')
        except BadRequest as error:
            raise BadRequest(f"{_where(self._path, line)}: {error}") from error
        args = self._merged(own, [self._dest(key) for key, value in said.items() if value is False or value == []])
        return Entry(path=self._path, line=line, args=args, seed=own.base_seed)

    def _merged(self, own: argparse.Namespace, off: Iterable[str]) -> argparse.Namespace:
        """The command line with what a job says on top; `off` are its switches that are off, and its empty lists."""
        given = {name for name, value in vars(own).items() if value is not None}
        cleared = {REPLACES[name] for name in given if name in REPLACES and REPLACES[name] not in given}
        return merged(argparse.Namespace(**{**vars(self._args), **dict.fromkeys((*cleared, *off))}), own)

    def _fields(self, text: str) -> dict[str, Any]:
        """What a line says, by flag."""
        if not self._is_json:
            if text.startswith("{") and isinstance(_json_or_none(text), dict):
                raise BadRequest("this is JSON; name the file .jsonl to have it read so")
            return {"prompt": text}
        try:
            fields = json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f'bad JSON ({error}); write one object a line, as {{"prompt": "a cat"}}') from error
        if not isinstance(fields, dict):
            raise BadRequest(f'{text[:40]!r} is no JSON object; write {{"prompt": "a cat"}}')
        return fields

    def _words(self, key: str, value: Any) -> list[str]:
        """`key: value` as the words of a command line."""
        action = self._action(key)
        flag = action.option_strings[0]
        if action.nargs == 0:
            return self._switch(key, value, action)
        if action.nargs == "+":
            return self._several(key, value, flag)
        if action.dest == "sample_guide_scale" and isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, bool) and action.type is not str2bool:
            _wrong(key, value, "a text" if action.type is str else "a number")
        if action.type is str and not isinstance(value, str):
            _wrong(key, value, "a text")
        if not isinstance(value, str | int | float):
            _wrong(key, value, "one value")
        return [f"{flag}={value}"]

    @staticmethod
    def _several(key: str, value: Any, flag: str) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            _wrong(key, value, "a text or a list of texts")
        return [f"{flag}={text}" for text in texts]

    def _switch(self, key: str, value: Any, action: argparse.Action) -> list[str]:
        if not isinstance(value, bool) or (action.const is False and not value):
            _wrong(key, value, "true or false" if action.const else "true")
        if value:
            return [action.option_strings[0]]
        # Plain flags have no off spelling; `_merged` takes back what the command line says.
        return next(([o.off[0]] for o in self._known if o.name == action.dest and o.off), [])

    def _dest(self, key: str) -> str:
        return self._action(key).dest

    def _action(self, key: str) -> argparse.Action:
        """The flag a key names, if it may stand in a line."""
        actions = self._parser._option_string_actions
        name = key.replace("-", "_")
        spelled = {flag.lstrip("-").replace("-", "_"): action for flag, action in actions.items()}
        action = spelled.get(name)
        if action is None:
            able = [flag for flag, action in spelled.items() if action.dest in self._may_differ]
            close = difflib.get_close_matches(name, able, n=1)
            raise BadRequest(f"unknown key {key!r}: " + (f"did you mean {close[0]!r}?" if close else "keys are flags"))
        if action.dest not in self._may_differ:
            if any(flag.dest == action.dest for flag in FLAGS) or any(o.name == action.dest for o in self._known):
                raise BadRequest(f"{key!r} is the same for all jobs: give --{name} on the command line")
            raise BadRequest(f"{key!r} cannot be given here: leave it out")
        return action


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return fields


def _wrong(key: str, value: Any, wanted: str) -> NoReturn:
    raise BadRequest(f"{key!r} is {json.dumps(value, ensure_ascii=False)[:60]}, but must be {wanted}")


def _where(path: Path, line: int) -> str:
    return f"--prompt_file {str(path)!r}, line {line}"
