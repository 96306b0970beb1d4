"""`generate.py --task s2v-14B`: picture and sound in, a video that is heard out; every fault in one line, exit 2."""

from __future__ import annotations

import json
import math
import re
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import wan
from wan.cli.args import parse
from wan.cli.generate import main
from wan.cli.request import resolve
from wan.conditioning.audio import open_sound
from wan.configs import WAN_CONFIGS
from wan.engine.optimizations import registry
from wan.engine.plan import options
from wan.video import verify_video


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((90, 80)).convert("RGB").save("face.png")
    record("speech.wav", tone(1.05))


def tone(seconds: float) -> Tensor:
    return 0.5 * torch.sin(torch.arange(int(16000 * seconds)) * (2 * math.pi * 220 / 16000))


def record(name: str, samples: Tensor) -> None:
    """A mono .wav; of samples [C, n] all channels."""
    channels = samples if samples.ndim == 2 else samples[None]
    with wave.open(name, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((channels.T * 32767).short().contiguous().numpy().tobytes())


@pytest.fixture
def talk(speech_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that make the picture speak on the tiny checkpoint: clips of eight frames, sound for two and a bit."""
    config = type(tiny_config)(WAN_CONFIGS["s2v-14B"])
    same = ("freq_dim", "text_len", "param_dtype", "t5_dtype")
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 3}
    config.update({name: tiny_config[name] for name in same} | sizes, sample_neg_prompt="blurry")
    monkeypatch.setitem(WAN_CONFIGS, "s2v-14B", config)
    flags = ["--ckpt_dir", str(speech_checkpoint), "--device", "cpu", "--seed", "1", "--sample_steps", "2"]
    size = ["--size", "64*64", "--any_size", "--infer_frames", "8", "--prompt", "she speaks"]
    return ["--task", "s2v-14B", *flags, *size, "--image", "face.png", "--audio", "speech.wav"]


def without(arguments: list[str], *flags: str) -> list[str]:
    """`arguments` without these flags and their values."""
    places = {arguments.index(flag) for flag in flags}
    return [word for at, word in enumerate(arguments) if at not in places and at - 1 not in places]


def changed(arguments: list[str], *added: str) -> list[str]:
    """`arguments` with `added`, which replace those of the same flags."""
    return [*without(arguments, *(flag for flag in added if flag in arguments and flag.startswith("--"))), *added]


def test_the_video_is_heard_and_ends_with_the_sound(talk: list[str], capsys: Any) -> None:
    assert main([*talk, "--save_file", "out.mp4"]) == 0
    out, err = capsys.readouterr()
    # 1.05 s at 16 frames a second: all of the sound is heard.
    assert out == "out.mp4\n" and verify_video("out.mp4")[:3] == (17, 64, 64)
    assert "in 3 of 3 clips of 8 frames" in err
    sound = open_sound("out.mp4")
    assert sound.seconds == pytest.approx(17 / 16, abs=0.08)
    assert sound.samples[2000:10000].pow(2).mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.1)
    made = json.loads(Path("out.mp4.json").read_text())
    assert made["flags"]["audio"] == str(Path("speech.wav").absolute()) and made["flags"]["infer_frames"] == 8
    assert set(made["inputs"]) == {"image", "audio"} and not Path("out.mp4.run").exists()


def test_sound_begins_at_0_as_upstreams_or_on_demand_with_the_lips(talk: list[str]) -> None:
    """1.05 s are 17 frames; the first one shown was made for 3/16 s. Either way the sound is as long as the picture."""
    for added, start, frames in (
        ([], 0.0, 17),
        (["--audio_start", "upstream"], 0.0, 17),
        (["--audio_start", "sync"], 3 / 16, 14),
        (["--audio_start", "sync", "--start_from_ref"], 0.0, 17),
    ):
        given = resolve(parse([*talk, *added], options(registry()))).inputs
        assert given is not None and given.sound is not None and given.num_frames == frames
        assert (given.sound.start, given.sound.seconds) == (start, frames / 16)
        assert given.flags.get("audio_start") == ("sync" if "sync" in added else None)


def test_the_task_is_read_from_the_checkpoint_and_repeated_from_the_record(talk: list[str], capsys: Any) -> None:
    one = [*without(talk, "--task"), "--num_clip", "1", "--start_from_ref"]
    assert main([*one, "--save_file", "a.mp4"]) == 0
    assert verify_video("a.mp4").frames == 8
    assert main(["--from", "a.mp4", "--device", "cpu", "--save_file", "b.mp4"]) == 0
    assert "the same bits can be expected" in capsys.readouterr().err
    assert Path("a.mp4").stat().st_size == pytest.approx(Path("b.mp4").stat().st_size, abs=64)
    record("speech.wav", -tone(1.05))
    assert main(["--from", "a.mp4", "--device", "cpu", "--save_file", "c.mp4"]) == 0
    assert "--audio is another file now" in capsys.readouterr().err


@pytest.mark.slow
def test_kept_latents_of_all_clips_are_decoded_again(talk: list[str], capsys: Any) -> None:
    assert main([*talk, "--save_file", "a.mp4", "--keep_latents"]) == 0
    kept = sorted(path.name for path in Path().glob("*.safetensors"))
    assert kept == ["a.latents-1.safetensors", "a.latents-2.safetensors", "a.latents.safetensors"]
    capsys.readouterr()
    assert main(["--decode", "a.latents.safetensors", "--device", "cpu", "--save_file", "b.mp4"]) == 0
    assert "denoise" not in capsys.readouterr().err
    assert verify_video("b.mp4") == verify_video("a.mp4")
    assert open_sound("b.mp4").seconds == open_sound("a.mp4").seconds


def test_a_class_of_upstreams_gets_its_arguments_and_the_sound_is_put_in(
    talk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class WanS2V:
        def __init__(  # noqa: PLR0913
            self, config: Any, checkpoint_dir: str, device_id: int = 0, rank: int = 0, t5_fsdp: bool = False,
            dit_fsdp: bool = False, use_sp: bool = False, t5_cpu: bool = False, init_on_cpu: bool = True,
            convert_model_dtype: bool = False,
        ) -> None: ...  # fmt: skip

        def generate(  # noqa: PLR0913
            self, input_prompt: str, ref_image_path: str, audio_path: str, enable_tts: bool, tts_prompt_audio: Any,
            tts_prompt_text: Any, tts_text: Any, num_repeat: int = 1, pose_video: Any = None, max_area: int = 0,
            infer_frames: int = 80, shift: float = 5.0, sample_solver: str = "unipc", sampling_steps: int = 40,
            guide_scale: float = 5.0, n_prompt: str = "", seed: int = -1, offload_model: bool = True,
            init_first_frame: bool = False,
        ) -> Tensor:  # fmt: skip
            asked.update({name: value for name, value in locals().items() if name not in ("self", "asked")})
            return torch.zeros(3, 21, 64, 64)

    monkeypatch.setattr(wan, "WanS2V", WanS2V, raising=False)
    arguments = without(talk, "--device")
    assert main([*arguments, "--save_file", "out.mp4", "--attention", "sdpa"]) == 0
    assert {name: asked[name] for name in ("ref_image_path", "audio_path", "num_repeat", "max_area")} == {
        "ref_image_path": "face.png", "audio_path": "speech.wav", "num_repeat": None, "max_area": 64 * 64,
    }  # fmt: skip
    assert (asked["infer_frames"], asked["shift"], asked["guide_scale"], asked["seed"]) == (8, 3.0, 4.5, 1)
    # As upstream: picture and sound end with the shorter one.
    assert open_sound("out.mp4").seconds == pytest.approx(1.05, abs=0.1)


def refused(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err.splitlines()[-1]), err
    assert not list(Path().glob("*.mp4*")) and not re.search("^load ", err, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_optimised_program_makes_it_too(talk: list[str], programs_agree: Callable[[list[str]], None]) -> None:
    programs_agree([*talk, "--num_clip", "1"])


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["--audio", "none.wav"], "--audio 'none.wav': there is no such file"),
        (["--audio", "face.png"], "--audio 'face.png' cannot be read as sound: it holds no sound"),
        (["--audio", "empty.wav"], "--audio 'empty.wav' cannot be read as sound"),
        (["--audio", "zero.wav"], "--audio 'zero.wav' lasts 0.000 s"),
        (["--image", "speech.wav"], "--image 'speech.wav' is no picture"),
        (["--pose_video", "speech.wav"], "--pose_video .*speech.wav' cannot be read as a video: it holds no picture"),
        (["--infer_frames", "10"], "--infer_frames 10: it must be a multiple of 4"),
        (["--infer_frames", "0"], "--infer_frames 0: it must be a multiple of 4"),
        (["--num_clip", "0"], "--num_clip 0: give a number of clips"),
        (["--fps", "24"], "--fps 24: lips follow the sound at 16"),
        (["--duration", "2"], "--duration: s2v-14B lasts as long as the speech"),
        (["--tts_text", "hello"], "--tts_text has no use without --enable_tts"),
        (["--enable_tts"], "--audio and --enable_tts are both the speech"),
        (["--first_frame", "face.png"], "--first_frame: s2v-14B has no use for it"),
    ],
)
def test_faults_are_told_before_a_weight_is_read(added: list[str], message: str, talk: list[str], capsys: Any) -> None:
    Path("empty.wav").write_bytes(b"")
    record("zero.wav", torch.zeros(0))
    refused(changed(talk, *added), message, capsys)


def test_what_is_missing_is_named(talk: list[str], speech_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    refused(without(talk, "--audio"), "--audio is missing: s2v-14B needs the speech", capsys)
    refused(without(talk, "--image"), "--image is missing: s2v-14B makes a picture speak", capsys)
    voice = ["--enable_tts", "--tts_text", "hi"]
    refused([*without(talk, "--audio"), *voice], "--enable_tts needs --tts_prompt_audio, --tts_prompt_text", capsys)
    voice += ["--tts_prompt_audio", "speech.wav", "--tts_prompt_text", "la"]
    refused([*without(talk, "--audio"), *voice], "needs CosyVoice 2, which is not installed", capsys)
    shutil.copytree(speech_checkpoint, "incomplete")
    shutil.rmtree("incomplete/wav2vec2-large-xlsr-53-english")
    lacks = "lacks what s2v-14B needs: wav2vec2-large-xlsr-53-english/config.json"
    refused(changed(talk, "--ckpt_dir", "incomplete"), lacks, capsys)


def test_stereo_sounds_and_portraits_work(talk: list[str]) -> None:
    Image.new("RGB", (64, 130), "red").save("tall.png")
    record("stereo.wav", torch.stack([tone(0.4), 0 * tone(0.4)]))
    given = changed(talk, "--image", "tall.png", "--audio", "stereo.wav", "--size", "128*64", "--sample_steps", "1")
    assert main([*given, "--save_file", "tall.mp4"]) == 0
    assert verify_video("tall.mp4")[:3] == (5, 64, 128)
