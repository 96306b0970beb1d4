"""`generate.py` and checkpoints: the task read from them, every layout, and each fault told in one line, exit 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wan
from wan.cli.checkpoint import detect_task
from wan.cli.generate import main
from wan.configs import WAN_CONFIGS
from wan.engine.weights.keymap import TRANSFORMERS_T5
from wan.layouts import CheckpointFiles
from wan.modules.building import build_dit
from wan.modules.clip import ImageTower
from wan.modules.model import WanModel

TWO = ("high_noise_model", "low_noise_model")
VACE = {"vace_layers": [0], "vace_in_dim": 96}
T5_FILE, VAE_FILE, STEM = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "diffusion_pytorch_model"

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, write_header: Callable[..., Path], tmp_path: Path) -> Make:
    """`make(name, fields, *experts, extra)`: a complete folder; a wide transformer is a header and a hole."""

    def make(name: str, fields: dict[str, Any], *experts: str, extra: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / name
        sizes = {"ffn_dim": 64, "num_heads": fields["dim"] // 32, "num_layers": 1, "text_dim": 32}
        dit = build_dit({"dim": fields["dim"], "in_dim": fields.get("in_dim", 16)} | sizes | (extra or {}))
        shapes = {key: value.shape for key, value in dit.state_dict().items()}
        for expert in experts or ("",):
            write_header(folder / expert / f"{STEM}.safetensors", shapes)
            (folder / expert / "config.json").write_text(json.dumps(fields | sizes))
        for file in (T5_FILE, VAE_FILE):
            shutil.copyfile(tiny_checkpoint / file, folder / file)
        shutil.copytree(tiny_checkpoint / "google", folder / "google")
        if dit.config.image_dim:
            tower = ImageTower(dim=dit.config.image_dim, mlp_dim=8, num_heads=1, num_layers=1)
            torch.save(tower.state_dict(), folder / WAN_CONFIGS["i2v-14B"].clip_checkpoint)
        return folder

    return make


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `generate.py` says about a checkpoint it refuses: one line, exit status 2, at once, nothing loaded."""

    def run(*argv: Any) -> str:
        started = time.perf_counter()
        assert main([*map(str, argv), "--device", "cpu"]) == 2
        assert time.perf_counter() - started < 5
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(r"error: [^\n]*\n", err), err
        return err

    return run


@pytest.fixture
def whole(tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny checkpoint to damage. Loading a network is an error while it is refused."""
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    monkeypatch.setitem(vars(wan), "WanT2V", None)
    shutil.copytree(tiny_checkpoint, tmp_path / "whole")
    return tmp_path / "whole"


# The task -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "experts", "extra", "task"),
    [
        ({"model_type": "t2v", "dim": 1536}, (), {}, "t2v-1.3B"),
        ({"model_type": "t2v", "dim": 5120}, (), {}, "t2v-14B"),
        ({"model_type": "t2v", "dim": 5120}, TWO, {}, "t2v-A14B"),
        ({"model_type": "t2v", "dim": WAN_CONFIGS["t2v-demo"].dim}, TWO, {}, "t2v-demo"),
        ({"model_type": "i2v", "dim": WAN_CONFIGS["i2v-demo"].dim, "in_dim": 36}, TWO, {}, "i2v-demo"),
        ({"model_type": "t2v", "dim": 96}, TWO, {}, "t2v-A14B"),
        ({"model_type": "i2v", "dim": 5120, "in_dim": 36}, (), {"image_dim": 80}, "i2v-14B"),
        ({"model_type": "i2v", "dim": 96, "in_dim": 36}, (), {"image_dim": 80}, "i2v-14B"),
        (
            {"model_type": "flf2v", "dim": 5120, "in_dim": 36},
            (),
            {"image_dim": 80, "image_positions": 514},
            "flf2v-14B",
        ),
        ({"model_type": "i2v", "dim": 5120, "in_dim": 36}, TWO, {}, "i2v-A14B"),
        ({"model_type": "t2v", "dim": 1536}, (), VACE, "vace-1.3B"),
        ({"model_type": "t2v", "dim": 5120}, (), VACE, "vace-14B"),
    ],
)
def test_the_task_is_read_from_the_weights(
    fields: Any, experts: Any, extra: Any, task: str, checkpoint: Make, capsys: Any
) -> None:
    """VACE checkpoints that call themselves t2v are told by their keys."""
    folder = checkpoint("checkpoint", fields, *experts, extra=extra)
    assert detect_task(folder, WAN_CONFIGS) == task
    Image.new("RGB", (64, 32)).save(folder / "a.png")
    given = {"i2v": ("--image",), "flf2v": ("--first_frame", "--last_frame")}.get(task.partition("-")[0], ())
    pictures = [word for flag in given for word in (flag, str(folder / "a.png"))]
    status = main(["--ckpt_dir", str(folder), "--print_plan", "--device", "cpu", *pictures])
    err = capsys.readouterr().err
    if task in WAN_CONFIGS:
        assert status == 0 and f"task    {task} (read from --ckpt_dir)" in err
    else:
        assert status == 2 and f"holds {task}, which this version cannot run yet" in err
    dit = folder / (experts or ("",))[0] / f"{STEM}.safetensors"
    files = CheckpointFiles(dit=dit, dit_low=dit if experts else None)
    assert detect_task(None, WAN_CONFIGS, files) == task


def test_config_json_tells_the_task_where_the_weights_are_not_there(checkpoint: Make) -> None:
    for fields, task in (
        ({"model_type": "i2v", "dim": 5120}, "i2v-14B"),
        ({"dim": 1536, "_class_name": "VaceWanModel", "model_type": "t2v"}, "vace-1.3B"),
        ({"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}, "t2v-1.3B"),
        ({"num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36, "image_dim": 1280}, "i2v-14B"),
    ):
        folder = checkpoint(f"{task} {len(fields)}", {"dim": 96, "model_type": "t2v"})
        (folder / f"{STEM}.safetensors").unlink()
        (folder / "config.json").write_text(json.dumps(fields))
        assert detect_task(folder, WAN_CONFIGS) == task


def test_every_missing_file_is_named_with_the_way_to_get_it(checkpoint: Make, refused: Callable[..., str]) -> None:
    folder = checkpoint("Wan2.2-T2V-A14B", {"model_type": "t2v", "dim": 5120}, *TWO)
    (folder / VAE_FILE).unlink()
    (folder / "low_noise_model" / f"{STEM}.safetensors").unlink()
    index = {"weight_map": {"a": f"{STEM}-00001-of-00002.safetensors"}}
    (folder / "high_noise_model" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    err = refused("--ckpt_dir", folder)
    for name in (VAE_FILE, f"low_noise_model/{STEM}.safetensors", "model-00001-of-00002"):
        assert name in err
    assert "hf download Wan-AI/Wan2.2-T2V-A14B" in err


def test_a_checkpoint_of_another_task_says_which(checkpoint: Make, refused: Callable[..., str]) -> None:
    folder = checkpoint("checkpoint", {"model_type": "t2v", "dim": 1536})
    for task in ("t2v-A14B", "t2v-14B", "t2i-14B"):
        err = refused("--task", task, "--ckpt_dir", folder)
        assert f"holds t2v-1.3B, not {task}: pass --task t2v-1.3B" in err
    assert "did you mean" in refused("--ckpt_dir", folder.with_name("checkpiont"))
    animated = checkpoint("animated", {"model_type": "i2v", "dim": 5120, "in_dim": 36}, extra={"image_dim": 80})
    assert "holds i2v-14B, not t2v-14B" in refused("--task", "t2v-14B", "--ckpt_dir", animated)
    assert "is a file; name it with --dit" in refused("--ckpt_dir", folder / f"{STEM}.safetensors")


# Every layout ---------------------------------------------------------------------------------------------------------


def comfyui(tiny: Path, folder: Path) -> Path:
    for name in TWO:
        state = load_file(tiny / name / f"{STEM}.safetensors")
        path = folder / "diffusion_models" / f"wan2.2_t2v_{name.removesuffix('_model')}_14B_fp32.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"model.diffusion_model.{key}": value for key, value in state.items()}, str(path))
    for name, file, names in (
        ("text_encoders", "umt5_xxl.safetensors", TRANSFORMERS_T5),
        ("vae", "wan.safetensors", None),
    ):
        state = torch.load(tiny / (VAE_FILE if names is None else T5_FILE), weights_only=True)
        (folder / name).mkdir()
        save_file({names.to_theirs(k) if names else k: v for k, v in state.items()}, str(folder / name / file))
    return folder


def test_a_comfyui_folder_and_single_files_make_the_same_image(
    tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    tiny_config.update(text_len=512)  # as in its config.json, which single files do not have
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", tiny_config)
    folder = comfyui(tiny_checkpoint, tmp_path / "models")
    one, two = sorted((folder / "diffusion_models").iterdir())
    tokenizer = ["--tokenizer", str(tiny_checkpoint / "google" / "umt5-xxl" / "tokenizer.json")]
    files = ["--dit", str(one), "--dit_low", str(two), "--vae", str(folder / "vae" / "wan.safetensors")]
    files += ["--t5", str(folder / "text_encoders" / "umt5_xxl.safetensors")]
    small = ["--size", "32x16", "--any_size", "--frame_num", "1", "--sample_steps", "5", "--seed", "1"]
    small += ["--device", "cpu", "--prompt", "a cat"]
    images = []
    for name, where in {
        "a.png": ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint)],
        "b.png": ["--ckpt_dir", str(folder), *tokenizer],
        "c.png": [*files, *tokenizer],
    }.items():
        assert main([*where, *small, "--save_file", name]) == 0
        images.append(Image.open(name).tobytes())
    assert images[0] == images[1] == images[2]
    assert f"from --dit {one}, --dit_low {two}" in capsys.readouterr().err


def test_several_models_in_a_comfyui_folder_are_listed(
    tiny_checkpoint: Path, write_header: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = comfyui(tiny_checkpoint, tmp_path / "models")
    with torch.device("meta"):
        dit = WanModel(dim=1536, ffn_dim=64, num_heads=12, num_layers=1, text_dim=32)
    shapes = {key: value.shape for key, value in dit.state_dict().items()}
    write_header(folder / "diffusion_models" / "wan2.1_t2v_1.3B.safetensors", shapes)
    err = refused("--ckpt_dir", folder)
    assert "holds several models: t2v-1.3B (wan2.1_t2v_1.3B.safetensors), t2v-A14B (wan2.2_t2v_high" in err
    assert "choose with --task" in err


# Faults ---------------------------------------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DIT = f"low_noise_model/{STEM}.safetensors"


@pytest.mark.parametrize("name", [DIT, T5_FILE, VAE_FILE, "google/umt5-xxl/tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes); download it again"),
        (HTML, "is a web page, not weights"),
        (POINTER, "git-lfs pointer"),
        (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file"),
    ],
    ids=["empty", "html", "lfs", "gguf"],
)
def test_what_is_no_weights_is_named(
    name: str, content: bytes, says: str, whole: Path, refused: Callable[..., str]
) -> None:
    (whole / name).write_bytes(content)
    err = refused("--task", "t2v-A14B", "--ckpt_dir", whole)
    assert says in err and str(whole / name) in err


@pytest.mark.parametrize("name", [DIT, T5_FILE, VAE_FILE])
def test_a_truncated_file_is_named(name: str, whole: Path, refused: Callable[..., str]) -> None:
    path = whole / name
    size = path.stat().st_size
    os.truncate(path, size - 100)
    err = refused("--task", "t2v-A14B", "--ckpt_dir", whole)
    assert str(path) in err and "truncated" in err
    if path.suffix == ".safetensors":
        assert re.search(rf"is truncated: '\S+' ends at byte {size} and the file at byte {size - 100};", err)


def test_a_missing_shard_is_named(whole: Path, refused: Callable[..., str]) -> None:
    path = whole / DIT
    path.rename(path.with_name(f"{STEM}-00001-of-00002.safetensors"))
    assert f"shard '{STEM}-00002-of-00002.safetensors' of 2 is missing" in refused(
        "--task", "t2v-A14B", "--ckpt_dir", whole
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (DIT, "blocks.1.ffn.2.weight"),
        (T5_FILE, "blocks.0.norm2.weight"),
        (VAE_FILE, "decoder.middle.0.residual.0.gamma"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "of the wrong shape"])
def test_keys_that_do_not_fit_are_named_with_their_file(
    name: str, key: str, fault: str, whole: Path, refused: Callable[..., str]
) -> None:
    path = whole / name
    is_pickle = path.suffix == ".pth"
    state = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    tensor = state.pop(key)
    if fault == "unexpected":
        state |= {key: tensor, f"{key}.lora": torch.zeros(1)}
    elif fault == "of the wrong shape":
        state[key] = torch.zeros(*tensor.shape, 2)
    (torch.save if is_pickle else save_file)(state, str(path))
    err = refused("--task", "t2v-A14B", "--ckpt_dir", whole)
    assert str(path) in err and key in err
    assert name == VAE_FILE or f"1 {fault} ({key}" in err


class Hostile:
    """Unpickling this creates a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("name", [T5_FILE, VAE_FILE])
def test_a_hostile_pickle_is_refused_and_not_run(
    name: str, whole: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    state = torch.load(whole / name, weights_only=True)
    torch.save(state | {"extra": Hostile(trace)}, whole / name)
    err = refused("--task", "t2v-A14B", "--ckpt_dir", whole)
    assert str(whole / name) in err and "could run code when loaded; refused" in err
    assert not trace.exists()
    torch.load(whole / name, weights_only=False)  # it would have
    assert trace.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--vae", "nowhere.safetensors"], "--vae 'nowhere.safetensors' does not exist"),
        (["--tokenizer", "google"], "'google' has no tokenizer.json and no spiece.model"),
        (["--t5", VAE_FILE], f"'{VAE_FILE}' is a video VAE, not a umT5 text encoder"),
        (["--dit", DIT, "--load_format", "dummy"], "--dit and --load_format dummy contradict each other"),
        (["--clip", "clip.safetensors"], "--clip 'clip.safetensors': this task looks at no image through CLIP"),
    ],
)
def test_files_named_by_hand_are_checked(
    argv: list[str], says: str, whole: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    assert says in refused("--task", "t2v-A14B", "--ckpt_dir", whole, *argv)


def test_files_without_a_folder_must_be_complete(whole: Path, refused: Callable[..., str]) -> None:
    err = refused("--task", "t2v-A14B", "--dit", whole / DIT)
    wanted = "the low-noise transformer (--dit_low), the umT5 text encoder (--t5), the VAE (--vae)"
    assert f"the files named lack what t2v-A14B needs: {wanted}" in err
    assert "--dit_low" in refused("--task", "t2v-1.3B", "--dit_low", whole / DIT)
