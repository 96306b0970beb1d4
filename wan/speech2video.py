"""Upstream's speech-to-video class, Wan 2.2: a picture speaks what is heard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan.conditioning.audio import Sound, clip_features, clips_of, open_sound, resampled
from wan.conditioning.image import load_image
from wan.conditioning.speech import PoseVideo, reference_pixels, speech_size
from wan.conditioning.video import open_video
from wan.conditioning.voice import check_voice, speak
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.types import Request
from wan.families.s2v import SpeechInputs, length
from wan.modules.s2v.audio_encoder import AudioEncoder, check_folder
from wan.pipeline import WanPipeline, resolve_seed, scale_pair

Place = str | os.PathLike[str]

STATES_PER_SECOND = 50


class WanS2V(WanPipeline):
    """Video that speaks. See `WanPipeline` for the constructor; the speech model runs on the CPU."""

    kind = "s2v"
    _audio_encoder: AudioEncoder | None = None

    def generate(
        self,
        input_prompt: str,
        ref_image_path: Place,
        audio_path: Place | None,
        enable_tts: bool,
        tts_prompt_audio: Place | None,
        tts_prompt_text: str | None,
        tts_text: str | None,
        num_repeat: int | None = 1,
        pose_video: Place | None = None,
        max_area: int = 720 * 1280,
        infer_frames: int = 80,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
        init_first_frame: bool = False,
        *,
        frame_num: int | None = None,
        noise_device: str | None = None,
        **extras: Any,
    ) -> Tensor | None:
        """A video [3, N, H, W] in -1..1, or None when a `sink` took the frames.

        `num_repeat` bounds the clips of `infer_frames` frames (None: as many as the sound lasts), `frame_num` the
        frames. The picture's shape makes the video's, `max_area` limits its pixels. With `enable_tts` the sound is
        made of the three `tts_` arguments, as tts.wav in the working folder. `init_first_frame` begins the video with
        the picture. The rest is as in `WanT2V.generate`. Raises BadRequest, BadCheckpoint and MissingPackage.
        """
        check_clip(infer_frames)
        image = load_image(ref_image_path)
        width, height = speech_size(image.width, image.height, max_area)
        pose = None
        if pose_video is not None:
            pose = PoseVideo(source=open_video(pose_video, "--pose_video"), fps=self.config.sample_fps)
        if enable_tts:
            model = check_voice(str(tts_prompt_audio or ""), tts_prompt_text, tts_text)
            audio_path = speak(tts_text or "", tts_prompt_audio or "", tts_prompt_text or "", model)
        if audio_path is None:
            raise BadRequest("audio_path is missing: pass the speech, or text for it with enable_tts")
        features = self._features(open_sound(audio_path))
        clips = clips_of(features.shape[1], infer_frames, self.config.sample_fps)
        clips = clips if num_repeat is None else min(num_repeat, clips)
        frames = length(self.config, clips, infer_frames, init_first_frame)
        inputs = SpeechInputs(
            reference=reference_pixels(image, width, height),
            audio=clip_features(features, infer_frames, self.config.sample_fps), clips=clips,
            clip_frames=infer_frames, pose=pose, start_from_ref=init_first_frame,
        )  # fmt: skip
        request = Request(
            task="s2v", prompt=input_prompt, negative_prompt=n_prompt or self.sample_neg_prompt, height=height,
            width=width, num_frames=frames if frame_num is None else min(frame_num, frames), steps=sampling_steps,
            shift=shift, solver=sample_solver, guide_scale=scale_pair(guide_scale), seed=resolve_seed(seed),
            noise_device=noise_device, inputs=inputs,
        )  # fmt: skip
        return self.run(request, offload_model=offload_model, **extras)

    @property
    def audio_encoder(self) -> AudioEncoder:
        """The speech model of the checkpoint. Raises BadCheckpoint naming what it lacks."""
        if self._audio_encoder is None:
            self._audio_encoder = AudioEncoder(model_id=self._speech_folder())
        return self._audio_encoder

    @property
    def noise_model(self) -> nn.Module:
        """Upstream's name of `model`."""
        return self.model

    def _speech_folder(self) -> Path:
        if self.folder is None:
            raise BadCheckpoint(
                f"speech-to-video needs the folder {self.config.wav2vec!r} of a checkpoint; pass its folder with "
                "--ckpt_dir beside the files that are named"
            )
        check_folder(self.folder / self.config.wav2vec)
        return self.folder / self.config.wav2vec

    def _features(self, sound: Sound) -> Tensor:
        """[layers, K, A], 30 a second; random ones for random weights."""
        if self.load_format == "dummy":
            count = int(sound.seconds * STATES_PER_SECOND)
            layers = self.model.casual_audio_encoder.weights.shape[1]
            states = torch.randn(layers, count, self.config.audio_dim, generator=torch.Generator().manual_seed(0))
        else:
            states = self.audio_encoder.states(sound.samples)
        return resampled(states)


def check_clip(frames: int) -> None:
    """Raise BadRequest unless clips of that many frames can be made."""
    if frames < 4 or frames % 4:
        near = max(4, round(frames / 4) * 4)
        raise BadRequest(f"--infer_frames {frames!r}: it must be a multiple of 4 above 0, {near} is the nearest")
