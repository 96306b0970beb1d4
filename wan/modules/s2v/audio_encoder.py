"""wav2vec2, the speech model whose hidden states a speaking video follows, read by transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint, MissingPackage

__all__ = ["AudioEncoder", "check_folder", "missing"]

RATE = 16000
_UNUSED = ("lm_head.", "wav2vec2.masked_spec_embed")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")


class AudioEncoder:
    """Upstream's wrapper: features of speech, on the CPU in float32 unless told otherwise.

    `model_id` is a folder in transformers' layout (config.json, preprocessor_config.json, weights).
    """

    def __init__(self, device: str | torch.device = "cpu", model_id: str | os.PathLike[str] = "") -> None:
        try:
            from safetensors import SafetensorError
            from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
        except ImportError as error:
            raise MissingPackage(f"speech needs transformers ({error}): pip install transformers") from error
        check_folder(Path(model_id))
        self.device = torch.device(device)
        self.video_rate = 30
        try:
            self.processor: Any = Wav2Vec2FeatureExtractor.from_pretrained(model_id, local_files_only=True)
            whole, found = Wav2Vec2ForCTC.from_pretrained(
                model_id, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadCheckpoint(
                f"{os.fspath(model_id)!r} holds no wav2vec2 model ({reason}); download the folder again"
            ) from error
        # transformers would fill what a file lacks with random numbers.
        if lacking := [key for key in found["missing_keys"] if not key.startswith(_UNUSED)]:
            raise BadCheckpoint(
                f"the speech model in {os.fspath(model_id)!r} lacks {len(lacking)} weights, {min(lacking)!r} among "
                "them; download the folder again"
            )
        self.model = whole.wav2vec2.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def states(self, samples: Tensor) -> Tensor:
        """All hidden states [layers + 1, K, A], 50 a second, of float32 samples [n] at 16 kHz."""
        values = self.processor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").input_values
        hidden = self.model(values.to(self.device), output_hidden_states=True).hidden_states
        return torch.cat([each.float().cpu() for each in hidden])

    def extract_audio_feat(
        self, audio_path: str | os.PathLike[str], return_all_layers: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Features of a sound file, 30 a second: [layers, K, A] of all layers, or [K, A] of the last."""
        from wan.conditioning.audio import open_sound, resampled

        features = resampled(self.states(open_sound(audio_path, "audio_path").samples)).to(dtype)
        return features if return_all_layers else features[-1]

    def get_audio_embed_bucket_fps(
        self, audio_embed: Tensor, fps: float = 16, batch_frames: int = 81, m: int = 0
    ) -> tuple[Tensor, int]:
        """The features [layers, K, A] each video frame hears, [clips x batch_frames, layers, A], and how many clips."""
        from wan.conditioning.audio import clip_features, clips_of
        from wan.engine.errors import BadRequest

        if m:
            raise BadRequest(f"m={m!r}: a frame hears its own moment alone here; leave it at 0")
        heard = clip_features(audio_embed, batch_frames, fps)[0].permute(2, 0, 1)
        return heard, clips_of(audio_embed.shape[1], batch_frames, fps)


def missing(folder: Path) -> list[str]:
    """The files of the speech model that are not in its folder."""
    lacking = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
    return lacking if any((folder / name).is_file() for name in _WEIGHTS) else [*lacking, _WEIGHTS[0]]


def check_folder(folder: Path) -> None:
    """Raise BadCheckpoint naming what is missing of the speech model; nothing is loaded."""
    if lacking := missing(folder):
        raise BadCheckpoint(
            f"the speech model in {str(folder)!r} lacks {', '.join(lacking)}; the download of the checkpoint is "
            "incomplete"
        )
