"""`--image` of ti2v, and what guides VACE: `--src_video`, `--src_mask`, `--src_ref_images`, `--context_scale`."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.cli.inputs import Asked, Inputs
from wan.engine.errors import BadRequest


def text_or_image(args: argparse.Namespace, asked: Asked) -> Inputs:
    """--image, or a text alone."""
    from wan.conditioning.geometry import best_output_size, multiples
    from wan.conditioning.image import load_image

    area = asked.width * asked.height
    arguments: dict[str, Any] = {"img": None, "size": (asked.width, asked.height), "max_area": area}
    arguments["frame_num"] = asked.num_frames
    if args.image is None:
        return Inputs(arguments=arguments)
    path = Path(args.image).expanduser()
    image = load_image(path)
    across, down = multiples(tuple(asked.config.vae_stride), tuple(asked.config.patch_size))
    return Inputs(
        arguments={**arguments, "img": image},
        size=best_output_size(image.width, image.height, across, down, area),
        why={"size": f"the {image.width}x{image.height} picture's shape, of {asked.width}x{asked.height} pixels"},
        flags={"size": f"{asked.width}*{asked.height}", "image": os.path.abspath(path)},
        files={"image": path},
    )


def control_sources(args: argparse.Namespace, asked: Asked) -> Inputs:
    """A video, a mask on it and reference images, each of them optional; opened, and the video gone through once."""
    from wan.conditioning.image import load_image
    from wan.conditioning.video import open_control

    scale = 1.0 if args.context_scale is None else args.context_scale
    if not math.isfinite(scale):
        raise BadRequest(f"--context_scale {scale!r}: give a number; 1 acts as trained, 0 not at all")
    pictures = _pictures(args.src_ref_images)
    for path in pictures:
        load_image(path, "--src_ref_images")
    size, num_frames, why = (asked.width, asked.height), asked.num_frames, {}
    if args.src_video is None and args.src_mask is not None:
        raise BadRequest(f"--src_mask {args.src_mask!r} needs a video to lie on: pass --src_video, or leave it out")
    if args.src_video is not None:
        clip, _ = open_control(args.src_video, args.src_mask, asked.num_frames, size)
        num_frames, (height, width) = len(clip.frames), clip.size
        source = clip.source
        why["size"] = f"the shape of --src_video, {source.width}x{source.height}, of {size[0]}x{size[1]} pixels at most"
        why["frames"] = f"of {source.frames} in --src_video, {source.seconds:.1f} s"
    names = {"src_video": args.src_video, "src_mask": args.src_mask}
    files = {name: Path(path).expanduser() for name, path in names.items() if path is not None}
    flags = {name: os.path.abspath(path) for name, path in files.items()} | {"context_scale": scale}
    if pictures:
        flags["src_ref_images"] = ",".join(map(os.path.abspath, pictures))

    def prepare(pipeline: Any) -> Mapping[str, Any]:
        """Upstream's own step between loading and generating; a class of ours reads the files while it encodes them."""
        able = "stream" in inspect.signature(pipeline.prepare_source).parameters
        given = pipeline.prepare_source(
            [_text(files.get("src_video"))], [_text(files.get("src_mask"))], [list(map(str, pictures)) or None],
            asked.num_frames, size, pipeline.device, **({"stream": True} if able else {}),
        )  # fmt: skip
        return dict(zip(("input_frames", "input_masks", "input_ref_images"), given, strict=True))

    return Inputs(
        arguments={"size": size, "frame_num": asked.num_frames, "context_scale": scale},
        prepare=prepare,
        size=(width, height) if args.src_video is not None else size,
        num_frames=num_frames,
        why=why,
        flags={"size": f"{size[0]}*{size[1]}", "frame_num": asked.num_frames, **flags},
        files=files | {f"src_ref_images {i}": path for i, path in enumerate(pictures, 1)},
    )


def _pictures(value: str | None) -> list[Path]:
    """The files of --src_ref_images; a comma in a name cannot be told from one between names."""
    if value is None:
        return []
    names = value.split(",")
    if not all(name.strip() for name in names):
        raise BadRequest(f"--src_ref_images {value!r}: between two commas a file is missing; write a.png,b.png")
    return [Path(name.strip()).expanduser() for name in names]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
