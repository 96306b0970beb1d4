"""`--image`, `--audio` and what goes with them: who speaks, what is said, how long, and in which pose."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.cli.inputs import Asked, Inputs
from wan.engine.errors import BadRequest

_TTS = ("tts_prompt_audio", "tts_prompt_text", "tts_text")


def speech(args: argparse.Namespace, asked: Asked) -> Inputs:
    """The sound decides about the length, the picture about the shape."""
    from wan.conditioning.audio import clips_of, entries_of, frames_of, open_sound
    from wan.conditioning.image import load_image
    from wan.conditioning.speech import speech_size
    from wan.conditioning.video import open_video
    from wan.families.s2v import lead, length
    from wan.speech2video import check_clip
    from wan.video import Soundtrack

    _refuse(args, asked)
    clip_frames = 80 if args.infer_frames is None else args.infer_frames
    check_clip(clip_frames)
    image = load_image(Path(args.image).expanduser())
    size = speech_size(image.width, image.height, asked.width * asked.height)
    files = {"image": Path(args.image).expanduser()}
    if args.pose_video is not None:
        open_video(args.pose_video, "--pose_video")
        files["pose_video"] = Path(args.pose_video).expanduser()
    files["audio"] = _said(args) if args.enable_tts else Path(args.audio).expanduser()
    sound = open_sound(files["audio"])

    from_ref, fps = bool(args.start_from_ref), asked.config.sample_fps
    lasts = clips_of(entries_of(len(sound.samples)), clip_frames, fps)
    clips = lasts if args.num_clip is None else min(args.num_clip, lasts)
    skipped = lead(asked.config, from_ref)
    start = skipped if args.audio_start == "sync" else 0
    heard = max(1, frames_of(sound.seconds, fps) - start)
    num_frames = min(length(asked.config, clips, clip_frames, from_ref), heard)
    of_clips = f"in {clips} of {lasts} clips of {clip_frames} frames"

    def prepare(pipeline: Any) -> Mapping[str, Any]:
        """A class of ours also ends with the sound; upstream's goes on in silence to the end of the clip."""
        return {"frame_num": num_frames} if "frame_num" in inspect.signature(pipeline.generate).parameters else {}

    paths = {name: os.path.abspath(path) for name, path in files.items()}
    return Inputs(
        arguments={
            "ref_image_path": str(files["image"]), "audio_path": str(files["audio"]), "enable_tts": False,
            **dict.fromkeys(_TTS), "num_repeat": args.num_clip, "infer_frames": clip_frames,
            "pose_video": str(files["pose_video"]) if "pose_video" in files else None,
            "max_area": asked.width * asked.height, "init_first_frame": from_ref,
        },
        prepare=prepare,
        size=size,
        num_frames=num_frames,
        sound=Soundtrack(path=sound.path, seconds=num_frames / fps, start=start / fps),
        why={
            "size": f"the {image.width}x{image.height} picture's shape, of {asked.width}x{asked.height} pixels at most",
            "frames": f"--audio lasts {sound.seconds:.2f} s; {of_clips}",
        },
        flags={
            "size": f"{asked.width}*{asked.height}", "frame_num": asked.num_frames, "infer_frames": clip_frames,
            **paths,
            **({"num_clip": args.num_clip} if args.num_clip is not None else {}),
            **({"start_from_ref": True} if from_ref else {}),
            **({"audio_start": "sync"} if args.audio_start == "sync" else {}),
        },
        files=files,
    )  # fmt: skip


def _refuse(args: argparse.Namespace, asked: Asked) -> None:
    """Raise BadRequest for what is missing, or cannot be done."""
    if args.image is None:
        raise BadRequest(f"--image is missing: {asked.task} makes a picture speak; name a file")
    if args.enable_tts and args.audio is not None:
        raise BadRequest("--audio and --enable_tts are both the speech: give one of them")
    if not args.enable_tts:
        if args.audio is None:
            raise BadRequest(f"--audio is missing: {asked.task} needs the speech; name a file, or use --enable_tts")
        for name in _TTS:
            if getattr(args, name) is not None:
                raise BadRequest(f"--{name} has no use without --enable_tts; add it, or leave --{name} out")
    if args.num_clip is not None and args.num_clip < 1:
        raise BadRequest(f"--num_clip {args.num_clip!r}: give a number of clips, at least 1")
    if args.duration is not None:
        raise BadRequest(f"--duration: {asked.task} lasts as long as the speech; bound it with --num_clip")
    if asked.fps != asked.config.sample_fps:
        raise BadRequest(
            f"--fps {asked.fps}: lips follow the sound at {asked.config.sample_fps} frames per second alone; leave it "
            "out"
        )


def _said(args: argparse.Namespace) -> Path:
    """The speech that CosyVoice makes, in tts.wav or the next name that is free."""
    from wan.conditioning.voice import check_voice, speak

    model = check_voice(*(getattr(args, name) for name in _TTS))
    target, number = Path("tts.wav"), 0
    while target.exists():
        target, number = Path(f"tts-{number + 1}.wav"), number + 1
    return speak(args.tts_text, args.tts_prompt_audio, args.tts_prompt_text, model, target)
