"""What does not fit is refused by file and key, from headers, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan
from wan.components import Checkpoint
from wan.engine.errors import BadCheckpoint
from wan.engine.weights.keymap import DIFFUSERS_DIT
from wan.layouts import CheckpointFiles

DATA = Path(__file__).parent / "data"
EXPERTS = ("high", "low")
T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"

Networks = dict[str, nn.Module]
State = dict[str, Tensor]
Layouts = Callable[[str], Path]
Save = Callable[..., Path]


def broken(state: State, fault: str) -> State:
    state = dict(state)
    if fault == "missing":
        del state["blocks.1.ffn.2.weight"]
    elif fault == "unknown":
        state["blocks.0.ffn.2.lora_up"] = torch.zeros(1)
    elif fault == "misshaped":
        state["blocks.1.ffn.2.weight"] = torch.zeros(384, 7)
    elif fault == "no last block":
        state = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    return state


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", r"1 missing \(model\.diffusion_model\.blocks\.1\.ffn\.2\.weight\)"),
        ("unknown", r"1 unexpected \(model\.diffusion_model\.blocks\.0\.ffn\.2\.lora_up\)"),
        ("misshaped", r"1 of the wrong shape \(\S*\.blocks\.1\.ffn\.2\.weight is \[384, 7\], not \[384, 96\]\)"),
        ("no last block", r"num_layers = 2 but the weights have 1"),
    ],
)  # fmt: skip
def test_keys_and_shapes_are_compared_before_a_weight_is_read(
    layouts: Layouts, save_weights: Save, fault: str, says: str, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("original")
    dits = [
        save_weights(
            tmp_path / f"{name}.safetensors",
            broken(networks[name].state_dict(), fault),
            prefix="model.diffusion_model.",
        )
        for name in EXPERTS
    ]
    with pytest.raises(BadCheckpoint, match=rf"high\.safetensors'.*{says}") as caught:
        Checkpoint(folder, layout_config, CheckpointFiles(dit=dits[0], dit_low=dits[1])).check()
    assert "\n" not in str(caught.value)


def test_keys_are_named_as_the_file_names_them(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("diffusers")
    state = dict(networks["low"].state_dict())
    del state["blocks.1.self_attn.norm_q.weight"]
    save_weights(folder / "transformer_2" / "diffusion_pytorch_model.safetensors", state, DIFFUSERS_DIT)
    with pytest.raises(BadCheckpoint, match=r"transformer_2/.*1 missing \(blocks\.1\.attn1\.norm_q\.weight\)"):
        Checkpoint(folder, layout_config).check()


def test_a_weight_under_two_names_is_refused(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("diffusers")
    state = {DIFFUSERS_DIT.to_theirs(key): value for key, value in networks["low"].state_dict().items()}
    state["head.head.bias"] = state["proj_out.bias"].clone()
    save_weights(folder / "transformer_2" / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(BadCheckpoint, match=r"transformer_2/.*'proj_out\.bias' twice"):
        Checkpoint(folder, layout_config).check()


def test_networks_that_do_not_belong_together_are_refused(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    from wan.modules.t5 import T5Encoder

    folder = layouts("original")
    torch.save(
        T5Encoder(400, 64, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False).state_dict(),
        folder / T5_FILE,
    )
    with pytest.raises(BadCheckpoint, match=rf"text embeddings of width 32, '.*{T5_FILE}' makes them 64 wide"):
        Checkpoint(folder, layout_config).check()


def test_a_file_in_the_wrong_place_says_what_it_is(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("original")
    vae = save_weights(tmp_path / "vae.safetensors", networks["vae"].state_dict())
    with pytest.raises(BadCheckpoint, match=r"vae\.safetensors' is a video VAE, not a transformer"):
        Checkpoint(folder, layout_config, CheckpointFiles(dit=vae)).check()
    lora = save_weights(tmp_path / "lora.safetensors", {"diffusion_model.head.lora_up.weight": torch.zeros(1)})
    with pytest.raises(
        BadCheckpoint, match=r"lora\.safetensors' is no transformer: its first weight is 'diffusion_model\.head"
    ):
        Checkpoint(folder, layout_config, CheckpointFiles(dit=lora)).check()
    with pytest.raises(BadCheckpoint, match=r"--dit_low '.*': this task has one transformer"):
        one = {key: value for key, value in layout_config.items() if not key.endswith("_noise_checkpoint")}
        Checkpoint(folder, type(layout_config)(one), CheckpointFiles(dit_low=vae)).check()


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("blocks.0.ffn.0.weight", torch.zeros(96, 256, dtype=torch.int8), "int8 file .*is int8"),
        ("blocks.0.ffn.0.weight", torch.zeros(96, 128, dtype=torch.uint8), "uint8 file .*is uint8"),
    ],
)  # fmt: skip
def test_quantised_files_are_refused_by_name(
    layouts: Layouts,
    save_weights: Save,
    key: str,
    tensor: Tensor,
    says: str,
    networks: Networks,
    layout_config: Any,
    tmp_path: Path,
) -> None:
    folder = layouts("original")
    path = save_weights(tmp_path / "wan_q.safetensors", dict(networks["high"].state_dict()) | {key: tensor})
    with pytest.raises(BadCheckpoint, match=rf"wan_q\.safetensors' is a quantised .*{says}.*bf16 or fp16 file"):
        Checkpoint(folder, layout_config, CheckpointFiles(dit=path)).check()


def test_a_file_in_8_bits_is_taken_where_there_is_no_other_and_gguf_is_named(
    layouts: Layouts, save_weights: Save, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    folder = layouts("ComfyUI")
    low = folder / "diffusion_models" / "sub" / "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    state = dict(networks["low"].state_dict()) | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_weights(low.with_name("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"), state)
    assert Checkpoint(folder, layout_config).places.paths["low"] == low
    low.unlink()
    assert "fp8" in str(Checkpoint(folder, layout_config).places.paths["low"])
    Checkpoint(folder, layout_config).check()
    (folder / "diffusion_models" / "wan2.2_t2v_high_noise_14B_fp16.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"high_noise_14B_Q8_0\.gguf' is a GGUF file"):
        Checkpoint(folder, layout_config).check()


def test_a_transformer_for_another_kind_of_task_is_refused(
    layouts: Layouts, networks: Networks, layout_config: Any, tmp_path: Path
) -> None:
    from wan.modules.model import WanModel

    folder = layouts("original")
    WanModel(dim=384, ffn_dim=96, freq_dim=32, text_dim=32, num_heads=3, num_layers=2, in_dim=36).save_pretrained(
        folder / "high_noise_model"
    )
    with pytest.raises(BadCheckpoint, match=r"high_noise_model/.* is a transformer for i2v; .* needs one for t2v"):
        wan.WanT2V(layout_config, folder, device="cpu")
