"""What a benchmark goes through: cells (one video each) and the variants that make it, from TOML or the command line.

A matrix file has four tables. `[flags]` are flags of generate.py that all cells share; `[matrix]` are flags with a list
of values each, whose product makes the cells; `[variants.NAME]` are flags that one variant adds, with the keys below;
`[pictures]` are input flags with the size of a picture that is drawn for them, as timing needs no real one. What is
spelled on the command line wins over all of them.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from wan.cli.benchmarking.trial import Runs, Variant
from wan.conditioning.geometry import parse_size
from wan.engine.errors import BadRequest
from wan.resources import folder

TABLES = ("flags", "matrix", "variants", "pictures")
KEYS: dict[str, type] = {"about": str, "num_runs": int, "warmup": int, "blocked": bool}
"""Top-level keys: a sentence, and defaults of the benchmark's flags of these names."""
Known = Mapping[str, bool]
"""Flag of generate.py -> whether it is a switch that is followed by True or False."""
BOTH = (Variant(name="baseline"), Variant(name="optimized", optimized=True))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One video by several variants. `words` are flags of generate.py; `name` says what is special about it."""

    name: str
    words: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The content of a file, checked for names and types. `source` says where it came from, in errors."""

    source: str
    settings: Mapping[str, Any]
    known: Known
    flags: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    variants: tuple[Variant, ...]
    pictures: Mapping[str, tuple[int, int]]

    def cells(self, rest: Sequence[str], given: argparse.Namespace, pictures: Path) -> list[Cell]:
        """Every combination once. `rest` are words of the command line and `given` their namespace; both win.

        Pictures are drawn into the folder `pictures`.
        """
        spelled = {name for name, value in vars(given).items() if value is not None}
        drawn = {name: str(_picture(size, pictures)) for name, size in self.pictures.items() if name not in spelled}
        shared = {name: value for name, value in {**self.flags, **drawn}.items() if name not in spelled}
        axes = {name: values for name, values in self.axes.items() if name not in spelled}
        cells = []
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            words = [word for name, value in (shared | chosen).items() for word in spell(name, value, self.known)]
            name = " ".join(_said(name, value) for name, value in chosen.items() if len(axes[name]) > 1)
            cells.append(Cell(name=name, words=(*words, *rest), variants=self._variants(spelled)))
        return cells

    def _variants(self, spelled: Collection[str]) -> tuple[Variant, ...]:
        return tuple(
            Variant(
                name=each.name,
                runner=each.runner,
                optimized=each.optimized,
                dtype=each.dtype,
                words=tuple(word for word in each.words if _flag_of(word) not in spelled),
            )
            for each in self.variants
        )


def find_matrix(name: str) -> Path:
    """The file of a matrix by its name in configs/benchmarks, or by its path. Raises BadRequest."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise BadRequest(f"--matrix {name!r}: there is no such file")
        return Path(name)
    places = folder("configs") / "benchmarks"
    path = places / f"{name}.toml"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in places.glob("*.toml")))
        raise BadRequest(f"--matrix {name!r} is unknown: use {there}, or a FILE.toml")
    return path


def read_matrix(path: Path, known: Known) -> Matrix:
    """The matrix in `path`; `known` are the flags of generate.py. Raises BadRequest, naming the key."""
    source = f"--matrix {str(path)!r}"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"{source} cannot be read: {error}") from error
    settings, tables = _parted(source, content)
    for name in ("flags", "matrix", "pictures"):
        for key in tables[name]:
            _check_known(f"{source}: [{name}]", key, known)
    for key, values in tables["matrix"].items():
        if not isinstance(values, list) or not values:
            raise BadRequest(f"{source}: [matrix] {key} = {values!r} must be a list of values")
        if key in tables["flags"]:
            raise BadRequest(f"{source}: {key!r} stands in [flags] and in [matrix]; leave one of them out")
    return Matrix(
        source=source,
        settings=settings,
        known=known,
        flags=tables["flags"],
        axes=tables["matrix"],
        variants=tuple(_variant(source, name, table, known) for name, table in tables["variants"].items()) or BOTH,
        pictures={name: parse_size(str(size)) for name, size in tables["pictures"].items()},
    )


def _parted(source: str, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The top-level keys, and all tables."""
    for key, value in content.items():
        kind = dict if key in TABLES else KEYS.get(key)
        if kind is None:
            raise BadRequest(f"{source}: {key!r} is unknown; a matrix has {', '.join((*KEYS, *TABLES))}")
        if type(value) is not kind:
            raise BadRequest(f"{source}: {key} = {value!r} must be of type {kind.__name__}")
    settings = {key: value for key, value in content.items() if key in KEYS}
    return settings, {name: content.get(name, {}) for name in TABLES}


def spell(name: str, value: Any, known: Known) -> list[str]:
    """A flag and its value as one word of a command line: `--size=832*480`, `--compile`, `--no-compile`."""
    if isinstance(value, bool) and not known[name]:
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _variant(source: str, name: str, table: Any, known: Known) -> Variant:
    where = f"{source}: [variants.{name}]"
    if not isinstance(table, dict):
        raise BadRequest(f"{source}: variants.{name} = {table!r} must be a table")
    flags = dict(table)
    own = {"runner": flags.pop("runner", "wan"), "dtype": flags.pop("dtype", None)}
    allowed = {"runner": get_args(Runs), "dtype": ("float32", "bfloat16", None)}
    for key, value in own.items():
        if value not in allowed[key]:
            raise BadRequest(f"{where} {key} = {value!r}: use {', '.join(filter(None, allowed[key]))}")
    optimized = not flags.pop("baseline", False)
    if flags and not optimized:
        raise BadRequest(f"{where} {next(iter(flags))!r} goes with no baseline, where every option is off")
    for key in flags:
        _check_known(where, key, known)
    return Variant(
        name=name,
        runner=cast("Runs", own["runner"]),
        dtype=own["dtype"],
        optimized=optimized and own["runner"] == "wan",
        words=tuple(word for key, value in flags.items() for word in spell(key, value, known)),
    )


def _check_known(where: str, key: str, known: Known) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise BadRequest(
            f"{where} {key!r} is no flag of generate.py" + (f"; did you mean {close[0]}?" if close else "")
        )


def _flag_of(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").removeprefix("no-")


def _said(name: str, value: Any) -> str:
    return {"task": f"{value}", "size": f"{value}", "frame_num": f"{value} frames"}.get(name, f"{name} {value}")


def _picture(size: tuple[int, int], into: Path) -> Path:
    """A smooth coloured picture of `size` (width, height), the same on every machine."""
    import numpy as np
    from PIL import Image

    width, height = size
    path = into / f"drawn_{width}x{height}.png"
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = [np.sin(x * a + y * b) for a, b in ((1, 0.5), (0.3, 1.2), (0.8, -0.7))]
    into.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)).save(path)
    return path
