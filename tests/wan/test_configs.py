"""The numbers of every task, against a table recorded from upstream's configuration files and command line."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

import wan.configs
from wan.cli.checkpoint import SHIPPED
from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from wan.layouts import locate

SHARED = {
    "t5_model": "umt5_xxl",
    "t5_dtype": torch.bfloat16,
    "text_len": 512,
    "param_dtype": torch.bfloat16,
    "num_train_timesteps": 1000,
    "sample_fps": 16,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "t5_checkpoint": "models_t5_umt5-xxl-enc-bf16.pth",
    "t5_tokenizer": "google/umt5-xxl",
    "vae_checkpoint": "Wan2.1_VAE.pth",
    "vae_stride": (4, 8, 8),
}
BIG = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
CLIP = {
    "clip_model": "clip_xlm_roberta_vit_h_14",
    "clip_dtype": torch.float16,
    "clip_checkpoint": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "clip_tokenizer": "xlm-roberta-large",
}
WAN_2_1 = {"sample_steps": 50, "sample_shift": 5.0, "sample_guide_scale": 5.0}
TASKS = {
    "t2v-1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "frame_num": 81} | WAN_2_1,
    "t2v-14B": BIG | WAN_2_1 | {"frame_num": 81},
    "t2i-14B": BIG | WAN_2_1 | {"frame_num": 1},
    "t2v-A14B": BIG
    | {
        "frame_num": 81,
        "sample_steps": 40,
        "sample_shift": 12.0,
        "sample_guide_scale": (3.0, 4.0),
        "boundary": 0.875,
        "low_noise_checkpoint": "low_noise_model",
        "high_noise_checkpoint": "high_noise_model",
    },
    "i2v-14B": BIG | WAN_2_1 | CLIP | {"frame_num": 81, "sample_steps": 40},
    "flf2v-14B": BIG | WAN_2_1 | CLIP | {"frame_num": 81, "sample_shift": 16.0},
    "i2v-A14B": BIG
    | {
        "frame_num": 81,
        "sample_steps": 40,
        "sample_shift": 5.0,
        "sample_guide_scale": (3.5, 3.5),
        "boundary": 0.9,
        "low_noise_checkpoint": "low_noise_model",
        "high_noise_checkpoint": "high_noise_model",
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_values_are_upstreams(task: str) -> None:
    config = WAN_CONFIGS[task]
    for field, value in (SHARED | TASKS[task]).items():
        assert config[field] == value, field
        assert type(config[field]) is type(value), field
    assert ("boundary" in config) == task.endswith("A14B")


@pytest.mark.parametrize("task", TASKS)
def test_negative_prompt_is_byte_exact(task: str) -> None:
    digest = hashlib.sha256(WAN_CONFIGS[task].sample_neg_prompt.encode("utf-8")).hexdigest()
    shared = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    own = {
        "i2v-14B": "412753d092bcf3708424769cd0f54e27973d53a12e229e5492b718457213fc2f",
        "flf2v-14B": "43885bed372496a7998e1c1c83a19dd46254345e0b2c9a23e6fafde8f9d6e106",
    }
    assert digest == own.get(task, shared)


def test_entries_have_names_and_are_independent() -> None:
    names = {task: config["__name__"] for task, config in WAN_CONFIGS.items()}
    assert names["t2v-14B"] == "Config: Wan T2V 14B"
    assert names["t2i-14B"] == "Config: Wan T2I 14B"
    assert names["t2v-1.3B"] == "Config: Wan T2V 1.3B"
    assert names["i2v-14B"] == "Config: Wan I2V 14B"
    assert names["flf2v-14B"] == "Config: Wan FLF2V 14B"
    assert names["i2v-A14B"] == "Config: Wan I2V A14B"
    assert names["t2v-A14B"] == "Config: Wan T2V A14B"
    assert len(set(names.values())) == len(names)
    WAN_CONFIGS["t2i-14B"].probe = 1
    try:
        assert all("probe" not in config for task, config in WAN_CONFIGS.items() if task != "t2i-14B")
    finally:
        del WAN_CONFIGS["t2i-14B"]["probe"]


def test_demo_has_upstreams_two_expert_layout() -> None:
    demo = WAN_CONFIGS["t2v-demo"]
    assert (demo.low_noise_checkpoint, demo.high_noise_checkpoint) == ("low_noise_model", "high_noise_model")
    assert demo.dim // demo.num_heads == 128
    assert demo.frame_num % 4 == 1
    assert demo.sample_neg_prompt == ""
    assert set(WAN_CONFIGS["t2v-A14B"]) <= set(demo)


@pytest.mark.parametrize("task", SHIPPED)
def test_demo_config_matches_the_shipped_model(task: str) -> None:
    folder = Path(__file__).parents[2] / "demo" / SHIPPED[task]
    if not (folder / "high_noise_model").is_dir():
        pytest.skip(f"the model of {task} is not present")
    demo = WAN_CONFIGS[task]
    for expert in (demo.low_noise_checkpoint, demo.high_noise_checkpoint):
        shipped = json.loads((folder / expert / "config.json").read_text(encoding="utf-8"))
        for field in ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_len", "eps"):
            assert shipped[field] == demo[field], field
    assert not locate(folder, demo).lacking()


def test_sizes() -> None:
    for name, (width, height) in SIZE_CONFIGS.items():
        assert name == f"{width}*{height}"
        assert MAX_AREA_CONFIGS[name] == width * height
    wan_2_1 = {"720*1280", "1280*720", "480*832", "832*480", "1024*1024"}
    wan_2_2 = {"704*1280", "1280*704", "1024*704", "704*1024"}
    assert wan_2_1 | wan_2_2 | {"96*96"} == set(SIZE_CONFIGS)


def test_supported_sizes() -> None:
    four = {"720*1280", "1280*720", "480*832", "832*480"}
    small = {"480*832", "832*480"}
    tall = {"704*1280", "1280*704"}
    expected = dict.fromkeys(("t2v-14B", "i2v-14B", "flf2v-14B", "vace-14B", "t2v-A14B", "i2v-A14B"), four)
    expected |= {"t2v-1.3B": small, "vace-1.3B": small, "t2i-14B": four | {"1024*1024"}, "ti2v-5B": tall}
    expected |= {
        "i2v-demo": {"96*96"},
        "s2v-14B": four | tall | {"1024*704", "704*1024"},
        "animate-14B": four - small,
        "t2v-demo": {"96*96"},
    }
    assert {task: set(sizes) for task, sizes in SUPPORTED_SIZES.items()} == expected
    assert set(WAN_CONFIGS) <= set(SUPPORTED_SIZES)


def test_import_quiets_the_tokenizer_but_keeps_a_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vars(wan.configs).copy().items():  # others hold what stands there before the reload
        monkeypatch.setattr(wan.configs, name, value)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    importlib.reload(wan.configs)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    importlib.reload(wan.configs)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
