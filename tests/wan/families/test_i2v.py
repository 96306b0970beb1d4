"""Image to video and first-last-frame to video, end to end on tiny checkpoints in the published layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wan
from wan.cli.generate import main
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.engine.weights.keymap import DIFFUSERS_DIT, TRANSFORMERS_CLIP
from wan.layouts import CheckpointFiles
from wan.modules.clip import CLIPModel, ImageTower
from wan.modules.model import WanModel
from wan.modules.t5 import T5Encoder, T5EncoderModel
from wan.modules.vae import WanVAE, WanVAEModel
from wan.modules.vae_config import VAEConfig
from wan.video import verify_video

SIZES = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2}
CLIP_SIZES = {
    "image_size": 28,
    "patch_size": 7,
    "dim": 80,
    "mlp_dim": 64,
    "out_dim": 8,
    "num_heads": 1,
    "num_layers": 3,
}
BRANCHES = {"i2v-14B": (80, 0), "flf2v-14B": (80, 34), "i2v-A14B": (0, 0)}
TASKS = tuple(BRANCHES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Path]:
    """Task -> a folder of random weights as it was published."""
    shared = tmp_path_factory.mktemp("shared")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5Encoder(320, 32, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False)
        torch.save(encoder.state_dict(), shared / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save(WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1)).state_dict(), shared / "vae")
        text = {"textual.head.0.weight": torch.zeros(2, 2), "log_scale": torch.zeros(())}
        torch.save(ImageTower(**CLIP_SIZES).state_dict() | text, shared / "clip")
        made = {}
        for task, (width, positions) in BRANCHES.items():
            made[task] = folder = tmp_path_factory.mktemp(task)
            shutil.copytree(root / "tests" / "wan" / "data" / "umt5-tiny", folder / "google" / "umt5-xxl")
            (folder / "models_t5_umt5-xxl-enc-bf16.pth").hardlink_to(shared / "models_t5_umt5-xxl-enc-bf16.pth")
            (folder / "Wan2.1_VAE.pth").hardlink_to(shared / "vae")
            if width:
                (folder / WAN_CONFIGS[task].clip_checkpoint).hardlink_to(shared / "clip")
            for name in ("high_noise_model", "low_noise_model") if task == "i2v-A14B" else ("",):
                kind = task.partition("-")[0]
                dit = WanModel(
                    kind, in_dim=36, text_dim=32, text_len=32, image_dim=width, image_positions=positions, **SIZES
                )
                for key, value in dit.named_parameters():
                    if "norm" not in key and ".proj.0" not in key and ".proj.4" not in key:
                        nn.init.normal_(value, std=0.1)
                dit.save_pretrained(folder / name)
    return made


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tasks' configurations, of the sizes of `checkpoints`."""
    made = {}
    for task in TASKS:
        made[task] = config = EasyDict(WAN_CONFIGS[task])
        config.update(SIZES, text_len=32, param_dtype=torch.float32, t5_dtype=torch.float32, sample_neg_prompt="blurry")
        if "clip_dtype" in config:
            config.clip_dtype = torch.float32
        monkeypatch.setitem(WAN_CONFIGS, task, config)
    return made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((width, height))


CLASSES = {"i2v-14B": "WanI2V", "i2v-A14B": "WanI2V", "flf2v-14B": "WanFLF2V"}


def pipeline(task: str, checkpoints: dict[str, Path], configs: dict[str, Any]) -> Any:
    return getattr(wan, CLASSES[task])(configs[task], str(checkpoints[task]), device="cpu")


# The numbers ---------------------------------------------------------------------------------------------------------


def by_hand(task: str, folder: Path, config: Any, pictures: list[Image.Image], num_frames: int) -> Tensor:
    """Upstream's pipeline, written out: the latents after two steps of 32x16 pixels at guidance 4."""
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

    text = T5EncoderModel(
        32, torch.float32, "cpu", folder / "models_t5_umt5-xxl-enc-bf16.pth", folder / "google" / "umt5-xxl"
    )
    context, negative = (text([prompt], "cpu") for prompt in ("a cat", "blurry"))
    raw = [torch.tensor(list(image.tobytes())).view(image.height, image.width, 3) for image in pictures]
    images = [pixels.permute(2, 0, 1).float() / 255 * 2 - 1 for pixels in raw]
    extra: dict[str, Any] = {}
    if "clip_checkpoint" in config:
        clip = CLIPModel(torch.float32, "cpu", folder / config.clip_checkpoint)
        extra["clip_fea"] = clip.visual([image[:, None] for image in images])
    small = [F.interpolate(image[None], size=(16, 32), mode="bicubic")[0] for image in images]
    video, mask = torch.zeros(3, num_frames, 16, 32), torch.zeros(1, num_frames, 2, 4)
    video[:, 0], mask[:, 0] = small[0], 1
    if len(small) > 1:
        video[:, -1], mask[:, -1] = small[1], 1
    mask = torch.cat([mask[:, :1].repeat(1, 4, 1, 1), mask[:, 1:]], 1).view(-1, 4, 2, 4).transpose(0, 1)
    y = torch.cat([mask, WanVAE(vae_pth=folder / "Wan2.1_VAE.pth", device="cpu").encode([video])[0]])
    scheduler = FlowUniPCMultistepScheduler(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
    scheduler.set_timesteps(2, device="cpu", shift=3.0)
    names = {"dit": ""} if "boundary" not in config else {"high": "high_noise_model", "low": "low_noise_model"}
    models = {name: WanModel.from_pretrained(folder, place) for name, place in names.items()}
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, (num_frames - 1) // 4 + 1, 2, 4, generator=generator)
    for t in scheduler.timesteps:
        expert = "dit" if len(models) == 1 else "high" if t >= config.boundary * 1000 else "low"
        inputs: dict[str, Any] = {"t": t[None], "seq_len": 1000, "y": [y], **extra}
        cond, uncond = (models[expert]([x], context=each, **inputs)[0] for each in (context, negative))
        x = scheduler.step((uncond + 4 * (cond - uncond))[None], t, x[None], return_dict=False)[0][0]
    return x


@pytest.mark.parametrize("num_frames", [5, 13])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_latents_are_those_of_upstreams_pipeline_written_out(
    task: str, num_frames: int, checkpoints: dict[str, Path], configs: dict[str, Any]
) -> None:
    pictures = [picture(64, 32), picture(64, 32, seed=1)][: 2 if task == "flf2v-14B" else 1]
    seen: list[Tensor] = []
    pipe = pipeline(task, checkpoints, configs)
    video = pipe.generate(
        "a cat", *pictures, max_area=32 * 16, frame_num=num_frames, shift=3.0, sampling_steps=2, guide_scale=4.0,
        seed=3, observe=(lambda step, latents: seen.append(latents),),
    )  # fmt: skip
    assert video.shape == (3, num_frames, 16, 32) and video.isfinite().all()
    expected = by_hand(task, checkpoints[task], configs[task], pictures, num_frames)
    assert (seen[-1][0] - expected).norm() / expected.norm() < 1e-5


def test_last_frame_guides_the_image_to_video_experts_of_2_2(
    checkpoints: dict[str, Path], configs: dict[str, Any]
) -> None:
    first, last = picture(64, 32), picture(48, 48, seed=1)  # of another size: it is scaled and cut
    task, settings = "i2v-A14B", {"max_area": 32 * 16, "frame_num": 5, "sampling_steps": 1, "seed": 3, "shift": 3.0}
    pipe = pipeline(task, checkpoints, configs)
    both = pipe.generate("a cat", first, last_frame=last, **settings)
    same = wan.WanFLF2V(configs[task], str(checkpoints[task]), device="cpu").generate(
        "a cat", first, last, guide_scale=5.0, **settings
    )
    assert torch.equal(both, same)
    assert not torch.equal(both, pipe.generate("a cat", first, **settings))
    assert not torch.equal(both, pipe.generate("a cat", first, last_frame=first, **settings))


def test_size_to_the_pixel_shows_clip_what_the_video_shows(
    checkpoints: dict[str, Path], configs: dict[str, Any]
) -> None:
    pipe = pipeline("i2v-14B", checkpoints, configs)
    settings: dict[str, Any] = {"frame_num": 5, "sampling_steps": 1, "seed": 3}
    image = picture(64, 64)
    cut = pipe.generate("a cat", image, size=(32, 16), fit="crop", **settings)
    assert cut.shape == (3, 5, 16, 32)
    assert torch.equal(cut, pipe.generate("a cat", image.crop((0, 16, 64, 48)), size=(32, 16), fit="crop", **settings))
    padded = pipe.generate("a cat", image, size=(32, 16), fit="pad", **settings)
    assert padded.shape == cut.shape and not torch.equal(padded, cut)


def test_attributes_users_touch(checkpoints: dict[str, Path], configs: dict[str, Any]) -> None:
    pipe = pipeline("flf2v-14B", checkpoints, configs)
    assert pipe.clip.visual([torch.zeros(3, 1, 8, 8)]).shape == (1, 17, 80)
    replaced = ImageTower(**CLIP_SIZES)
    pipe.clip = CLIPModel.of(replaced)
    assert pipe.clip.model is replaced
    assert "img_emb.emb_pos" in pipe.model.state_dict()


# What the class refuses ----------------------------------------------------------------------------------------------


def test_class_refuses_what_cannot_be_made(checkpoints: dict[str, Path], configs: dict[str, Any]) -> None:
    pipe = pipeline("i2v-14B", checkpoints, configs)
    with pytest.raises(BadRequest, match="was trained with one picture; for a last frame use flf2v-14B or i2v-A14B"):
        pipe.generate("a cat", picture(32, 16), last_frame=picture(32, 16))
    with pytest.raises(BadRequest, match="1 frames between a first and a last one: at least 5"):
        pipeline("flf2v-14B", checkpoints, configs).generate("x", picture(32, 16), picture(32, 16), frame_num=1)
    with pytest.raises(BadRequest, match=r"fit='crop' fits the picture into size=\(width, height\), which is missing"):
        pipe.generate("a cat", picture(32, 16), fit="crop")
    with pytest.raises(BadRequest, match="multiples of 16; the nearest is 32x16"):
        pipe.generate("a cat", picture(32, 16), size=(30, 16), fit="crop")


def test_checkpoint_of_another_kind_and_missing_clip_are_refused(
    checkpoints: dict[str, Path], configs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadCheckpoint, match=r"is a transformer for flf2v; .* needs one for i2v"):
        wan.WanI2V(configs["i2v-14B"], checkpoints["flf2v-14B"], device="cpu")
    folder = tmp_path / "half"
    shutil.copytree(checkpoints["i2v-14B"], folder)
    (folder / configs["i2v-14B"].clip_checkpoint).unlink()
    with pytest.raises(BadCheckpoint, match=r"lacks models_clip_open-clip-xlm-roberta-large-vit-huge-14\.pth"):
        wan.WanI2V(configs["i2v-14B"], folder, device="cpu")
    torch.save(ImageTower(**(CLIP_SIZES | {"dim": 160})).state_dict(), folder / configs["i2v-14B"].clip_checkpoint)
    with pytest.raises(BadCheckpoint, match="works on image embeddings of width 80, .* makes them 160 wide"):
        wan.WanI2V(configs["i2v-14B"], folder, device="cpu")


# generate.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    checkpoints: dict[str, Path], configs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs generate.py with a few flags for a task, in an empty folder with pictures."""
    monkeypatch.chdir(tmp_path)
    picture(64, 32).save("wide.png")
    picture(32, 64, seed=1).save("tall.png")
    Path("text.png").write_text("no picture")

    def start(task: str, *flags: str) -> int:
        small = ["--sample_steps", "1", "--any_size", "--seed", "1", "--device", "cpu"]
        small += [] if "--save_file" in flags else ["--save_file", "out.mp4"]
        size = [] if "--size" in flags else ["--size", "32x16"]
        frames = [] if "--frame_num" in flags else ["--frame_num", "5"]
        return main(["--task", task, "--ckpt_dir", str(checkpoints[task]), *small, *size, *frames, *flags])

    return start


@pytest.mark.parametrize(
    ("task", "flags", "size"),
    [
        ("i2v-14B", ["--image", "wide.png"], (32, 16)),
        ("i2v-14B", ["--image", "tall.png"], (16, 32)),
        ("i2v-14B", ["--image", "tall.png", "--fit", "crop", "--frame_num", "9"], (32, 16)),
        ("i2v-A14B", ["--image", "tall.png", "--fit", "pad"], (32, 16)),
        ("i2v-A14B", ["--image", "wide.png", "--size", "64x64"], (80, 32)),
        ("i2v-A14B", ["--image", "wide.png", "--last_frame", "tall.png"], (32, 16)),
        ("i2v-A14B", ["--first_frame", "tall.png", "--last_frame", "wide.png"], (16, 32)),
        ("flf2v-14B", ["--first_frame", "wide.png", "--last_frame", "tall.png"], (32, 16)),
        ("flf2v-14B", ["--first_frame", "tall.png", "--last_frame", "wide.png", "--frame_num", "33"], (16, 32)),
        ("flf2v-14B", ["--first_frame", "tall.png", "--last_frame", "wide.png", "--fit", "stretch"], (32, 16)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_program_makes_a_video_of_the_right_size(
    run: Callable[..., int], task: str, flags: list[str], size: tuple[int, int]
) -> None:
    assert run(task, *flags) == 0
    found = verify_video("out.mp4")
    frames = int(flags[flags.index("--frame_num") + 1]) if "--frame_num" in flags else 5
    assert (found.width, found.height, found.frames) == (*size, frames)


@pytest.mark.parametrize("task", ["i2v-A14B", pytest.param("flf2v-14B", marks=pytest.mark.slow)])
def test_optimised_program_makes_it_too(
    task: str, run: Callable[..., int], checkpoints: dict[str, Path], programs_agree: Callable[[list[str]], None]
) -> None:
    small = ["--size", "32x16", "--any_size", "--frame_num", "5", "--sample_steps", "2", "--seed", "1"]
    pictures = ["--first_frame", "wide.png", "--last_frame", "tall.png"]
    programs_agree(["--task", task, "--ckpt_dir", str(checkpoints[task]), "--device", "cpu", *small, *pictures])


def test_one_frame_is_an_image(run: Callable[..., int]) -> None:
    assert run("i2v-14B", "--image", "wide.png", "--frame_num", "1", "--save_file", "out.png") == 0
    with Image.open("out.png") as made:
        assert made.size == (32, 16)


FIRST, LAST = ["--first_frame", "wide.png"], ["--last_frame", "tall.png"]
REFUSED = [
    ("i2v-14B", [], r"--image is missing: i2v-14B makes a video that begins with a picture; name a file"),
    ("i2v-A14B", LAST, r"--image is missing: i2v-A14B"),
    ("i2v-14B", ["--image", "no.png"], r"--image 'no\.png': there is no such file"),
    ("i2v-14B", ["--image", "text.png"], r"--image 'text\.png' is no picture that can be read; save it as PNG"),
    ("i2v-14B", ["--image", "."], r"--image '\.' is a folder; name a picture in it"),
    ("i2v-A14B", ["--image", "wide.png", *FIRST], r"--image and --first_frame are the same picture here"),
    ("i2v-14B", ["--image", "wide.png", *LAST], r"--last_frame: i2v-14B was trained with one picture"),
    ("flf2v-14B", FIRST, r"--last_frame is missing: flf2v-14B makes a video from one picture to another"),
    ("flf2v-14B", LAST, r"--first_frame is missing: flf2v-14B"),
    ("flf2v-14B", [*FIRST, "--last_frame", "text.png"], r"--last_frame 'text\.png' is no picture"),
    ("flf2v-14B", [*FIRST, *LAST, "--image", "wide.png"], r"--image: flf2v-14B has no use for it \(it takes --first_f"),
    ("flf2v-14B", [*FIRST, *LAST, "--frame_num", "1"], r"--last_frame: 1 frames are too few"),
    ("flf2v-14B", [*FIRST, *LAST, "--frame_num", "80"], r"4n\+1; the nearest are 77 and 81"),
    ("i2v-14B", ["--image", "wide.png", "--fit", "squeeze"], r"--fit: invalid choice: 'squeeze'"),
    ("i2v-A14B", ["--image", "wide.png", "--clip", "wide.png"], r"--clip 'wide\.png': this task looks at no image"),
    ("i2v-14B", ["--image", "wide.png", "--clip", "no.pth"], r"--clip 'no\.pth' does not exist"),
    ("i2v-14B", ["--image", "wide.png", "--size", "20x20", "--fit", "crop"], r"multiples of 16; the nearest is 16x16"),
]


@pytest.mark.parametrize(
    ("task", "flags", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_bad_input_is_refused_in_one_line_before_anything_is_loaded(
    run: Callable[..., int], task: str, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(vars(wan), CLASSES[task], lambda **_: pytest.fail("built"))
    assert run(task, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]*\n", err) and re.search(says, err), err
    assert not Path("out.mp4").exists()


def test_picture_is_of_no_use_to_text_to_video(capsys: Any) -> None:
    assert main(["--task", "t2v-1.3B", "--load_format", "dummy", "--image", "wide.png"]) == 2
    assert "--image: t2v-1.3B has no use for it (it takes a text alone)" in capsys.readouterr().err


def test_task_is_told_from_the_checkpoint(run: Callable[..., int], checkpoints: dict[str, Path], capsys: Any) -> None:
    pictures = {"flf2v-14B": [*FIRST, *LAST]}
    for task in TASKS:
        flags = pictures.get(task, ["--image", "wide.png"])
        assert (
            main(["--ckpt_dir", str(checkpoints[task]), *flags, "--print_plan", "--any_size", "--size", "32x16"]) == 0
        )
        assert f"task    {task} (read from --ckpt_dir)" in capsys.readouterr().err


def test_record_repeats_the_video_and_knows_the_picture(run: Callable[..., int], capsys: Any) -> None:
    assert run("i2v-14B", "--image", "tall.png", "--size", "64x48") == 0
    made = json.loads(Path("out.mp4.json").read_text())
    assert made["flags"]["image"] == str(Path("tall.png").absolute()) and made["flags"]["size"] == "64*48"
    assert made["flags"]["fit"] == "area" and made["inputs"]["image"]["hash"].startswith("sha256:")
    capsys.readouterr()
    assert main(["--from", "out.mp4", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    assert "the same bits can be expected" in capsys.readouterr().err
    assert verify_video("again.mp4") == verify_video("out.mp4")
    assert json.loads(Path("again.mp4.json").read_text())["flags"] == made["flags"]
    picture(32, 64, seed=5).save("tall.png")
    assert main(["--from", "out.mp4", "--save_file", "other.mp4", "--device", "cpu", "--print_plan"]) == 0
    err = capsys.readouterr().err
    assert "--image is another file now" in err and "this makes another video" in err


def test_start_says_which_size_comes_of_the_picture(run: Callable[..., int], capsys: Any) -> None:
    assert run("i2v-14B", "--image", "tall.png", "--print_plan") == 0
    assert "video   16x32 (the 32x64 picture's shape, of 32x16 pixels at most; --fit crop keeps to --size)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("task", TASKS)
def test_dummy_weights_need_no_checkpoint(
    task: str, configs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(64, 32).save("wide.png")
    config = configs[task]
    config.t5_sizes = {"vocab_size": 160, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 2, "encoder_layers": 1}
    config.update(vae_sizes={"encoder_dim": 8, "decoder_dim": 8, "num_res_blocks": 1}, clip_sizes=CLIP_SIZES)
    width, positions = BRANCHES[task]
    config.update(image_dim=width, image_positions=positions)
    pictures = (
        ["--first_frame", "wide.png", "--last_frame", "wide.png"] if width and positions else ["--image", "wide.png"]
    )
    small = ["--size", "32x16", "--any_size", "--frame_num", "5", "--sample_steps", "1", "--device", "cpu"]
    assert main(["--task", task, "--load_format", "dummy", *small, *pictures, "--save_file", "out.mp4"]) == 0
    assert verify_video("out.mp4").frames == 5


def test_every_layout_makes_the_same_video(
    checkpoints: dict[str, Path], configs: dict[str, Any], tmp_path: Path
) -> None:
    folder, config = checkpoints["i2v-14B"], configs["i2v-14B"]
    dit = load_file(folder / "diffusion_pytorch_model.safetensors")
    tower = torch.load(folder / config.clip_checkpoint, weights_only=True)
    comfy, diffusers = tmp_path / "models", tmp_path / "diffusers"
    for where in (
        comfy / "diffusion_models",
        comfy / "clip_vision",
        diffusers / "transformer",
        diffusers / "image_encoder",
    ):
        where.mkdir(parents=True)
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in dit.items()}, comfy / "diffusion_models" / "wan2.1_i2v.safetensors"
    )
    vision = {key: value.contiguous() for key, value in as_transformers(tower).items()}
    save_file(
        vision | {"visual_projection.weight": torch.zeros(2, 2)}, comfy / "clip_vision" / "clip_vision_h.safetensors"
    )
    save_file(vision, diffusers / "image_encoder" / "model.safetensors")
    save_file(
        {DIFFUSERS_DIT.to_theirs(k): v for k, v in dit.items()},
        diffusers / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    fields = {"num_attention_heads": 2, "attention_head_dim": 24, "image_dim": 80, "in_channels": 36, "ffn_dim": 64}
    (diffusers / "transformer" / "config.json").write_text(json.dumps(fields))
    (diffusers / "model_index.json").write_text("{}")
    rest = {
        "t5": folder / config.t5_checkpoint,
        "vae": folder / config.vae_checkpoint,
        "tokenizer": folder / config.t5_tokenizer,
    }
    single = {"dit": comfy / "diffusion_models" / "wan2.1_i2v.safetensors", "clip": folder / config.clip_checkpoint}
    places: list[tuple[Path | None, CheckpointFiles | None]] = [
        (folder, None), (comfy, CheckpointFiles(**rest)), (diffusers, CheckpointFiles(**rest)),
        (None, CheckpointFiles(**rest, **single)),
    ]  # fmt: skip
    videos = [
        wan.WanI2V(config, where, files=files, device="cpu").generate(
            "a cat", picture(64, 32), max_area=512, frame_num=5, sampling_steps=1, seed=3
        )
        for where, files in places
    ]
    assert all(torch.equal(video, videos[0]) for video in videos[1:])


def as_transformers(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of CLIP's image tower as transformers stores them."""
    made: dict[str, Tensor] = {}
    for key, value in tower.items():
        if ".to_qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            made |= {TRANSFORMERS_CLIP.to_theirs(key.replace("to_qkv", part)): piece for part, piece in parts}
        elif key.startswith("visual.") and key != "visual.head":
            flat = {"visual.cls_embedding": value.flatten(), "visual.pos_embedding": value[0]}.get(key, value)
            made[TRANSFORMERS_CLIP.to_theirs(key)] = flat
    return made


def test_benchmark_times_it_too(run: Callable[..., int], checkpoints: dict[str, Path], configs: dict[str, Any]) -> None:
    from wan.cli.args import parse
    from wan.cli.benchmarking.worker import Ours
    from wan.cli.request import resolve
    from wan.engine.hardware import probe
    from wan.engine.optimizations import registry
    from wan.engine.plan import Plan, options

    words = ["--task", "i2v-A14B", "--ckpt_dir", str(checkpoints["i2v-A14B"]), "--image", "wide.png", "--fit", "crop"]
    words += ["--size", "32x16", "--any_size", "--frame_num", "5", "--sample_steps", "1", "--seed", "1"]
    wanted = resolve(parse(words, options(registry())))
    trial = Ours(wanted, configs["i2v-A14B"], Plan.of(registry(), {}), probe("cpu"), None).run(watch=False)
    assert trial.latents.shape == (1, 16, 2, 2, 4) and abs(trial.latents).max() < 100


def test_prompt_file_gives_each_line_its_picture(run: Callable[..., int], capsys: Any) -> None:
    lines = [
        {"prompt": f"{name} moves", "image": f"{name}.png", "save_file": f"{name}.mp4"} for name in ("wide", "tall")
    ]
    Path("queue.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("i2v-14B", "--prompt_file", "queue.jsonl", "--save_file", "out/") == 0
    sizes = [verify_video(f"{name}.mp4") for name in ("wide", "tall")]
    assert [(each.width, each.height) for each in sizes] == [(32, 16), (16, 32)]
    lines[1]["image"] = "text.png"
    Path("queue.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("i2v-14B", "--prompt_file", "queue.jsonl", "--save_file", "out/", "--results", "other.jsonl") == 2
    assert re.search(r"queue\.jsonl.*2.*--image 'text\.png' is no picture", capsys.readouterr().err)


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shift"), [("832*480", 3.0), ("480*832", 3.0), ("1280*720", 5.0), (None, 5.0)], ids=str
)
def test_image_to_video_of_2_1_has_its_own_shift_at_480p(
    size: str | None, shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(64, 32).save("wide.png")
    flags = ["--task", "i2v-14B", "--load_format", "dummy", "--image", "wide.png", "--print_plan"]
    assert main([*flags, *(["--size", size] if size else [])]) == 0
    assert f"40 steps of unipc, shift {shift:g}, guidance 5," in capsys.readouterr().err
