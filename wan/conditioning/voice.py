"""Speech made from a text in the voice of a sample, by CosyVoice 2 where it is installed."""

from __future__ import annotations

import os
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.conditioning.audio import open_sound
from wan.engine.errors import BadRequest, MissingPackage

__all__ = ["check_voice", "speak"]

MODEL = "CosyVoice2-0.5B"
FOLDERS = (Path("CosyVoice/pretrained_models") / MODEL, Path("pretrained_models") / MODEL, Path(MODEL))
"""Where its weights are looked for, beside the working folder."""


def check_voice(prompt_audio: str | None, prompt_text: str | None, text: str | None) -> Path:
    """The folder of CosyVoice's weights. Raises MissingPackage, or BadRequest naming what is missing."""
    given = {"--tts_prompt_audio": prompt_audio, "--tts_prompt_text": prompt_text, "--tts_text": text}
    if lacking := [flag for flag, value in given.items() if not value]:
        raise BadRequest(f"--enable_tts needs {', '.join(lacking)}: a voice sample, what it says, and what to say")
    if find_spec("cosyvoice") is None:
        raise MissingPackage(
            "--enable_tts needs CosyVoice 2, which is not installed: install it from "
            "https://github.com/FunAudioLLM/CosyVoice and put its folder on PYTHONPATH, or pass the speech with --audio"
        )
    found = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if found is None:
        raise BadRequest(f"--enable_tts: no {MODEL} in {', '.join(map(str, FOLDERS))}; download it there")
    return found


def speak(
    text: str, prompt_audio: str | os.PathLike[str], prompt_text: str, model: Path, target: Path = Path("tts.wav")
) -> Path:
    """`target`, a .wav in which `text` is said in the voice of `prompt_audio`, which says `prompt_text`."""
    sample = open_sound(prompt_audio, "--tts_prompt_audio")
    from cosyvoice.cli.cosyvoice import CosyVoice2

    voice: Any = CosyVoice2(str(model))
    pieces = voice.inference_zero_shot(text, prompt_text, sample.samples[None], stream=False)
    speech = torch.cat([piece["tts_speech"].flatten().cpu() for piece in pieces])
    _write(target, speech, voice.sample_rate)
    return target


def _write(path: Path, samples: Tensor, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
