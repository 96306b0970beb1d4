"""Sound files of every kind become the same samples; features are counted in frames as the original code does."""

from __future__ import annotations

import math
import subprocess
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.conditioning.audio import RATE, clip_features, clips_of, entries_of, frames_of, open_sound, resampled
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.modules.s2v import AudioEncoder
from wan.video.ffmpeg import ffmpeg_exe


def tone(seconds: float, rate: int = RATE) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(int(seconds * rate)) / rate)


def write(path: Path, channels: Tensor, rate: int = RATE) -> Path:
    """A 16-bit .wav of channels [C, n]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).round().short().contiguous().numpy().tobytes())
    return path


def converted(source: Path, target: Path, *arguments: str) -> Path:
    subprocess.run([ffmpeg_exe(), "-loglevel", "error", "-y", "-i", source, *arguments, target], check=True)
    return target


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_channels_are_mixed_and_rates_changed(tmp_path: Path) -> None:
    plain = tone(0.5)
    mono = open_sound(write(tmp_path / "mono.wav", plain[None]))
    assert mono.seconds == 0.5
    torch.testing.assert_close(mono.samples, plain, rtol=0, atol=1e-4)
    stereo = open_sound(write(tmp_path / "stereo.wav", torch.stack([plain, 0 * plain])))
    torch.testing.assert_close(stereo.samples, plain / 2, rtol=0, atol=1e-4)
    high = open_sound(write(tmp_path / "high.wav", tone(0.5, 44100)[None].repeat(2, 1), 44100))
    assert len(high.samples) == len(plain)
    torch.testing.assert_close(high.samples[200:-200], plain[200:-200], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.flac", "a.ogg", "video.mkv"])
def test_any_format_is_read(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", tone(0.5)[None])
    picture = ["-f", "lavfi", "-i", "color=size=16x16:duration=0.5", "-map", "1:v", "-map", "0:a"]
    codec = ["-c:a", "flac"] if name == "a.ogg" else []
    sound = open_sound(converted(source, tmp_path / name, *(picture if name == "video.mkv" else []), *codec))
    assert sound.seconds == pytest.approx(0.5, abs=0.1)
    assert sound.samples.pow(2).mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.15)


def test_what_cannot_be_heard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    picture = ["-f", "lavfi", "-i", "color=size=16x16:duration=0.2", tmp_path / "mute.mp4"]
    subprocess.run([ffmpeg_exe(), "-loglevel", "error", *picture], check=True)
    write(tmp_path / "none.wav", torch.empty(1, 0))
    write(tmp_path / "short.wav", torch.zeros(1, 100))
    for name, reason in (
        ("missing.wav", "there is no such file"),
        ("text.wav", "cannot be read as sound"),
        ("empty.wav", "cannot be read as sound"),
        ("mute.mp4", "it holds no sound"),
        ("none.wav", "lasts 0.000 s; at least 0.025 s are needed"),
        ("short.wav", "lasts 0.006 s; at least"),
        (".", "there is no such file"),
    ):
        with pytest.raises(BadRequest, match=reason) as caught:
            open_sound(tmp_path / name)
        assert str(caught.value).startswith("--audio ") and "\n" not in str(caught.value)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_entries_are_interpolated_from_50_to_30_a_second_end_to_end() -> None:
    states = torch.arange(11.0)[None, :, None].expand(2, -1, 3)
    features = resampled(states)
    assert features.shape == (2, 6, 3)
    assert features[1, :, 2].tolist() == [0, 2, 4, 6, 8, 10]


def test_each_frame_hears_the_entry_of_its_moment_and_silence_beyond_the_end() -> None:
    features = 1 + torch.arange(16.0)[None, :, None].expand(25, -1, 4)  # 8.5 frames
    heard = clip_features(features, 4, 16)
    assert heard.shape == (1, 25, 4, 12) and clips_of(16, 4, 16) == 3
    # round(k * 1.875), halves to even: 0 2 4 6 8 9 11 13 15 17 19 21
    assert heard[0, 7, 2].tolist() == [1, 3, 5, 7, 9, 10, 12, 14, 16, 0, 0, 0]


def test_sound_that_fills_clips_exactly_gets_one_more() -> None:
    """As in the original code: nothing is cut, the rest is silent."""
    assert clips_of(149, 80, 16) == 1
    assert clips_of(150, 80, 16) == 2
    assert frames_of(5.0, 16) == 80 and frames_of(5.001, 16) == 81


# ---- the speech model ------------------------------------------------------------------------------------------------


def test_features_are_the_hidden_states_of_transformers(tiny_wav2vec: Path, tmp_path: Path) -> None:
    from transformers import Wav2Vec2ForCTC

    path = write(tmp_path / "a.wav", tone(0.8)[None])
    encoder = AudioEncoder(model_id=tiny_wav2vec)
    features = encoder.extract_audio_feat(path, return_all_layers=True)
    samples = open_sound(path).samples
    normal = (samples - samples.mean()) / (samples.var(unbiased=False) + 1e-7).sqrt()
    reference = Wav2Vec2ForCTC.from_pretrained(tiny_wav2vec).eval()
    with torch.no_grad():
        hidden = torch.cat(reference(normal[None], output_hidden_states=True).hidden_states)
    assert features.shape == (25, int(hidden.shape[1] / 50 * 30), 20)
    assert features.shape[1] == entries_of(len(samples))
    expected = resampled(hidden)
    assert ((features - expected).norm() / expected.norm()).item() < 1e-5
    assert torch.equal(encoder.extract_audio_feat(path), features[-1])
    heard, clips = encoder.get_audio_embed_bucket_fps(features, fps=16, batch_frames=8)
    assert clips == 2 and torch.equal(heard[3], features[:, 6])


def test_a_folder_that_is_no_speech_model_is_refused(tiny_wav2vec: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"lacks config.json, preprocessor_config.json, model.safetensors"):
        AudioEncoder(model_id=tmp_path)
    for file in tiny_wav2vec.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["wav2vec2.encoder.layers.3.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="lacks 1 weights, 'wav2vec2.encoder.layers.3.final_layer_norm.weight'"):
        AudioEncoder(model_id=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match="holds no wav2vec2 model"):
        AudioEncoder(model_id=tmp_path)
