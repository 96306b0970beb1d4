"""What a video is called when the user names no file: upstream's name, or `--name` with fields in braces.

Names are made of pure functions of what is generated; `Claims` alone touches the disk. It makes a name this process's
own, so that two programs started in the same second with the same words do not write over each other.
"""

from __future__ import annotations

import contextlib
import re
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

from wan.engine.errors import BadRequest

if TYPE_CHECKING:
    from wan.cli.request import Wanted

MAX_BYTES = 200
"""Of a name or folder without its ending: file systems take 255, and endings such as `-2.mp4.part` are added."""

DEFAULT_LENGTH = 50
"""Characters of a text field without a length, upstream's for the prompt."""

ENDINGS = (".mp4", ".mov", ".mkv", ".png", ".jpg", ".jpeg", ".webp")

TEXT, NUMBER, FIXED = "text", "number", "fixed"
"""Kinds of field: `:40` is the largest length of a text and the least digits of a number; others take no such thing."""


@dataclass(frozen=True)
class Field:
    """What `{name}` stands for."""

    name: str
    kind: str
    help: str
    example: str
    value: Callable[[Wanted], str | int]


FIELDS = (
    Field("task", TEXT, "the task", "t2v-A14B", lambda w: w.task),
    Field("size", FIXED, "width and height", "1280x720", lambda w: f"{w.width}x{w.height}"),
    Field("width", NUMBER, "in pixels", "1280", lambda w: w.width),
    Field("height", NUMBER, "in pixels", "720", lambda w: w.height),
    Field("resolution", FIXED, "480p, 720p, or the shorter side", "720p", lambda w: resolution(w.width, w.height)),
    Field("frames", NUMBER, "number of frames", "81", lambda w: w.num_frames),
    Field("duration", FIXED, "seconds", "5.1", lambda w: f"{w.num_frames / w.fps:.1f}"),
    Field("fps", NUMBER, "frames per second", "16", lambda w: w.fps),
    Field("steps", NUMBER, "solver steps", "40", lambda w: w.steps),
    Field("shift", FIXED, "the schedule's shift", "12", lambda w: f"{w.shift:g}"),
    Field("guidance", FIXED, "guidance scale, or low-high noise", "3-4", lambda w: guidance(w.guide_scale)),
    Field("solver", TEXT, "how the noise is removed", "unipc", lambda w: w.solver),
    Field("seed", NUMBER, "the seed, also a drawn one", "42", lambda w: w.seed),
    Field("prompt", TEXT, "the prompt", "Two_cats_box", lambda w: w.prompt),
    Field("image", TEXT, "name of the input image without its ending, if there is one", "", lambda w: ""),
    Field("date", FIXED, "day of the start", "20250728", lambda w: ""),
    Field("time", FIXED, "time of the start", "090503", lambda w: ""),
    Field("index", NUMBER, "the first number from 1 that makes the name new", "1", lambda w: 1),
)
_BY_NAME = {field.name: field for field in FIELDS}


@dataclass(frozen=True)
class _Piece:
    """Literal text, or a field (name and the number after its colon)."""

    text: str
    field: Field | None = None
    length: int | None = None


class Pattern:
    """A checked `--name`. Raises BadRequest with one line that says what is wrong and what is possible."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._ending = next((known for known in ENDINGS if text.lower().endswith(known)), "")
        self._folders = [self._pieces(part) for part in self._split(text[: len(text) - len(self._ending)])]
        self.counts = any(piece.field is _BY_NAME["index"] for part in self._folders for piece in part)
        """True when `{index}` is in it."""

    def path(self, values: Mapping[str, str | int], ending: str) -> Path:
        """The path relative to the output folder; every part of it is a name that any system takes."""
        *folders, name = (_render(pieces, values) for pieces in self._folders)
        return Path(*map(_part, folders), _part(name) + (self._ending or ending))

    def _split(self, text: str) -> list[str]:
        parts = text.split("/")
        if not text.strip():
            raise BadRequest(f"--name {text!r} is empty: give a pattern such as '{{task}}_{{seed}}_{{prompt:40}}'")
        if parts[0] in ("", "~") or re.match(r"[A-Za-z]:", text) or ".." in parts:
            raise BadRequest(
                f"--name {text!r}: it names a file below the output folder, so neither '..' nor an absolute path; "
                "--save_file FOLDER/ chooses that folder"
            )
        if not parts[-1]:
            raise BadRequest(f"--name {text!r} ends in '/': add the file's name, such as '{{prompt:40}}'")
        return [part for part in parts if part not in ("", ".")]

    def _pieces(self, text: str) -> list[_Piece]:
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise BadRequest(f"--name {self.text!r}: {error}; write {{field}}, and {{{{ for a brace") from error
        pieces = []
        for literal, name, spec, conversion in parsed:
            pieces.append(_Piece(literal))
            if name is not None:
                pieces.append(self._field(name, spec or "", conversion))
        return pieces

    def _field(self, name: str, spec: str, conversion: str | None) -> _Piece:
        field = _BY_NAME.get(name)
        if field is None or conversion:
            what = f"{name}!{conversion}" if conversion else name
            raise BadRequest(f"--name {self.text!r}: there is no field {what!r}; fields: {', '.join(_BY_NAME)}")
        if not spec:
            return _Piece("", field)
        if field.kind == FIXED or not re.fullmatch(r"\d{1,3}", spec, flags=re.ASCII) or int(spec) == 0:
            able = ", ".join(known.name for known in FIELDS if known.kind != FIXED)
            raise BadRequest(
                f"--name {self.text!r}: '{{{name}:{spec}}}' is no length; after the colon of {able} stands a number of "
                "characters or digits, 1 to 999"
            )
        return _Piece("", field, int(spec))


def values(wanted: Wanted, when: time.struct_time) -> dict[str, str | int]:
    """Field name -> what it stands for."""
    stamp = {"date": time.strftime("%Y%m%d", when), "time": time.strftime("%H%M%S", when)}
    return {field.name: stamp.get(field.name, field.value(wanted)) for field in FIELDS}


def resolution(width: int, height: int) -> str:
    """`480p`, `720p` or `1080p` for sizes within 5 % of them (1280x704 is 720p), else the shorter side."""
    short = min(width, height)
    near = min((480, 720, 1080), key=lambda side: abs(side - short))
    return f"{near if abs(near - short) <= 0.05 * near else short}p"


def guidance(scale: float | tuple[float, float]) -> str:
    """`5`, or `3-4` where the experts' scales differ."""
    scales = scale if isinstance(scale, tuple) else (scale,)
    return "-".join(dict.fromkeys(f"{number:g}" for number in scales))


def default_paths(wanted: Wanted, ending: str, when: time.struct_time) -> Iterator[Path]:
    """Upstream's name, then the same with -2, -3, ..."""
    from wan.video import default_file_name

    ring_size = None if "boundary" in wanted.config else 1  # 2.1's program has it in the name
    name = default_file_name(
        wanted.task, wanted.size_name, 1, wanted.prompt, suffix=ending, ring_size=ring_size, when=when
    )
    return numbered(Path(name))


def pattern_paths(pattern: Pattern, wanted: Wanted, ending: str, when: time.struct_time) -> Iterator[Path]:
    """The names of `pattern`, best first: by its `{index}` where it has one, else with -2, -3, ... added."""
    known = values(wanted, when)
    if not pattern.counts:
        return numbered(pattern.path(known, ending))
    return (pattern.path({**known, "index": index}, ending) for index in count(1))


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then -2, -3, ... before its ending."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def run_folder(path: Path) -> Path:
    """The folder beside the video at `path` that exists while the video is being made."""
    return path.with_name(f"{path.name}.run")


class Claims:
    """The names this process has taken. Leaving the `with` gives back those under which nothing is kept."""

    def __init__(self) -> None:
        self._held: list[Path] = []

    def first_free(self, folder: Path, names: Iterator[Path]) -> Path:
        """The first of `names` in `folder` that no file has and no other process makes. Raises BadRequest."""
        for name in names:
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                run_folder(path).mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise BadRequest(
                    f"--save_file: cannot write into {str(path.parent)!r}: {error.strerror}; choose another folder"
                ) from error
            self._held.append(path)
            if not path.exists():
                return path
        raise AssertionError("names never end")

    def give_back(self, path: Path) -> None:
        """Let go of a name, if it is one of these."""
        if path in self._held:
            self._held.remove(path)
            with contextlib.suppress(OSError):  # gone, or with something in it that must stay
                run_folder(path).rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for path in list(self._held):
            self.give_back(path)


def _render(pieces: Sequence[_Piece], values: Mapping[str, str | int]) -> str:
    """One part of a path. Where it would be too long the texts give way, so that a seed at the end stays."""
    parts = [_filled(piece, values) for piece in pieces]
    texts = [i for i, piece in enumerate(pieces) if piece.field is not None and piece.field.kind == TEXT]
    excess = sum(len(part.encode()) for part in parts) - MAX_BYTES
    for i in sorted(texts, key=lambda i: -len(parts[i].encode())):
        if excess > 0:
            full = parts[i].encode()
            parts[i] = full[: max(0, len(full) - excess)].decode("utf-8", "ignore")
            excess -= len(full) - len(parts[i].encode())
    return re.sub(r"_{2,}", "_", "".join(parts))


def _filled(piece: _Piece, values: Mapping[str, str | int]) -> str:
    if piece.field is None:
        return piece.text
    value = str(values[piece.field.name])
    if piece.field.kind == TEXT:
        return _words(value)[: piece.length or DEFAULT_LENGTH]
    return value.zfill(piece.length or 0)


def _words(text: str) -> str:
    """A value as one word: what a path could take for a separator is none."""
    from wan.video import safe_name

    return safe_name("_".join(text.split()), max_bytes=10_000) if text.strip() else ""


def _part(text: str) -> str:
    """One part of a path, safe everywhere; a shell takes a leading dash for a flag and a tilde for a home."""
    from wan.video import safe_name

    name = safe_name(text, max_bytes=MAX_BYTES)
    return f"_{name}" if name.startswith(("-", "~")) else name
