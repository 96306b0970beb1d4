"""Animate, end to end on a tiny checkpoint in the published layout: both modes, clip after clip, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import wan
from wan.animate import WanAnimate
from wan.cli.generate import main
from wan.components import dummy_components
from wan.conditioning.character import letterboxed, open_sources, there_and_back
from wan.conditioning.video import open_video, read_frames
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.modules.animate import WanAnimateModel
from wan.modules.clip import CLIPModel, ImageTower
from wan.modules.t5 import T5Encoder, T5EncoderModel
from wan.modules.vae import WanVAE, WanVAEModel
from wan.modules.vae_config import VAEConfig
from wan.video import verify_video
from wan.video.ffmpeg import ffmpeg_exe

TASK = "animate-14B"
SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2}
FACE = 16
WIDTH, HEIGHT, FRAMES, CLIP = 32, 16, 8, 5  # two clips, the second of them longer than what is left


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Random weights in upstream's folder, the relighting LoRA among them."""
    folder = tmp_path_factory.mktemp("animate") / "Tiny-Animate-14B"
    shutil.copytree(root / "tests" / "wan" / "data" / "umt5-tiny", folder / "google" / "umt5-xxl")
    config = WAN_CONFIGS[TASK]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5Encoder(320, 32, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False)
        torch.save(encoder.state_dict(), folder / config.t5_checkpoint)
        vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
        torch.save(vae.state_dict(), folder / config.vae_checkpoint)
        clip = {"image_size": 28, "patch_size": 7, "dim": 80, "mlp_dim": 64, "out_dim": 8, "num_heads": 1}
        torch.save(ImageTower(**clip, num_layers=3).state_dict(), folder / config.clip_checkpoint)
        dit = WanAnimateModel(
            text_dim=32, text_len=32, image_dim=80, motion_encoder_dim=24, motion_widths=(8, 12, 20), motion_dim=6,
            face_dim=16, face_every=1, **SIZES,
        )  # fmt: skip
        for key, value in dit.named_parameters():
            if "norm" not in key and ".proj.0" not in key and ".proj.4" not in key:
                nn.init.normal_(value, std=1.0 if "motion_encoder" in key else 0.1)
        dit.save_pretrained(folder)
        layers = {"blocks.0.self_attn.q": (48, 48), "blocks.1.ffn.0": (64, 48)}
        lora = {f"{k}.lora_{s}.weight": torch.randn(*n) * 0.3 for k, (o, i) in layers.items()
                for s, n in (("A", (4, i)), ("B", (o, 4)))}  # fmt: skip
        torch.save({"state_dict": lora}, folder / config.lora_checkpoint)
    return folder


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The task's configuration, of the sizes of `checkpoint`."""
    config = EasyDict(WAN_CONFIGS[TASK])
    config.update(SIZES, text_len=32, face_size=FACE, clip_dtype=torch.float32, param_dtype=torch.float32)
    config.update(t5_dtype=torch.float32, sample_neg_prompt="blurry")
    monkeypatch.setitem(WAN_CONFIGS, TASK, config)
    return config


def film(path: Path, frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> Tensor:
    """Writes a lossless .mp4 of noise and gives its pixels [T, H, W, 3]."""
    pixels = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8)
    command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", "30"]
    command += ["-s", f"{width}x{height}", "-i", "-", "-c:v", "libx264rgb", "-qp", "0", str(path)]
    subprocess.run(command, input=pixels.numpy().tobytes(), check=True)
    return pixels


Pixels = dict[str, Tensor]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pixels]:
    """A folder as the preprocessing makes it, and the pixels of its videos."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    pixels = {name: film(folder / f"src_{name}.mp4") for name in ("pose", "bg", "mask")}
    pixels["face"] = film(folder / "src_face.mp4", width=FACE, height=FACE)
    Image.fromarray(torch.randint(0, 256, (24, 20, 3), dtype=torch.uint8).numpy()).save(folder / "src_ref.png")
    return folder, pixels


@pytest.fixture
def sources(shelf: tuple[Path, Pixels], tmp_path: Path) -> Path:
    """A copy of it, free to change."""
    return Path(shutil.copytree(shelf[0], tmp_path / "sources"))


# The numbers ---------------------------------------------------------------------------------------------------------


class ByHand:
    """Upstream's pipeline, written out, on upstream's classes."""

    def __init__(self, folder: Path, config: Any, root: Path, pixels: Pixels) -> None:
        place = folder / config.t5_checkpoint, folder / "google" / "umt5-xxl"
        text = T5EncoderModel(32, torch.float32, "cpu", *place)
        self.context, self.negative = (text([prompt], "cpu") for prompt in ("a dance", "blurry"))
        self.vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device="cpu")
        self.model = WanAnimateModel.from_pretrained(folder)
        image = letterboxed(Image.open(root / "src_ref.png"), WIDTH, HEIGHT)
        self.clip_fea = CLIPModel(torch.float32, "cpu", folder / config.clip_checkpoint).visual([image[:, None]])
        self.reference = torch.cat([torch.ones(4, 1, 2, 4), self.vae.encode([image[:, None]])[0]])
        # Frames 0..7 and, played back, 6: two clips of 5 with one frame in common.
        self.videos = {name: torch.cat([video, video[6:7]]) for name, video in pixels.items()}

    def clip(self, name: str, start: int) -> Tensor:
        return self.videos[name][start : start + CLIP].permute(3, 0, 1, 2).float() / 127.5 - 1

    def y(self, start: int, before: Tensor | None, replace: bool) -> Tensor:
        video, given = torch.zeros(3, CLIP, HEIGHT, WIDTH), torch.zeros(CLIP, 2, 4)
        if replace:
            video, mask = self.clip("bg", start), self.videos["mask"][start : start + CLIP, :, :, 0].float() / 255
            given = 1 - F.interpolate(mask[None], size=(2, 4), mode="nearest")[0]
        if before is not None:
            video[:, :1], given[:1] = before, 1
        mask = torch.stack([torch.stack([given[0]] * 4), given[1:]], dim=1)
        return torch.cat([self.reference, torch.cat([mask, self.vae.encode([video])[0]])], dim=1)

    def run(self, *, replace: bool, scale: float) -> tuple[list[Tensor], Tensor]:
        """(latents of each clip, the video) after two steps."""
        from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

        generator = torch.Generator().manual_seed(3)
        latents, frames, before = [], [], None
        for start in (0, 4):
            scheduler = FlowUniPCMultistepScheduler(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
            scheduler.set_timesteps(2, device="cpu", shift=5.0)
            face, pose = self.clip("face", start), self.vae.encode([self.clip("pose", start)])
            shared = {"clip_fea": self.clip_fea, "seq_len": 1000, "y": [self.y(start, before, replace)]}
            x = torch.randn(16, 3, 2, 4, generator=generator)
            for t in scheduler.timesteps:
                branches = ((self.context, face), (self.negative, torch.full_like(face, -1)))
                cond, uncond = (
                    self.model([x], t[None], context=text, pose_latents=pose, face_pixel_values=seen[None], **shared)[0]
                    for text, seen in branches
                )
                x = scheduler.step((uncond + scale * (cond - uncond))[None], t, x[None], return_dict=False)[0][0]
            video = self.vae.decode([x[:, 1:]])[0][:, 1 if start else 0 :]
            latents.append(x)
            frames.append(video)
            before = video[:, -1:]
        return latents, torch.cat(frames, dim=1)[:, :FRAMES]


@pytest.mark.parametrize(("replace", "scale"), [(False, 1.0), (False, 2.5), (True, 1.0)])
@torch.no_grad()
def test_clips_are_those_of_upstreams_pipeline_written_out(
    replace: bool, scale: float, checkpoint: Path, config: Any, shelf: tuple[Path, Pixels]
) -> None:
    expected, frames = ByHand(checkpoint, config, *shelf).run(replace=replace, scale=scale)
    seen: list[Tensor] = []
    pipe = WanAnimate(config, str(checkpoint), device="cpu")
    video = pipe.generate(
        shelf[0], replace, CLIP, 1, sample_solver="unipc", sampling_steps=2, guide_scale=scale, input_prompt="a dance",
        seed=3, observe=(lambda step, latents: seen.append(latents[0]),),
    )  # fmt: skip
    assert video.shape == (3, FRAMES, HEIGHT, WIDTH)
    for mine, theirs in zip(seen[1::2], expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-5
    assert (video - frames).abs().max() < 1e-4


@torch.no_grad()
def test_upstreams_defaults_run_and_its_attributes_are_there(checkpoint: Path, config: Any, sources: Path) -> None:
    pipe = wan.WanAnimate(config, str(checkpoint), device="cpu")
    video = pipe.generate(str(sources), sampling_steps=1, clip_len=CLIP)  # dpm++, guidance 1, a drawn seed
    assert video.shape == (3, FRAMES, HEIGHT, WIDTH) and video.isfinite().all()
    assert pipe.noise_model is pipe.model and isinstance(pipe.model, WanAnimateModel)
    assert pipe.clip.visual([torch.zeros(3, 1, 28, 28)]).shape == (1, 17, 80)


@torch.no_grad()
def test_what_serves_all_steps_or_all_clips_is_computed_once(checkpoint: Path, config: Any, sources: Path) -> None:
    pipe = wan.WanAnimate(config, str(checkpoint), device="cpu")
    faces: list[int] = []
    looks: list[int] = []
    pipe.model.motion_encoder.register_forward_hook(lambda module, inputs, out: faces.append(len(out)))
    pipe.engine.network("clip").visual.register_forward_hook(lambda module, inputs, out: looks.append(1))
    pipe.generate(sources, clip_len=CLIP, sampling_steps=3)
    assert faces == [CLIP, CLIP], "one pass of the motion encoder for the three steps of each clip"
    assert looks == [1], "the picture is looked at once for both clips"


@torch.no_grad()
def test_branches_that_take_turns_at_each_block_make_the_same_video(
    checkpoint: Path, config: Any, sources: Path
) -> None:
    pipe = wan.WanAnimate(config, str(checkpoint), device="cpu")
    options: dict[str, Any] = {"clip_len": CLIP, "sampling_steps": 1, "seed": 5, "guide_scale": 2.5}
    assert torch.equal(pipe.generate(sources, **options, lockstep_cfg=True), pipe.generate(sources, **options))


class FirstClip:
    """A keeper that has the first clip's latents from an earlier run."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def finished(self, shot: int) -> Tensor | None:
        return self.latents if shot == 0 else None

    def restore(self, run: Any) -> None: ...

    def stepped(self, run: Any, resumable: bool) -> None: ...

    def denoised(self, run: Any) -> None: ...


@torch.no_grad()
def test_a_run_that_goes_on_after_its_first_clip_gives_the_same_video(
    checkpoint: Path, config: Any, sources: Path
) -> None:
    """The second clip's noise comes after the first's in the same stream, also where that is only decoded."""
    pipe = wan.WanAnimate(config, str(checkpoint), device="cpu")
    seen: list[Tensor] = []
    options: dict[str, Any] = {"clip_len": CLIP, "sampling_steps": 1, "seed": 5}
    whole = pipe.generate(sources, **options, observe=(lambda step, latents: seen.append(latents),))
    assert len(seen) == 2 and not torch.equal(*seen)
    assert torch.equal(whole, pipe.generate(sources, **options, keeper=FirstClip(seen[0])))


def test_random_weights_have_the_published_shape() -> None:
    parts = {component.name: component for component in dummy_components(WAN_CONFIGS[TASK])}
    assert set(parts) == {"dit", "text_encoder", "vae", "clip"}
    dit = parts["dit"].build()
    assert isinstance(dit, WanAnimateModel) and len(dit.state_dict()) == 1441
    assert dit.face_size == WAN_CONFIGS[TASK].face_size


@torch.no_grad()
def test_a_video_of_one_frame_and_five_frames_in_common(checkpoint: Path, config: Any, sources: Path) -> None:
    film(sources / "src_pose.mp4", frames=1)
    film(sources / "src_face.mp4", frames=1, width=FACE, height=FACE)
    pipe = wan.WanAnimate(config, str(checkpoint), device="cpu")
    assert pipe.generate(sources, clip_len=CLIP, sampling_steps=1).shape == (3, 1, HEIGHT, WIDTH)
    film(sources / "src_pose.mp4", frames=12)
    film(sources / "src_face.mp4", frames=12, width=FACE, height=FACE)
    assert pipe.generate(sources, clip_len=9, refert_num=5, sampling_steps=1).shape == (3, 12, HEIGHT, WIDTH)


@torch.no_grad()
def test_relighting_lora_is_merged_and_goes_with_others(
    checkpoint: Path, config: Any, sources: Path, tmp_path: Path
) -> None:
    plain = wan.WanAnimate(config, str(checkpoint), device="cpu").model.state_dict()
    state = torch.load(checkpoint / config.lora_checkpoint)["state_dict"]
    other = {"blocks.1.ffn.0.lora_A.weight": torch.randn(2, 48), "blocks.1.ffn.0.lora_B.weight": torch.randn(64, 2)}
    save_file(other, str(tmp_path / "other.safetensors"))
    for extra in ({}, {"lora": f"{tmp_path / 'other.safetensors'}:0.5"}):
        lit = wan.WanAnimate(config, str(checkpoint), device="cpu", use_relighting_lora=True, **extra)
        merged = lit.model.state_dict()
        for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
            expected = plain[f"{layer}.weight"] + state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            if extra and layer == "blocks.1.ffn.0":
                expected = expected + 0.5 * other[f"{layer}.lora_B.weight"] @ other[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(merged["blocks.0.self_attn.k.weight"], plain["blocks.0.self_attn.k.weight"])
    with pytest.raises(BadCheckpoint, match=r"--use_relighting_lora: .*relighting_lora.ckpt' does not exist"):
        wan.WanAnimate(config, str(tmp_path), device="cpu", use_relighting_lora=True)


# Sources -------------------------------------------------------------------------------------------------------------


def test_frames_play_there_and_back() -> None:
    assert there_and_back(4, 0, 10) == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert there_and_back(4, 5, 8) == [1, 0, 1]
    assert there_and_back(1, 0, 4) == [0, 0, 0, 0]
    assert there_and_back(2, 0, 4) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("size", "box"), [((10, 40), (12, 0, 8, 32)), ((40, 10), (0, 12, 32, 8)), ((5, 5), (0, 0, 32, 32))]
)
def test_the_picture_stands_whole_on_black(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    out = letterboxed(Image.new("RGB", size, "white"), 32, 32)
    inside = out[:, top : top + height, left : left + width]
    assert (inside == 1).all() and math.isclose(out.sum().item(), 3 * (2 * width * height - 32 * 32))


def replaced(path: Path, change: Callable[[Path], object]) -> None:
    path.unlink()
    change(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda s: shutil.rmtree(s), "is no folder; pass the one that Wan's preprocessing made"),
    "no files": (lambda s: [p.unlink() for p in s.iterdir()], "lacks src_pose.mp4, src_face.mp4, src_ref.png, src_bg"),
    "no mask": (lambda s: (s / "src_mask.mp4").unlink(), "lacks src_mask.mp4; to replace a person"),
    "text as a video": (lambda s: (s / "src_pose.mp4").write_text("no video"), "src_pose.mp4' cannot be read as a vid"),
    "text as a picture": (lambda s: (s / "src_ref.png").write_text("no"), "src_ref.png' is no picture"),
    "odd size": (lambda s: film(s / "src_pose.mp4", width=36), "is 36x16: both must be multiples of 16"),
    "wrong face": (lambda s: film(s / "src_face.mp4", width=32, height=32), "faces must be 16x16"),
    "wrong mask size": (lambda s: film(s / "src_mask.mp4", width=16), "src_mask.mp4' is 16x16 and src_pose.mp4 32x16"),
    "short background": (lambda s: film(s / "src_bg.mp4", frames=3), "src_bg.mp4' has 3 frames and src_pose.mp4 8"),
    "short face": (
        lambda s: film(s / "src_face.mp4", frames=3, width=FACE, height=FACE), "src_face.mp4' has 3 frames",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_by_name(fault: str, sources: Path) -> None:
    change, said = REFUSED[fault]
    change(sources)
    with pytest.raises(BadRequest) as caught:
        open_sources(sources, replace=True, face_size=FACE)
    assert said in str(caught.value) and "--src_root_path" in str(caught.value) and "\n" not in str(caught.value)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(checkpoint: Path, config: Any, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    argv = ["--task", TASK, "--ckpt_dir", str(checkpoint), "--src_root_path", "sources", "--frame_num", str(CLIP)]
    return [*argv, "--sample_steps", "1", "--seed", "1", "--device", "cpu", "--save_file", "out.mp4"]


def test_the_program_animates_replaces_and_repeats(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--replace_flag", "--use_relighting_lora"]) == 0
    found = verify_video("out.mp4")
    assert (found.frames, found.width, found.height, found.fps) == (FRAMES, WIDTH, HEIGHT, 30)
    record = json.loads(Path("out.mp4.json").read_text())
    assert record["flags"]["src_root_path"] == str(Path("sources").absolute())
    assert record["flags"]["replace_flag"] and record["flags"]["use_relighting_lora"]
    assert record["flags"]["frame_num"] == CLIP and record["flags"]["refert_num"] == 1
    assert record["flags"]["prompt"] == WAN_CONFIGS[TASK].prompt
    assert "lora 1" in record["weights"] and set(record["inputs"]) >= {"src_pose.mp4", "src_mask.mp4"}
    assert "32x16 (src_pose.mp4)" in capsys.readouterr().err
    assert main(["--from", "out.mp4", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    first, again = (next(read_frames(open_video(name, "--from"), [range(FRAMES)])) for name in ("out.mp4", "again.mp4"))
    assert torch.equal(first, again)


def test_the_task_is_told_by_the_checkpoint(command: list[str]) -> None:
    assert main(command[2:]) == 0
    assert json.loads(Path("out.mp4.json").read_text())["flags"]["task"] == TASK


def test_the_class_gets_upstreams_arguments(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, use_relighting_lora: bool = False, **arguments: Any) -> None:
            built.append({"use_relighting_lora": use_relighting_lora} | arguments)

        def generate(self, **arguments: Any) -> Tensor:
            calls.append(arguments)
            return torch.zeros(3, FRAMES, HEIGHT, WIDTH)

    monkeypatch.setitem(vars(wan), "WanAnimate", Recorder)
    assert main([*command, "--prompt", "she waves", "--use_relighting_lora", "--refert_num", "1"]) == 0
    assert built[0]["use_relighting_lora"] is True
    wanted = {"replace_flag": False, "clip_len": CLIP, "refert_num": 1, "input_prompt": "she waves", "shift": 5.0}
    assert wanted.items() <= calls[0].items() and calls[0]["src_root_path"] == str(Path("sources").absolute())
    assert (calls[0]["sample_solver"], calls[0]["sampling_steps"], calls[0]["guide_scale"]) == ("unipc", 1, 1.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--refert_num", "77"], "--refert_num 77: clips overlap by 1 frame or 5 here"),
        (["--frame_num", "5", "--refert_num", "5"], "--frame_num 5: a clip must be longer than the 5 frames"),
        (["--frame_num", "6"], "--frame_num: 6 frames: the count must be 4n+1"),
        (["--src_root_path", "nowhere"], "nowhere' is no folder"),
        (["--image", "sources/src_ref.png"], "--image: animate-14B has no use for it"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights(
    flags: list[str], said: str, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [token for pair in zip(command[::2], command[1::2], strict=True) if pair[0] not in flags for token in pair]
    monkeypatch.setitem(vars(wan), "WanAnimate", None)  # building it would fail otherwise
    assert main([*kept, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not Path("out.mp4").exists()


@pytest.mark.slow
def test_the_optimised_program_makes_it_too(command: list[str], programs_agree: Callable[[list[str]], None]) -> None:
    programs_agree(command)


def test_a_folder_without_its_parts_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path("sources") / "src_face.mp4").unlink()
    assert main(command) == 2
    assert "lacks src_face.mp4" in capsys.readouterr().err
    del command[command.index("--src_root_path") : command.index("--src_root_path") + 2]
    assert main(command) == 2
    assert "--src_root_path is missing" in capsys.readouterr().err
