"""Speech to video: which clips are made, what each is made from, and the whole of it on a tiny checkpoint."""

from __future__ import annotations

import math
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan
from wan.conditioning.speech import PoseVideo, reference_pixels, speech_size
from wan.conditioning.video import open_video
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint, BadRequest, MissingPackage
from wan.engine.types import Encoders, Request, Shot, Tiling
from wan.families.s2v import SpeechInputs, clip_prefix, length, next_clip, speech_branches
from wan.runs import Run
from wan.video import Output, VideoSink

CONFIG = WAN_CONFIGS["s2v-14B"]
TALK: dict[str, Any] = {"max_area": 64 * 64, "infer_frames": 8, "sampling_steps": 2, "seed": 5, "shift": 3.0}


@pytest.fixture
def config(tiny_config: Any) -> Any:
    for name in ("low_noise_checkpoint", "high_noise_checkpoint", "boundary"):
        tiny_config.pop(name, None)
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 3, "audio_inject_layers": (0, 2), "audio_dim": 20}
    tiny_config.update({name: CONFIG[name] for name in ("motion_frames", "drop_first_motion", "wav2vec")} | sizes)
    return tiny_config


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    image = Image.linear_gradient("L").resize((90, 80)).convert("RGB")
    image.save(tmp_path / "face.png")
    return tmp_path / "face.png"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Just over a second: 17 frames, three clips of eight."""
    samples = 0.5 * torch.sin(torch.arange(int(16000 * 1.05)) * (2 * math.pi * 220 / 16000))
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((samples * 32767).short().numpy().tobytes())
    return tmp_path / "speech.wav"


def talk(pipe: wan.WanS2V, picture: Path, speech: Path, **changes: Any) -> Tensor:
    video = pipe.generate("hello", picture, speech, False, None, None, None, **(TALK | {"num_repeat": None} | changes))
    assert video is not None
    return video


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_are_upstreams() -> None:
    assert speech_size(1280, 720, 1024 * 704) == (1088, 640)
    assert speech_size(100, 60, 1024 * 704) == (128, 64)  # smaller pictures are not made larger than the grid asks
    assert speech_size(704, 1024, 1024 * 704) == (704, 1024)
    for width, height in ((3000, 500), (500, 3000), (1001, 999)):
        across, down = speech_size(width, height, 832 * 480)
        assert across % 64 == down % 64 == 0 and across * down <= 832 * 480
        assert (across > down) == (width > height) or across == down
    with pytest.raises(BadRequest, match="fits no video of 4000 pixels"):
        speech_size(500, 500, 4000)


def test_the_reference_is_covered_by_the_picture_without_distortion() -> None:
    from PIL import Image

    wide = Image.new("RGB", (400, 100), "red")
    wide.paste("blue", (150, 0, 250, 100))  # the middle square
    pixels = reference_pixels(wide, 64, 64)
    assert pixels.shape == (3, 1, 64, 64)
    assert pixels[:, 0, :, 4:60].flatten(1).unique(dim=1).flatten().tolist() == [-1, -1, 1]


# ---- clips -----------------------------------------------------------------------------------------------------------


def inputs(**changes: Any) -> SpeechInputs:
    reference = torch.full((3, 1, 64, 128), 0.25)
    return SpeechInputs(**({"reference": reference, "audio": torch.zeros(1, 25, 20, 240), "clips": 3} | changes))


def request(given: SpeechInputs, num_frames: int = 10**6) -> Request:
    return Request(
        task="s2v", prompt="p", negative_prompt="n", height=64, width=128, num_frames=num_frames, steps=2, shift=3.0,
        solver="unipc", guide_scale=(4.5, 4.5), seed=7, inputs=given,
    )  # fmt: skip


def clip(asked: Request, index: int, carry: Tensor | None = None) -> Shot:
    shot = next_clip(asked, CONFIG, index, carry)
    assert shot is not None
    return shot


def test_the_first_clip_is_made_from_nothing_and_loses_what_has_not_settled() -> None:
    first = clip(request(inputs()), 0)
    assert first.latent_shape == (16, 20, 8, 16) and first.reseed == 7
    assert first.before is None and first.trim == slice(4, 81) and first.carry_frames == 73


def test_later_clips_go_on_from_the_last_frames() -> None:
    asked, carry = request(inputs()), torch.ones(3, 73, 64, 128)
    second = clip(asked, 1, carry)
    assert second.reseed == 8 and second.trim == slice(73, 153) and second.index == 1
    assert second.before is not None and torch.equal(second.before, carry)
    assert next_clip(asked, CONFIG, 3, carry) is None
    short = clip(request(inputs(clip_frames=8)), 1, carry[:, :5]).before  # fewer frames than are looked back on
    assert short is not None and short.shape[1] == 73 and short[0, :, 0, 0].tolist() == [0] * 68 + [1] * 5


def test_starting_from_the_reference_shows_it_and_keeps_every_frame() -> None:
    first = clip(request(inputs(start_from_ref=True)), 0)
    assert first.trim == slice(73, 153) and first.before is not None
    assert first.before[0, :, 0, 0].tolist() == [0] * 67 + [0.25] * 6
    assert [length(CONFIG, 2, 80, from_ref) for from_ref in (False, True)] == [157, 160]


def test_frames_beyond_those_asked_for_are_not_made() -> None:
    carry = torch.ones(3, 73, 64, 128)
    assert clip(request(inputs(), 40), 0).trim == slice(4, 44)
    assert next_clip(request(inputs(), 77), CONFIG, 1, carry) is None
    assert clip(request(inputs(), 78), 1, carry).trim == slice(73, 74)


class Vae(nn.Module):
    """Latents that tell what they were made of: the mean of the frames of each latent, in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, video: Tensor, tiling: Tiling | None = None) -> Tensor:
        groups = [video[:, :, :1], *(video[:, :, at : at + 4] for at in range(1, video.shape[2], 4))]
        means = torch.stack([group.mean((1, 2)) for group in groups], 1)
        return nn.functional.avg_pool2d(means, 8)[:, None].expand(-1, 16, -1, -1, -1)


def branches(shot: Shot, asked: Request) -> Any:
    @contextmanager
    def use(name: str) -> Iterator[nn.Module]:
        yield Vae()

    encoders = Encoders(use=use, where=lambda name: torch.device("cpu"), device=torch.device("cpu"), config=CONFIG)
    encoders.memo["text"] = torch.stack([torch.zeros(4, 8), torch.ones(4, 8)])
    shot = Shot(**(vars(shot) | {"prefix": clip_prefix(asked, shot, encoders)}))
    return shot, speech_branches(asked, shot, encoders)


@torch.no_grad()
def test_a_clip_hears_its_part_and_the_unconditional_branch_nothing() -> None:
    audio = torch.arange(240.0).expand(1, 25, 20, 240)
    asked = request(inputs(audio=audio))
    shot, made = branches(clip(asked, 1, torch.full((3, 73, 64, 128), 0.5)), asked)
    assert torch.equal(made["cond"].audio, audio[..., 80:160])
    assert not made["uncond"].audio.any() and made["uncond"].context.sum() == 0 != made["cond"].context.sum()
    assert made["cond"].motion is shot.prefix and made["cond"].motion.shape == (1, 16, 19, 8, 16)
    assert made["cond"].motion.unique().tolist() == [0.5] and made["cond"].reference.unique().tolist() == [0.25]
    first, start = branches(clip(asked, 0), asked)
    assert start["cond"].motion is None and start["cond"].pose is None
    assert torch.equal(first.prefix, start["cond"].reference)


@torch.no_grad()
def test_poses_are_taken_at_the_rate_of_the_video_and_blank_beyond_the_end(tmp_path: Path) -> None:
    with VideoSink(Output(tmp_path / "pose.mp4", fps=32, crf=0)) as sink:  # ten frames, every second of which is seen
        for level in range(10):
            sink.write(torch.full((3, 1, 32, 64), level / 5 - 0.9))
    pose = PoseVideo(source=open_video(tmp_path / "pose.mp4", "--pose_video"), fps=16)
    seen = pose.clip(1, 6, 64, 128)
    expected = [2 / 5 - 0.9, 4 / 5 - 0.9, 6 / 5 - 0.9, 8 / 5 - 0.9, -1, -1]
    assert seen.shape == (3, 6, 64, 128)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.tensor(expected), rtol=0, atol=0.02)
    asked = request(inputs(pose=pose, clip_frames=8, audio=torch.zeros(1, 25, 20, 24)))
    shot, made = branches(clip(asked, 0), asked)
    latents = made["cond"].pose
    assert latents.shape == (1, 16, 2, 8, 16) == (1, *shot.latent_shape)
    torch.testing.assert_close(
        latents[0, 0, :, 0, 0], torch.tensor([(-0.9 - 0.5 - 0.1 + 0.3) / 4, (0.7 - 3) / 4]), rtol=0, atol=0.02
    )


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_picture_speaks_clip_after_clip(speech_checkpoint: Path, config: Any, picture: Path, speech: Path) -> None:
    pipe = wan.WanS2V(config, speech_checkpoint, device="cpu")
    video = talk(pipe, picture, speech)
    assert video.shape == (3, 3 * 8 - 3, 64, 64) and torch.isfinite(video).all()
    assert torch.equal(talk(pipe, picture, speech, num_repeat=1), video[:, :5])
    assert torch.equal(talk(pipe, picture, speech, num_repeat=1, lockstep_cfg=True), video[:, :5])
    assert torch.equal(talk(pipe, picture, speech, frame_num=12), video[:, :12])
    started = talk(pipe, picture, speech, num_repeat=1, init_first_frame=True)
    assert started.shape[1] == 8
    assert pipe.noise_model is pipe.model


def test_another_sound_makes_another_video(speech_checkpoint: Path, config: Any, picture: Path, speech: Path) -> None:
    pipe = wan.WanS2V(config, speech_checkpoint, device="cpu")
    video = talk(pipe, picture, speech, num_repeat=1)
    with wave.open(str(speech), "rb") as file:
        raw = file.readframes(file.getnframes())
    with wave.open(str(speech), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(raw[::-1][1:-1])
    assert not torch.equal(talk(pipe, picture, speech, num_repeat=1), video)


def test_kept_latents_of_every_clip_give_the_same_video(
    speech_checkpoint: Path, config: Any, picture: Path, speech: Path, tmp_path: Path
) -> None:
    pipe = wan.WanS2V(config, speech_checkpoint, device="cpu")
    keeper = Run(tmp_path / "video.run", {}, every=0)
    keeper.begin()
    video = talk(pipe, picture, speech, num_repeat=2, keeper=keeper)
    steps: list[Any] = []
    again = talk(
        pipe, picture, speech, num_repeat=2, keeper=keeper, observe=(lambda step, latents: steps.append(step),)
    )
    assert torch.equal(again, video) and not steps
    keeper.close()


def test_random_weights_need_no_speech_model(config: Any, picture: Path, speech: Path) -> None:
    config.update(
        t5_sizes={"vocab_size": 320, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 2, "num_layers": 1}
    )
    config.update(vae_sizes={"encoder_dim": 8, "decoder_dim": 8, "num_res_blocks": 1}, audio_dim=1024)
    pipe = wan.WanS2V(config, None, device="cpu", load_format="dummy")
    assert talk(pipe, picture, speech, num_repeat=1, sampling_steps=1).shape == (3, 5, 64, 64)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_said_is_refused_before_a_weight_is_read(
    speech_checkpoint: Path, config: Any, picture: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = wan.WanS2V(config, speech_checkpoint, device="cpu")
    monkeypatch.setattr(pipe.engine, "network", None)
    for changes, error, message in (
        ({"infer_frames": 10}, BadRequest, "--infer_frames 10: it must be a multiple of 4"),
        ({"pose_video": speech}, BadRequest, "--pose_video .* cannot be read as a video"),
        ({"max_area": 1000}, BadRequest, "fits no video of 1000 pixels"),
    ):
        with pytest.raises(error, match=message):
            talk(pipe, picture, speech, **changes)
    with pytest.raises(BadRequest, match="--image .*: there is no such file"):
        talk(pipe, picture.with_name("none.png"), speech)
    with pytest.raises(BadRequest, match="--audio .* cannot be read as sound"):
        talk(pipe, picture, picture)
    with pytest.raises(BadRequest, match="audio_path is missing"):
        pipe.generate("hello", picture, None, False, None, None, None, **TALK)
    config.wav2vec = "elsewhere"
    with pytest.raises(BadCheckpoint, match=r"elsewhere' lacks config.json, preprocessor_config.json"):
        talk(wan.WanS2V(config, speech_checkpoint, device="cpu"), picture, speech)


def test_text_is_spoken_by_cosyvoice_where_it_is_installed(
    speech_checkpoint: Path, config: Any, picture: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = wan.WanS2V(config, speech_checkpoint, device="cpu")
    monkeypatch.chdir(tmp_path)

    def said() -> Tensor | None:
        return pipe.generate("hello", picture, None, True, speech, "what it says", "say this", **TALK)

    with pytest.raises(BadRequest, match="--enable_tts needs --tts_text"):
        pipe.generate("hello", picture, None, True, speech, "what it says", None, **TALK)
    with pytest.raises(MissingPackage, match="needs CosyVoice 2, which is not installed"):
        said()
    asked: list[Any] = []

    class CosyVoice2:
        sample_rate = 24000

        def __init__(self, folder: str) -> None:
            asked.append(folder)

        def inference_zero_shot(self, *given: Any, stream: bool) -> list[dict[str, Tensor]]:
            asked.append(given)
            return [{"tts_speech": torch.zeros(1, 4000)}, {"tts_speech": torch.ones(1, 2000) / 2}]

    for name in ("cosyvoice", "cosyvoice.cli", "cosyvoice.cli.cosyvoice"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["cosyvoice"].__spec__ = sys.__spec__
    sys.modules["cosyvoice.cli.cosyvoice"].CosyVoice2 = CosyVoice2  # type: ignore[attr-defined]
    with pytest.raises(BadRequest, match="no CosyVoice2-0.5B in"):
        said()
    (tmp_path / "pretrained_models" / "CosyVoice2-0.5B").mkdir(parents=True)
    video = said()
    assert video is not None and video.shape[1] == 5
    assert asked[0] == str(Path("pretrained_models/CosyVoice2-0.5B")) and asked[1][:2] == ("say this", "what it says")
    assert asked[1][2].shape == (1, int(16000 * 1.05))
    with wave.open("tts.wav", "rb") as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 6000)
