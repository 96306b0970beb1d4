"""VACE from its sources to the video: upstream's preparation and loop, every kind of source, what is never held."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import wan
from wan.conditioning.control import control_latents
from wan.conditioning.video import Clip
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint, BadRequest
from wan.video.ffmpeg import ffmpeg_exe

FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs
SMALL: dict[str, Any] = {"sampling_steps": 3, "seed": 7, "guide_scale": 3.0}
CPU = torch.device("cpu")

Film = Callable[..., Path]


@pytest.fixture
def pipeline(vace_checkpoint: Path, small_config: Callable[[str], Any]) -> wan.WanVace:
    return wan.WanVace(small_config("vace-1.3B"), vace_checkpoint, device="cpu")


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Writes lossless random frames."""

    def write(name: str, frames: int = 9, width: int = 48, height: int = 32) -> Path:
        pixels = (torch.rand(frames, height, width, 3) * 255).to(torch.uint8)
        command = [ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", "16"]
        command += ["-s", f"{width}x{height}", "-i", "-", "-c:v", "ffv1", "-pix_fmt", "bgr0", str(tmp_path / name)]
        subprocess.run(command, input=pixels.numpy().tobytes(), check=True)
        return tmp_path / name

    return write


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = (torch.rand(40, 24, 3) * 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "ref.png")
    return tmp_path / "ref.png"


def test_the_configs_are_upstreams_text_to_video_ones_at_shift_16() -> None:
    for task, like in (("vace-1.3B", "t2v-1.3B"), ("vace-14B", "t2v-14B")):
        config, plain = WAN_CONFIGS[task], WAN_CONFIGS[like]
        names = ("dim", "ffn_dim", "num_heads", "num_layers", "vae_stride", "sample_neg_prompt", "sample_fps")
        assert all(config[name] == plain[name] for name in names)
        assert (config.sample_steps, config.sample_shift, config.sample_guide_scale) == (50, 16.0, 5.0)


# Preparation ----------------------------------------------------------------------------------------------------------


def test_prepare_source_gives_upstreams_tensors(pipeline: wan.WanVace, film: Film, picture: Path) -> None:
    sources = [film("a.mkv"), None], [film("m.mkv"), None], [[picture, picture], None]
    videos, masks, refs = pipeline.prepare_source(*sources, 5, (48, 32), CPU)
    assert videos[0].shape == (3, 5, 32, 48) and -1 <= videos[0].min() < -0.9 and 0.9 < videos[0].max() <= 1
    assert masks[0].shape == (1, 5, 32, 48) and 0 <= masks[0].min() < 0.1 and 0.9 < masks[0].max() <= 1
    assert torch.equal(videos[1], torch.zeros(3, 5, 32, 48)) and torch.equal(masks[1], torch.ones(3, 5, 32, 48))
    assert refs[1] is None and refs[0] is not None and [ref.shape for ref in refs[0]] == [(3, 1, 32, 48)] * 2
    assert (refs[0][0][..., :14] == 1).all(), "a portrait lies between white"
    [whole], [full], _ = pipeline.prepare_source([film("b.mkv")], [None], [None], 9, (48, 32), CPU)
    assert whole.shape == (3, 9, 32, 48) and torch.equal(full, torch.ones(3, 9, 32, 48))


def test_streamed_sources_are_the_same_and_hold_nothing(pipeline: wan.WanVace, film: Film, picture: Path) -> None:
    video, mask = film("a.mkv"), film("m.mkv")
    held = pipeline.prepare_source([video], [mask], [[picture]], 9, (48, 32), CPU)
    streamed = pipeline.prepare_source([video], [mask], [[picture]], 9, (48, 32), CPU, stream=True)
    assert isinstance(streamed[0][0], Clip) and isinstance(streamed[1][0], Clip)
    assert torch.equal(streamed[0][0].tensor(), held[0][0]) and torch.equal(streamed[1][0].tensor(), held[1][0])
    one, other = (pipeline.generate("a cat", *sources, **SMALL) for sources in (held, streamed))
    assert one is not None and other is not None and torch.equal(one, other)
    grey = pipeline.prepare_source([None], [None], [None], 81, (1280, 720), CPU, stream=True)[0][0]
    assert grey.shape == (3, 81, 720, 1280) and grey.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("size", [(48, 32), (32, 48)])
def test_a_source_keeps_its_shape_whatever_size_is_asked(
    pipeline: wan.WanVace, film: Film, size: tuple[int, int]
) -> None:
    [video], _, _ = pipeline.prepare_source([film("a.mkv")], [None], [None], 9, size, CPU)
    assert video.shape == (3, 9, 32, 48)


def test_sources_that_do_not_go_together_are_refused(pipeline: wan.WanVace, film: Film) -> None:
    with pytest.raises(BadRequest, match=r"--src_mask '.*m\.mkv' needs a video to lie on"):
        pipeline.prepare_source([None], [film("m.mkv")], [None], 9, (48, 32), CPU)
    frames, ones = torch.zeros(3, 5, 32, 48), torch.ones(1, 5, 32, 48)
    with pytest.raises(BadRequest, match="2 videos, 2 masks and 1 lists"):
        pipeline.generate("a cat", [frames, frames], [ones, ones], [None])
    with pytest.raises(BadRequest, match=r"the mask is \[1, 5, 16, 48\]"):
        pipeline.generate("a cat", [frames], [ones[:, :, :16]], [None])
    with pytest.raises(BadRequest, match=r"reference image 1 is \[3, 1, 8, 8\]"):
        pipeline.generate("a cat", [frames], [ones], [[torch.zeros(3, 1, 8, 8)]])
    with pytest.raises(BadRequest, match="4 frames"):
        pipeline.generate("a cat", [frames[:, :4]], [ones[:, :4]], [None])


# The loop -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_video_is_upstreams_loop_written_out(pipeline: wan.WanVace, film: Film, picture: Path) -> None:
    from wan.engine.sampling.schedule import flow_steps
    from wan.engine.sampling.solvers import make_solver

    sources = pipeline.prepare_source([film("a.mkv")], [film("m.mkv")], [[picture, picture]], 9, (48, 32), CPU)
    seen: list[Tensor] = []
    video = pipeline.generate("a cat", *sources, context_scale=0.7, shift=8.0, **SMALL,
                              observe=(lambda step, latents: seen.append(latents.clone()),))  # fmt: skip
    assert video is not None and video.shape == (3, 9, 32, 48)

    [frames], [mask], [refs] = sources
    hard, vae = torch.where(mask > 0.5, 1.0, 0.0), pipeline.vae
    latents = torch.cat((vae.encode([frames * (1 - hard)])[0], vae.encode([frames * hard])[0]))
    pictures = [torch.cat((z, torch.zeros_like(z))) for z in vae.encode(refs)]
    cells = mask[0].view(9, 4, 8, 6, 8).permute(2, 4, 0, 1, 3).reshape(64, 9, 4, 6)
    cells = torch.nn.functional.interpolate(cells[None], size=(3, 4, 6), mode="nearest-exact")[0]
    cells = torch.cat((torch.zeros(64, 2, 4, 6), cells), 1)
    context = torch.cat((torch.cat((*pictures, latents), 1), cells))
    assert context.shape == (96, 5, 4, 6)

    x = torch.randn(16, 5, 4, 6, generator=torch.Generator().manual_seed(7))
    texts = [pipeline.text_encoder([text], CPU) for text in ("a cat", "blurry")]
    steps = flow_steps("unipc", 3, 8.0)
    solver = make_solver("unipc", steps)
    for step, expected in zip(steps, seen, strict=True):
        t = torch.tensor([step.t])
        cond, uncond = (
            pipeline.model([x], t, [context], text, 30, vace_context_scale=0.7)[0] for text in texts
        )  # fmt: skip
        x = solver.step((uncond + 3.0 * (cond - uncond))[None], step, x[None])[0]
        assert ((x - expected[0]).norm() / x.norm()).item() < FLOAT32
    assert (video - vae.decode([x[:, 2:]])[0]).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["text", "reference", "control", "inpainting", "all"])
def test_every_kind_of_source_changes_the_video(pipeline: wan.WanVace, film: Film, picture: Path, kind: str) -> None:
    video = film("a.mkv") if kind in ("control", "inpainting", "all") else None
    mask = film("m.mkv") if kind in ("inpainting", "all") else None
    refs = [picture] if kind in ("reference", "all") else None
    sources = pipeline.prepare_source([video], [mask], [refs], 9, (48, 32), CPU)
    made = pipeline.generate("a cat", *sources, **SMALL)
    assert made is not None and made.shape == (3, 9, 32, 48) and torch.isfinite(made).all()
    grey = pipeline.prepare_source([None], [None], [None], 9, (48, 32), CPU)
    plain = pipeline.generate("a cat", *grey, **SMALL)
    assert plain is not None and torch.equal(made, plain) == (kind == "text")


def test_context_scale_0_leaves_the_text_alone(pipeline: wan.WanVace, film: Film) -> None:
    sources = [pipeline.prepare_source([film(name)], [None], [None], 9, (48, 32), CPU) for name in ("a.mkv", "b.mkv")]
    one, other = (pipeline.generate("a cat", *each, context_scale=0.0, **SMALL) for each in sources)
    assert one is not None and other is not None and torch.equal(one, other)


def test_batched_guidance_changes_nothing_but_rounding(pipeline: wan.WanVace, film: Film) -> None:
    sources = pipeline.prepare_source([film("a.mkv")], [None], [None], 9, (48, 32), CPU)
    one = pipeline.generate("a cat", *sources, **SMALL)
    two = pipeline.generate("a cat", *sources, use_batched_cfg=True, **SMALL)
    assert one is not None and two is not None and (one - two).abs().max() < 1e-3
    in_turns = pipeline.generate("a cat", *sources, lockstep_cfg=True, **SMALL)
    assert in_turns is not None and torch.equal(in_turns, one)


@torch.inference_mode()
def test_a_window_of_frames_has_the_control_of_those_frames(pipeline: wan.WanVace) -> None:
    from wan.modules.vace_model import VaceCondition

    control = control_latents(pipeline.vae.model, torch.rand(3, 9, 32, 48), None, (), (9, 32, 48))
    whole = VaceCondition(context=torch.zeros(1, 1, 32), control=control, control_scale=torch.ones(1))
    part = whole.window((0, 2))
    assert torch.equal(part.control, control[:, :, [0, 2]]) and torch.equal(part.control_scale, torch.ones(1))


def test_a_checkpoint_of_another_family_is_refused(vace_checkpoint: Path, small_config: Callable[[str], Any]) -> None:
    with pytest.raises(BadCheckpoint, match=r"is a transformer for vace; .* needs one for t2v"):
        wan.WanT2V(small_config("t2v-14B"), vace_checkpoint, device="cpu")


def test_the_preview_checkpoint_that_calls_itself_t2v_is_read(
    vace_checkpoint: Path, small_config: Callable[[str], Any], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = shutil.copytree(vace_checkpoint, tmp_path / "preview")
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "VaceWanModel", "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(config))
    pipeline = wan.WanVace(small_config("vace-14B"), folder, device="cpu")
    assert type(pipeline.model).__name__ == "VaceWanModel"


def test_a_converted_checkpoint_makes_the_same_video_and_converts_back(
    vace_checkpoint: Path, small_config: Callable[[str], Any], tmp_path: Path, film: Film, tool: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import json

    from safetensors.torch import load_file

    config = small_config("vace-1.3B")
    monkeypatch.setitem(WAN_CONFIGS, "vace-1.3B", config)
    there, back = tmp_path / "diffusers", tmp_path / "upstream"
    task = ["--task", "vace-1.3B"]
    assert tool.main(["--ckpt_dir", str(vace_checkpoint), "--to", "diffusers", "--out", str(there), *task]) == 0
    assert tool.main(["--ckpt_dir", str(there), "--to", "upstream", "--out", str(back), *task]) == 0
    index = json.loads((there / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer"][1]) == ("WanVACEPipeline", "WanVACETransformer3DModel")
    file = "diffusion_pytorch_model.safetensors"
    assert "vace_blocks.0.proj_in.weight" in load_file(there / "transformer" / file)
    before, after = load_file(vace_checkpoint / file), load_file(back / file)
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert json.loads((back / "config.json").read_text())["vace_layers"] == [0, 1]

    pipelines = [wan.WanVace(config, folder, device="cpu") for folder in (vace_checkpoint, there)]
    sources = pipelines[0].prepare_source([film("a.mkv")], [None], [None], 9, (48, 32), CPU)
    one, two = (each.generate("a cat", *sources, **SMALL) for each in pipelines)
    assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.parametrize("task", ["vace-1.3B", "vace-14B", "ti2v-5B"])
def test_dummy_networks_have_the_published_keys(task: str) -> None:
    import json

    from wan.components import dummy_components

    expected = json.loads((Path(__file__).parents[1] / "data" / "dit_keys.json").read_text())[task]
    networks = {component.name: component.build() for component in dummy_components(WAN_CONFIGS[task])}
    assert len(networks["dit"].state_dict()) == expected["count"]
    assert networks["vae"].z_dim == networks["dit"].out_dim
