"""One reader for every layout: whatever the files are called, the same networks, tokens and latents come out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan
from wan.components import Checkpoint
from wan.engine.errors import BadCheckpoint
from wan.engine.weights.keymap import TRANSFORMERS_T5
from wan.engine.weights.stream import load_into
from wan.layouts import CheckpointFiles, layout_of
from wan.layouts.held import held

DATA = Path(__file__).parent / "data"
EXPERTS = ("high", "low")
T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"

Networks = dict[str, nn.Module]
State = dict[str, Tensor]
Layouts = Callable[[str], Path]
Save = Callable[..., Path]

LAYOUTS = ("original", "sharded", "diffusers", "ComfyUI")
TOKENIZER = DATA / "umt5-tiny" / "tokenizer.json"


def files_for(layout: str) -> CheckpointFiles | None:
    """The tokenizer the other layouts have in a folder."""
    return CheckpointFiles(tokenizer=TOKENIZER) if layout == "ComfyUI" else None


def loaded(checkpoint: Checkpoint) -> tuple[Networks, dict[str, State]]:
    modules, states, cpu = {}, {}, torch.device("cpu")
    for component in checkpoint.components():
        module = component.build()
        load_into(module, component.weights(module), dtype=lambda key: None, place=lambda key, tensor: cpu)
        modules[component.name], states[component.name] = module, module.state_dict()
    return modules, states


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_networks_and_tokens(
    layouts: Layouts, layout: str, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts(layout)
    assert layout_of(folder) == {"sharded": "original"}.get(layout, layout)
    modules, states = loaded(Checkpoint(folder, layout_config, files_for(layout)))
    assert list(states) == ["high", "low", "text_encoder", "vae"]
    for name, state in states.items():
        expected = networks[name].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items()), name
    for name in ("high", "low"):
        assert modules[name].config == networks[name].config
    tokens = modules["text_encoder"].tokenizer(["a white cat"])
    assert torch.equal(tokens, wan.modules.tokenizers.HuggingfaceTokenizer(DATA / "umt5-tiny", 32)("a white cat"))


def test_every_layout_gives_the_same_video(layouts: Layouts, layout_config: Any, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "size": (32, 16),
        "frame_num": 1,
        "sampling_steps": 3,
        "guide_scale": (3.0, 4.0),
        "seed": 1,
    }
    videos = []
    for layout in LAYOUTS:
        pipe = wan.WanT2V(layout_config, layouts(layout), device="cpu", files=files_for(layout))
        videos.append(pipe.generate("a white cat", **small))
    root = tmp_path / "ComfyUI"
    files = CheckpointFiles(
        dit=root / "diffusion_models" / "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        dit_low=tmp_path / "diffusers" / "transformer_2",
        vae=tmp_path / "original" / VAE_FILE,
        t5=tmp_path / "diffusers" / "text_encoder" / "model.safetensors.index.json",
        tokenizer=DATA / "umt5-tiny",
    )
    videos.append(wan.WanT2V(layout_config, None, device="cpu", files=files).generate("a white cat", **small))
    assert all(torch.equal(video, videos[0]) for video in videos)
    assert videos[0].std() > 0.01


def test_a_file_named_by_hand_replaces_the_folders(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("original")
    other = {key: value + 1 for key, value in networks["vae"].state_dict().items()}
    files = CheckpointFiles(vae=str(save_weights(tmp_path / "mine.safetensors", other, prefix="model.")))
    _, states = loaded(Checkpoint(folder, layout_config, files))
    assert all(torch.equal(states["vae"][key], value) for key, value in other.items())
    assert torch.equal(states["high"]["patch_embedding.bias"], networks["high"].state_dict()["patch_embedding.bias"])


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_the_token_embedding_is_found_under_either_name(
    layouts: Layouts, save_weights: Save, kept: str, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("original")
    state = {TRANSFORMERS_T5.to_theirs(key): value for key, value in networks["text_encoder"].state_dict().items()}
    table = state.pop("shared.weight")
    state |= {key: table.clone() for key in ("shared.weight", "encoder.embed_tokens.weight") if kept in (key, "both")}
    files = CheckpointFiles(t5=save_weights(tmp_path / "t5.safetensors", state))
    _, states = loaded(Checkpoint(folder, layout_config, files))
    assert torch.equal(states["text_encoder"]["token_embedding.weight"], table)


def test_sizes_that_no_config_tells_are_the_tasks_or_those_of_the_shapes(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    layout_config.update(dim=512)  # not this model's, so that shapes alone decide
    folder = layouts("original")
    dits = [save_weights(tmp_path / f"{name}.safetensors", networks[name].state_dict()) for name in EXPERTS]
    checkpoint = Checkpoint(folder, layout_config, CheckpointFiles(dit=dits[0], dit_low=dits[1]))
    module: Any = checkpoint.components()[0].build()
    assert module.config == networks["high"].config


# The tokenizer in ComfyUI's text encoder file -------------------------------------------------------------------------


def test_the_tokenizer_inside_the_text_encoder_is_used(
    layouts: Layouts, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("ComfyUI")
    modules, _ = loaded(Checkpoint(folder, layout_config))
    for text, ids in json.loads((DATA / "umt5-spiece" / "tokens.json").read_text()).items():
        cleaned = " ".join(text.split())
        if cleaned == text:
            row = modules["text_encoder"].tokenizer(text)[0].tolist()
            assert row == (ids + [0] * 32)[:32]


def test_without_any_tokenizer_the_error_says_which_file_to_fetch(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("ComfyUI")
    save_weights(
        folder / "text_encoders" / "umt5_xxl_fp16.safetensors",
        {TRANSFORMERS_T5.to_theirs(key): value for key, value in networks["text_encoder"].state_dict().items()},
    )
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json of google/umt5-xxl .*--tokenizer"):
        Checkpoint(folder, layout_config).check()
    Checkpoint(folder, layout_config, CheckpointFiles(tokenizer=TOKENIZER)).check()
    with pytest.raises(BadCheckpoint, match=r"--tokenizer '.*nowhere\.json' does not exist"):
        Checkpoint(folder, layout_config, CheckpointFiles(tokenizer=tmp_path / "nowhere.json")).check()


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("original")
    state = dict(networks["text_encoder"].state_dict())
    state["token_embedding.weight"] = state["token_embedding.weight"][:100].clone()
    components = Checkpoint(
        folder, layout_config, CheckpointFiles(t5=save_weights(tmp_path / "t5.safetensors", state))
    ).components()
    with pytest.raises(BadCheckpoint, match=r"t5\.safetensors'.*knows 100 tokens and the tokenizer .* 202"):
        components[2].build()


# Which file, which model ----------------------------------------------------------------------------------------------


def test_several_files_that_fit_are_listed_with_the_flag_that_chooses(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("ComfyUI")
    second = save_weights(folder / "unet" / "Wan2_2-T2V-A14B_HIGH_bf16.safetensors", networks["high"].state_dict())
    with pytest.raises(
        BadCheckpoint, match=r"several files that fit: diffusion_models/wan2.2_t2v_high.*, unet/.*--dit$"
    ):
        Checkpoint(folder, layout_config).check()
    Checkpoint(folder, layout_config, CheckpointFiles(dit=second)).check()
    save_weights(folder / "vae" / "Wan2_1_VAE_bf16.safetensors", networks["vae"].state_dict())
    with pytest.raises(BadCheckpoint, match=r"several files that fit: .*Wan2_1_VAE_bf16.*--vae$"):
        Checkpoint(folder, layout_config, CheckpointFiles(dit=second)).check()


def test_folders_by_their_old_names_and_comfyuis_own_root_are_found(
    layouts: Layouts, layout_config: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "ComfyUI" / "models"
    shutil.move(layouts("ComfyUI"), tmp_path / "models")
    shutil.move(tmp_path / "models", folder)
    (folder / "diffusion_models").rename(folder / "unet")
    (folder / "text_encoders").rename(folder / "clip")
    Checkpoint(tmp_path / "ComfyUI", layout_config).check()


def test_what_a_comfyui_folder_lacks_is_told_with_its_flag(
    layouts: Layouts, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("ComfyUI")
    shutil.rmtree(folder / "vae")
    (folder / "diffusion_models" / "sub" / "wan2.2_t2v_low_noise_14B_fp16.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"lacks the low-noise transformer \(--dit_low\), the VAE \(--vae\)"):
        Checkpoint(folder, layout_config).check()


@pytest.fixture
def published_keys(root: Path) -> Callable[[str], dict[str, list[int]]]:
    """Key -> shape of the published transformers; lists too long to be carried, so the test skips without."""
    folder = root.parent / "shared" / "facts" / "keys"
    if not folder.is_dir():
        pytest.skip("lists of published keys not present")
    return lambda task: json.loads((folder / f"{task}.json").read_text())


@pytest.mark.parametrize(
    ("channels", "marks", "kind"),
    [
        ((16, 16), [], "t2v"),
        ((36, 16), [], "i2v"),
        ((48, 48), [], "ti2v"),
        ((52, 16), [], "52-channel"),
        ((36, 16), ["img_emb.proj.0.weight"], "i2v"),
        ((36, 16), ["condition_embedder.image_embedder.norm1.weight"], "i2v"),
        ((36, 16), ["img_emb.emb_pos", "img_emb.proj.0.weight"], "flf2v"),
        ((16, 16), ["vace_blocks.0.after_proj.weight"], "vace"),
        ((36, 16), ["img_emb.proj.0.weight", "face_adapter.fuser_blocks.0.linear2.weight"], "animate"),
        ((16, 16), ["casual_audio_encoder.weights"], "s2v"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_model_is_told_by_channels_and_keys(
    channels: tuple[int, int],
    marks: list[str],
    kind: str,
    prefix: str,
    write_header: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with torch.device("meta"):
        dit = wan.modules.WanModel(
            dim=128, ffn_dim=64, num_heads=1, num_layers=1, in_dim=channels[0], out_dim=channels[1]
        )
    shapes = {key: list(value.shape) for key, value in dit.state_dict().items()} | dict.fromkeys(marks, [1])
    path = write_header(tmp_path / "wan.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    [found] = held(None, CheckpointFiles(dit=path))
    assert (found.model.kind, found.model.dim, found.experts) == (kind, 128, 1)


@pytest.mark.parametrize(
    ("task", "kind", "experts"),
    [
        ("t2v-1.3B", "t2v", 1), ("t2v-14B", "t2v", 1), ("t2v-A14B", "t2v", 2), ("i2v-14B", "i2v", 1),
        ("i2v-A14B", "i2v", 2), ("flf2v-14B", "flf2v", 1), ("vace-1.3B", "vace", 1), ("vace-14B", "vace", 1),
        ("ti2v-5B", "ti2v", 1), ("s2v-14B", "s2v", 1), ("animate-14B", "animate", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_model_is_told_by_the_published_keys(
    task: str,
    kind: str,
    experts: int,
    prefix: str,
    published_keys: Callable[[str], dict[str, list[int]]],
    write_header: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shapes = published_keys(task)
    names = ["high_noise.safetensors", "low_noise.safetensors"] if experts == 2 else ["wan.safetensors"]
    paths = [write_header(tmp_path / name, {prefix + key: shape for key, shape in shapes.items()}) for name in names]
    files = CheckpointFiles(dit=paths[0], dit_low=paths[1] if experts == 2 else None)
    [found] = held(None, files)
    assert (found.model.kind, found.experts) == (kind, experts)
    assert found.model.dim == shapes["patch_embedding.weight"][0]


def test_an_expert_named_high_noise_alone_is_not_taken_for_a_whole_model(
    save_weights: Save, networks: Networks, tmp_path: Path
) -> None:
    path = save_weights(tmp_path / "wan2.2_t2v_high_noise_14B.safetensors", networks["high"].state_dict())
    assert held(None, CheckpointFiles(dit=path))[0].experts == 2
