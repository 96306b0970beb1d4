"""`--src_root_path`, `--refert_num`, `--replace_flag` and `--use_relighting_lora`: what moves a character."""

from __future__ import annotations

import argparse
import os

from wan.cli.inputs import Asked, Inputs
from wan.engine.errors import BadRequest


def character(args: argparse.Namespace, asked: Asked) -> Inputs:
    """The folder that Wan's preprocessing made; its skeleton's video decides about size and length."""
    from wan.animate import check_overlap
    from wan.conditioning.character import open_sources, source_paths

    if args.src_root_path is None:
        raise BadRequest(
            f"--src_root_path is missing: {asked.task} works on the folder that Wan's preprocessing made; "
            "docs/tasks.md says what is in it"
        )
    overlap = 1 if args.refert_num is None else args.refert_num
    check_overlap(overlap, asked.num_frames)
    replace, root = bool(args.replace_flag), os.path.abspath(os.path.expanduser(args.src_root_path))
    sources = open_sources(
        root, replace=replace, face_size=asked.config.face_size, stride=tuple(asked.config.vae_stride),
        patch=tuple(asked.config.patch_size),
    )  # fmt: skip
    switches = {"replace_flag": replace, "use_relighting_lora": bool(args.use_relighting_lora)}
    return Inputs(
        arguments={
            "src_root_path": root, "replace_flag": replace, "clip_len": asked.num_frames, "refert_num": overlap,
            "input_prompt": None,
        },
        construct={"use_relighting_lora": True} if args.use_relighting_lora else {},
        size=sources.size,
        num_frames=sources.frames,
        why={"size": "src_pose.mp4", "frames": f"src_pose.mp4, in clips of {asked.num_frames}"},
        flags={
            "src_root_path": root, "refert_num": overlap, "frame_num": asked.num_frames,
            "size": f"{asked.width}*{asked.height}",
        }
        | {name: True for name, on in switches.items() if on},
        files={path.name: path for path in source_paths(root, replace=replace).values()},
    )  # fmt: skip
