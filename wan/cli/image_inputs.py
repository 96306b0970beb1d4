"""`--image`, `--first_frame`, `--last_frame` and `--fit`: pictures that a video begins and ends with."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan.cli.inputs import Asked, Inputs
from wan.engine.errors import BadRequest


def image_to_video(args: argparse.Namespace, asked: Asked) -> Inputs:
    """--image (or --first_frame), and --last_frame for a model that can end at one."""
    if args.image is not None and args.first_frame is not None:
        raise BadRequest("--image and --first_frame are the same picture here: give one of them")
    if args.image is None and args.first_frame is None:
        raise BadRequest(f"--image is missing: {asked.task} makes a video that begins with a picture; name a file")
    if args.last_frame is not None and "clip_checkpoint" in asked.config:
        raise BadRequest(
            f"--last_frame: {asked.task} was trained with one picture; leave it out, or use flf2v-14B or i2v-A14B"
        )
    first = "image" if args.image is not None else "first_frame"
    names = {first: "img"} | ({"last_frame": "last_frame"} if args.last_frame is not None else {})
    return _clip_by_clip(args, asked, _pictures(args, asked, names))


def first_and_last(args: argparse.Namespace, asked: Asked) -> Inputs:
    """--first_frame and --last_frame."""
    names = {"first_frame": "first_frame", "last_frame": "last_frame"}
    for name in names:
        if getattr(args, name) is None:
            raise BadRequest(
                f"--{name} is missing: {asked.task} makes a video from one picture to another; name both with "
                "--first_frame and --last_frame"
            )
    return _pictures(args, asked, names)


def _clip_by_clip(args: argparse.Namespace, asked: Asked, inputs: Inputs) -> Inputs:
    """`inputs` with what --extend says, where it is said."""
    from wan.conditioning.clips import clip_lengths

    if args.extend is None:
        for name in ("extend_overlap", "match_color"):
            if getattr(args, name) is not None:
                raise BadRequest(f"--{name} is for clips: add --extend FRAMES, such as {asked.config.frame_num}")
        return inputs
    said = {"extend": args.extend, "extend_overlap": 1 if args.extend_overlap is None else args.extend_overlap}
    clips = clip_lengths(asked.num_frames, said["extend"], said["extend_overlap"], stride=asked.config.vae_stride[0])
    if len(clips) == 1:
        raise BadRequest(
            f"--extend {args.extend}: the {asked.num_frames} frames that are asked for are one clip; ask for more with "
            "--frame_num, or leave it out"
        )
    lengths = ", ".join(map(str, clips))
    why = f"--frame_num, in {len(clips)} clips of {lengths} frames that share {said['extend_overlap']}"
    return replace(
        inputs,
        beyond={**inputs.beyond, **said},
        why={**inputs.why, "frames": why},
        match_color=bool(args.match_color),
        flags={**inputs.flags, **said, **({"match_color": True} if args.match_color else {})},
    )


def _pictures(args: argparse.Namespace, asked: Asked, names: dict[str, str]) -> Inputs:
    """The pictures of the flags in `names`, by the arguments of `generate`; the first decides about the shape."""
    from wan.conditioning.image import area_size, load_image

    if len(names) > 1 and asked.num_frames < 5:
        raise BadRequest(f"--last_frame: {asked.num_frames} frames are too few to end elsewhere; make at least 5")
    paths = {flag: Path(getattr(args, flag)).expanduser() for flag in names}
    images = {flag: load_image(path, f"--{flag}") for flag, path in paths.items()}
    first, fit = next(iter(images.values())), args.fit or asked.config.get("sample_fit", "area")
    size, why = (asked.width, asked.height), {}
    if fit == "area":
        size = area_size(
            first.width, first.height, asked.width * asked.height, stride=asked.config.vae_stride,
            patch=asked.config.patch_size,
        )  # fmt: skip
        shape = f"the {first.width}x{first.height} picture's shape, of {asked.width}x{asked.height} pixels at most"
        why["size"] = f"{shape}; --fit crop keeps to --size" if size != (asked.width, asked.height) else shape
    given: dict[str, Any] = {argument: images[flag] for flag, argument in names.items() if argument != "last_frame"}
    last = {"last_frame": images["last_frame"]} if "last_frame" in images else {}
    upstreams = "first_frame" in given  # 2.1's class takes both pictures, that of 2.2 only ours
    exact = {"size": size, "fit": fit} if fit != "area" else {}
    return Inputs(
        arguments={
            **given, **(last if upstreams else {}), "max_area": asked.width * asked.height,
            "frame_num": asked.num_frames,
        },
        beyond=exact | ({} if upstreams else last),
        size=size,
        why=why,
        flags={"size": f"{asked.width}*{asked.height}", "fit": fit}
        | {flag: os.path.abspath(path) for flag, path in paths.items()},
        files=paths,
    )  # fmt: skip
