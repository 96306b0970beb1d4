"""What a task takes beside its prompt: the flags that only some tasks have, read into what their class is called with.

Every class has a reader here (text-to-video needs none). It opens the files its flags name and says which size they
make, so that all is known, and refused in one line, before a weight is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli.args import FLAGS, INPUT
from wan.engine.errors import BadRequest
from wan.families import class_name

if TYPE_CHECKING:
    from wan.video import Soundtrack


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags of every task say; `width` and `height` are --size."""

    task: str
    config: Any
    width: int
    height: int
    num_frames: int
    fps: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a reader made of its flags.

    `arguments` of `generate` by upstream's names, also those of size and length; `beyond` go beyond upstream's
    signature and must arrive. `prepare` makes arguments that need the built pipeline; `construct` are arguments of the
    class. `size` (width, height) and `num_frames` are the video's and `why` the reasons, where the inputs decide.
    `sound` goes into the file, `match_color` says that later clips get the colours of the first. `flags` repeat it
    (with absolute paths), `files` were read.
    """

    arguments: Mapping[str, Any]
    beyond: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Mapping[str, Any]] | None = None
    construct: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    sound: Soundtrack | None = None
    match_color: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


Reader = Callable[[argparse.Namespace, Asked], Inputs]

_SPEECH = ("image", "audio", "num_clip", "infer_frames", "pose_video", "start_from_ref", "audio_start", "enable_tts")
_VOICE = ("tts_prompt_audio", "tts_prompt_text", "tts_text")

# Class in `wan` -> (the input flags it takes, module and name of its reader).
_READERS: dict[str, tuple[tuple[str, ...], str]] = {
    "WanAnimate": (
        ("src_root_path", "refert_num", "replace_flag", "use_relighting_lora"),
        "wan.cli.character_inputs:character",
    ),
    "WanS2V": ((*_SPEECH, *_VOICE), "wan.cli.speech_inputs:speech"),
    "WanI2V": (
        ("image", "first_frame", "last_frame", "fit", "extend", "extend_overlap", "match_color"),
        "wan.cli.image_inputs:image_to_video",
    ),
    "WanFLF2V": (("first_frame", "last_frame", "fit"), "wan.cli.image_inputs:first_and_last"),
    "WanTI2V": (("image",), "wan.cli.source_inputs:text_or_image"),
    "WanVace": (("src_video", "src_mask", "src_ref_images", "context_scale"), "wan.cli.source_inputs:control_sources"),
}


def read_inputs(args: argparse.Namespace, asked: Asked) -> Inputs | None:
    """The inputs of a task; None where a text is all it takes. Raises BadRequest, also for a flag of other tasks."""
    taken, reader = _READERS.get(class_name(asked.task), ((), ""))
    for flag in FLAGS:
        if flag.group == INPUT and flag.name not in taken and getattr(args, flag.dest) is not None:
            rest = f"it takes {', '.join(f'--{name}' for name in taken)}" if taken else "it takes a text alone"
            raise BadRequest(f"--{flag.name}: {asked.task} has no use for it ({rest}); leave it out or change --task")
    if not reader:
        return None
    module, _, name = reader.partition(":")
    read: Reader = getattr(import_module(module), name)
    return read(args, asked)
