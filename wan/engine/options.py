"""One declaration per option: a dataclass field made by `option()` is at once a command-line flag with an on and an
off spelling, a keyword of the constructors, a preset key and a row of the documentation. All go by the field's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from wan.engine.errors import BadRequest

UNSET: Any = None
"""Default of every flag in the namespace: lets a preset or a task's config fill what the user did not spell."""


@dataclass(frozen=True)
class Option:
    """What an option's field declares; `name` is also the namespace key, keyword and preset key."""

    name: str
    type: Any
    default: Any
    help: str
    flags: tuple[str, ...]
    off: tuple[str, ...]
    takes_bool: bool

    @property
    def is_switch(self) -> bool:
        return bool in _alternatives(self.type)

    @property
    def is_several(self) -> bool:
        """Whether it takes any number of texts."""
        return get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values there are; none where any number or text will do."""
        return () if _plain(self.type) else _words(self.type)


def option(
    default: Any, help: str, *, flags: Sequence[str] = (), off: Sequence[str] = (), takes_bool: bool = False
) -> Any:
    """A dataclass field that is an option.

    `flags` are the on spellings (default `--<field name>`), `off` those that switch it off (default
    `--no-<field name>` for switches). `takes_bool`: the flag needs a value (`--offload_model False`), as upstream's.
    """
    metadata = {"option": True, "help": help, "flags": tuple(flags), "off": tuple(off), "takes_bool": takes_bool}
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: type) -> tuple[Option, ...]:
    """The options a dataclass declares, in order."""
    return _declared(cls)


@functools.cache  # resolving annotations is slow, and every plan asks
def _declared(cls: type) -> tuple[Option, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        if not f.metadata.get("option"):
            continue
        flags = f.metadata["flags"] or (f"--{f.name}",)
        off = f.metadata["off"]
        if not off and bool in _alternatives(hints[f.name]):
            off = (f"--no-{f.name}",)
        found.append(Option(f.name, hints[f.name], f.default, f.metadata["help"], flags, off, f.metadata["takes_bool"]))
    return tuple(found)


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup, options: Iterable[Option]) -> None:
    """Add the flags of `options`; every one defaults to None, "not spelled"."""
    for o in options:
        if o.is_several:
            parser.add_argument(
                *o.flags, dest=o.name, action=Several, nargs="+", default=UNSET, help=o.help, metavar=o.name.upper()
            )
        elif o.is_switch and not o.takes_bool:
            parser.add_argument(*o.flags, dest=o.name, action=Spelling, nargs=0, const=True, default=UNSET, help=o.help)
        else:
            parser.add_argument(
                *o.flags, dest=o.name, action=Spelling, default=UNSET, help=o.help,
                type=str2bool if o.is_switch else _value_type(o.type), choices=o.choices or None,
                metavar=None if o.choices else o.name.upper(),
            )  # fmt: skip
        if o.off:
            parser.add_argument(
                *o.off, dest=o.name, action=Spelling, nargs=0, const=False, default=UNSET, help=argparse.SUPPRESS
            )


class Spelling(argparse.Action):
    """Stores a value and refuses a second spelling of the same option that says something else."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = self.const if self.nargs == 0 else values
        said = f"{option_string}" if self.nargs == 0 else f"{option_string} {values}"
        before = spelled(namespace).get(self.dest)
        if before is not None and before[1] != value:
            parser.error(f"{before[0]} and {said} contradict each other: give one of them")
        _store(namespace, self.dest, said, value)


class Several(argparse.Action):
    """Gathers the values of every time the flag is given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        gathered = (*(getattr(namespace, self.dest) or ()), *values)
        _store(namespace, self.dest, f"{option_string} {' '.join(gathered)}", gathered)


def spelled(namespace: argparse.Namespace) -> Mapping[str, tuple[str, Any]]:
    """Name -> (how it was spelled, value) of every option the user gave."""
    found: Mapping[str, tuple[str, Any]] = vars(namespace).get(_SPELLED, {})
    return found


def merged(below: argparse.Namespace, above: argparse.Namespace) -> argparse.Namespace:
    """All of both; where both spell an option, what `above` says."""
    given = {name: value for name, value in vars(above).items() if value is not None}
    both = {_SPELLED: {**spelled(below), **spelled(above)}}
    return argparse.Namespace(**{**vars(below), **given, **both})


_SPELLED = "_spelled"


def _store(namespace: argparse.Namespace, name: str, said: str, value: Any) -> None:
    setattr(namespace, name, value)
    setattr(namespace, _SPELLED, {**spelled(namespace), name: (said, value)})


def str2bool(value: str | bool) -> bool:
    """Upstream's spelling of booleans: yes/true/t/y/1 and no/false/f/n/0 in any case."""
    if isinstance(value, bool):
        return value
    text = value.lower()
    if text in ("yes", "true", "t", "y", "1"):
        return True
    if text in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is not a boolean: say True or False")


def check_value(o: Option, value: Any, source: str) -> Any:
    """`value` if `o` accepts it, else BadRequest naming `source` (a preset file, a keyword)."""
    if value is None and type(None) in _alternatives(o.type):
        return value
    if o.is_several:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise BadRequest(f"{source}: {o.name} = {value!r} is not a text or a list of texts")
        return tuple(texts)
    if o.choices:
        if value not in o.choices:
            raise BadRequest(f"{source}: {o.name} = {value!r} is not one of {', '.join(map(str, o.choices))}")
        return value
    if value in _words(o.type):
        return value
    kinds = tuple(kind for kind in _alternatives(o.type) if isinstance(kind, type))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(
            [f"{'an' if kind is int else 'a'} {kind.__name__}" for kind in kinds if kind is not type(None)]
            + [repr(word) for word in _words(o.type)]
        )
        raise BadRequest(f"{source}: {o.name} = {value!r} is not {names}")
    return value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _plain(kind: Any) -> list[Any]:
    return [k for k in _alternatives(kind) if k in (int, float, str)]


def _words(kind: Any) -> tuple[Any, ...]:
    return tuple(value for k in _alternatives(kind) if get_origin(k) is Literal for value in get_args(k))


def _value_type(kind: Any) -> Any:
    plain, words = [*_plain(kind), str][0], _words(kind)
    if plain is str or not words:
        return plain

    def number_or_word(text: str) -> Any:
        try:
            return text if text in words else plain(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {' or '.join(words)}") from error

    return number_or_word
