"""tools/convert.py: from any layout to another and back without losing a bit; what diffusers and transformers load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan
from wan.configs import WAN_CONFIGS

T5_FILE, VAE_FILE, STEM = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "diffusion_pytorch_model"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def demo(root: Path) -> Path:
    if not (root / "demo" / "high_noise_model" / "config.json").is_file():
        pytest.skip("the demo model is not there")
    return root / "demo"


@pytest.fixture(scope="module")
def as_diffusers(demo: Path, tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in diffusers' layout."""
    out = tmp_path_factory.mktemp("convert") / "demo-diffusers"
    assert tool.main(["--ckpt_dir", str(demo), "--to", "diffusers", "--out", str(out)]) == 0
    return out


def state_of(path: Path) -> State:
    return torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_there_and_back_again_gives_equal_files(
    demo: Path, as_diffusers: Path, tool: ModuleType, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    assert tool.main(["--ckpt_dir", str(as_diffusers), "--to", "upstream", "--out", str(back)]) == 0
    experts = ("high_noise_model", "low_noise_model")
    for name in (*(f"{expert}/{STEM}.safetensors" for expert in experts), T5_FILE, VAE_FILE):
        assert same(state_of(back / name), state_of(demo / name)), name
    for expert in experts:
        before, after = (json.loads((folder / expert / "config.json").read_text()) for folder in (demo, back))
        assert {key: value for key, value in before.items() if key != "_diffusers_version"} == after
    for path in (demo / "google" / "umt5-xxl").iterdir():
        assert (back / "google" / "umt5-xxl" / path.name).read_bytes() == path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_diffusers_and_transformers_load_what_was_written(as_diffusers: Path) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    for name in ("transformer", "transformer_2"):
        folder = as_diffusers / name
        # Its own from_pretrained asks for the package accelerate, which is no requirement of this project.
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(str(folder)))
        model.load_state_dict(load_file(folder / f"{STEM}.safetensors"), strict=True)
    vae, said = AutoencoderKLWan.from_pretrained(
        str(as_diffusers / "vae"), low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(said.values()) and vae.config.base_dim == 8
    encoder, said = UMT5EncoderModel.from_pretrained(str(as_diffusers / "text_encoder"), output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    scheduler = UniPCMultistepScheduler.from_pretrained(str(as_diffusers / "scheduler"))
    assert scheduler.config.flow_shift == WAN_CONFIGS["t2v-demo"].sample_shift
    index = json.loads((as_diffusers / "model_index.json").read_text())
    assert index["boundary_ratio"] == WAN_CONFIGS["t2v-demo"].boundary
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]


def test_diffusers_networks_make_the_latents_ours_make(as_diffusers: Path, demo: Path) -> None:
    """One noisy step of the high-noise expert and one decoding. Bound 2e-5: two implementations in float32."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    from wan.engine.types import Condition

    folder = as_diffusers / "transformer"
    dit = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(str(folder))).eval()
    dit.load_state_dict(load_file(folder / f"{STEM}.safetensors"), strict=True)
    encoder = UMT5EncoderModel.from_pretrained(str(as_diffusers / "text_encoder"), dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(str(as_diffusers / "tokenizer"))(
        ["a big red circle"], padding="max_length", max_length=32, return_tensors="pt"
    )
    ours: Any = wan.WanT2V(WAN_CONFIGS["t2v-demo"], as_diffusers, device="cpu")
    latents = torch.randn(1, 16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        text = encoder(tokens.input_ids, tokens.attention_mask)[0]
        mine = ours.text_encoder(["a big red circle"], torch.device("cpu"))[0]
        assert relative(mine, text[0, : len(mine)]) < 2e-5
        text = torch.nn.functional.pad(mine[None], (0, 0, 0, 32 - len(mine)))
        theirs = dit(latents, timestep=torch.tensor([900]), encoder_hidden_states=text, return_dict=False)[0]
        velocity = ours.high_noise_model.velocity(latents, torch.tensor([900]), Condition(context=text))
        assert relative(velocity, theirs) < 2e-5
        vae = AutoencoderKLWan.from_pretrained(str(as_diffusers / "vae"), low_cpu_mem_usage=False).eval()
        plain: Any = wan.WanT2V(WAN_CONFIGS["t2v-demo"], demo, device="cpu")
        assert torch.equal(ours.vae.decode([latents[0]])[0], plain.vae.decode([latents[0]])[0])
        mean, std = (
            torch.tensor(vae.config[name])[None, :, None, None, None] for name in ("latents_mean", "latents_std")
        )
        assert relative(plain.vae.decode([latents[0]])[0], vae.decode(latents * std + mean)[0][0].clamp(-1, 1)) < 2e-5


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_comfyui_files_become_a_folder_with_the_tokenizer_they_carry(
    layouts: Callable[[str], Path],
    tool: ModuleType,
    tmp_path: Path,
    layout_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(WAN_CONFIGS, "t2v-A14B", layout_config)
    folder, out = layouts("ComfyUI"), tmp_path / "out"
    argv = ["--task", "t2v-A14B", "--to", "upstream", "--out", str(out), "--dtype", "bfloat16", "--shard_gb", "0.001"]
    assert tool.main(["--ckpt_dir", str(folder), *argv]) == 0
    shards = sorted((out / "low_noise_model").glob(f"{STEM}-*.safetensors"))
    assert len(shards) > 1
    assert {value.dtype for path in shards for value in load_file(path).values()} == {torch.bfloat16}
    assert {value.dtype for value in state_of(out / T5_FILE).values()} == {torch.bfloat16}
    assert {value.dtype for value in state_of(out / VAE_FILE).values()} == {torch.float32}
    pipe = wan.WanT2V(layout_config, out, device="cpu")
    before = wan.WanT2V(layout_config, folder, device="cpu").text_encoder.tokenizer
    texts = ["a big red circle", "一只白猫在走 😀"]
    assert torch.equal(pipe.text_encoder.tokenizer(texts), before(texts))
    assert pipe.low_noise_model.num_layers == 2


REFUSED = [
    (["--to", "diffusers", "--out", "there"], "--out 'there' exists already"),
    (["--ckpt_dir", "nowhere", "--to", "upstream", "--out", "new"], "pass --ckpt_dir or --dit"),
    (["--task", "t2v-14B", "--ckpt_dir", "DEMO", "--to", "upstream", "--out", "new"], "holds t2v-demo, not t2v-14B"),
    (["--task", "i2v-99B", "--ckpt_dir", "DEMO", "--to", "upstream", "--out", "new"], "'i2v-99B' cannot be converted"),
    (["--ckpt_dir", "DEMO", "--shard_gb", "0", "--to", "upstream", "--out", "new"], "--shard_gb 0.0: it must be"),
    (["--ckpt_dir", "DEMO", "--vae", "no.pth", "--to", "upstream", "--out", "new"], "--vae 'no.pth' does not exist"),
    (["--ckpt_dir", "DEMO", "--to", "upstream", "--out", "there/file/new"], "--out 'there/file/new' cannot be written"),
]


@pytest.mark.parametrize(("argv", "says"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_conversion_that_cannot_be_done_writes_nothing(
    argv: list[str],
    says: str,
    demo: Path,
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/file").touch()
    assert tool.main([str(demo) if word == "DEMO" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and says in err and err.count("\n") == 1 and out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


def test_a_full_disk_leaves_nothing_behind_and_ends_with_status_3(
    demo: Path, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "write_pth", full)
    assert tool.main(["--ckpt_dir", str(demo), "--to", "upstream", "--out", str(tmp_path / "new")]) == 3
    assert "could not be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert tool.main(["--ckpt_dir", str(demo), "--to", "upstream", "--out", str(tmp_path / "new")]) == 2
    assert "0.0 GB are free there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_from_anywhere(root: Path, tmp_path: Path) -> None:
    argv = [sys.executable, str(root / "tools" / "convert.py"), "--help"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "--shard_gb" in run.stdout
