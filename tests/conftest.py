"""Every test starts from the same seed, on one thread, and leaves no compiled code behind. Tiny checkpoints for all."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch starts its thread pool
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell that keeps Ctrl-C from it, which its children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """The same random numbers whatever ran before; dynamo's caches are emptied after a test that compiled."""
    torch.manual_seed(0)
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the program remembers between runs stays out of the user's cache folder, and out of other test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one left in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Recorded outputs of the original code; too large to be carried, so tests that need them skip without."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("golden values not present")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete two-expert checkpoint folder in the published layout, 4 MB of random float32 weights."""
    from wan.modules.model import WanModel
    from wan.modules.t5 import T5Encoder
    from wan.modules.vae import WanVAEModel
    from wan.modules.vae_config import VAEConfig

    folder = tmp_path_factory.mktemp("tiny") / "Tiny-T2V-A14B"
    with torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(("high_noise_model", "low_noise_model")):
            torch.manual_seed(seed)
            sizes = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32, "num_heads": 2, "num_layers": 2}
            dit = WanModel(**sizes)  # type: ignore[arg-type]
            nn.init.normal_(dit.head.head.weight, std=0.1)  # born as zeros: nothing would reach the output
            dit.save_pretrained(folder / name)
        encoder = T5Encoder(320, 32, 32, 48, num_heads=2, num_layers=1, num_buckets=8, shared_pos=False)
        torch.save(encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        vae = WanVAEModel(VAEConfig(encoder_dim=8, decoder_dim=8, num_res_blocks=1))
        torch.save(vae.state_dict(), folder / "Wan2.1_VAE.pth")
    shutil.copytree(ROOT / "tests" / "wan" / "data" / "umt5-tiny", folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="session")
def tiny_task() -> Any:
    """The task configuration that goes with `tiny_checkpoint`."""
    from easydict import EasyDict

    from wan.configs import WAN_CONFIGS

    config = EasyDict(WAN_CONFIGS["t2v-A14B"])
    sizes = {"dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2, "num_layers": 2, "text_len": 32}
    config.update(sizes, param_dtype=torch.float32, t5_dtype=torch.float32, sample_neg_prompt="blurry")
    return config


@pytest.fixture
def tiny_config(tiny_task: Any) -> Any:
    """A copy of it, free to change."""
    return type(tiny_task)(tiny_task)


@pytest.fixture
def programs_agree(tmp_path: Path) -> Callable[[list[str]], None]:
    """`agree(argv)`: what generate_optimized.py makes of a command line beside what generate.py makes of it.

    Without a preset, and in the conservative call on its own one, it is the same file, byte for byte.
    """
    from wan.cli.generate import main
    from wan.video import verify_video

    conservative = ["--no-compile", "--no-batched_cfg", "--offload_model", "True"]

    def agree(argv: list[str]) -> None:
        if "--save_file" in argv:
            at = argv.index("--save_file")
            argv = argv[:at] + argv[at + 2 :]

        def made(name: str, *flags: str, **program: Any) -> Path:
            file = tmp_path / name
            assert main([*argv, "--save_file", str(file), "--no_metadata", "--crf", "0", *flags], **program) == 0
            return file

        optimized: dict[str, Any] = {"default_preset": "auto", "variables": True}
        plain = made("plain.mp4")
        assert made("none.mp4", "--preset", "none", **optimized).read_bytes() == plain.read_bytes()
        assert made("careful.mp4", *conservative, **optimized).read_bytes() == plain.read_bytes()
        assert verify_video(made("auto.mp4", **optimized)) == verify_video(plain)

    return agree


@pytest.fixture(scope="session")
def write_header() -> Callable[[Path, Mapping[str, Sequence[int]]], Path]:
    """Writes a safetensors file of any size that takes no room: a header, and a hole where the weights would be."""
    import json
    import math

    def write(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, at = {}, 0
        for key, shape in shapes.items():
            rows[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * math.prod(shape)]}
            at += 2 * math.prod(shape)
        header = json.dumps(rows).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + at)
        return path

    return write


@pytest.fixture(scope="session")
def speech_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete speech-to-video checkpoint: tests/speech_models.py."""
    sys.path.insert(0, str(Path(__file__).parent))
    from speech_models import save_checkpoint

    folder = tmp_path_factory.mktemp("speech") / "Tiny-S2V-14B"
    return save_checkpoint(folder, ROOT / "tests" / "wan" / "data" / "umt5-tiny")


@pytest.fixture(scope="session")
def tiny_wav2vec(speech_checkpoint: Path) -> Path:
    """The speech model in it."""
    return speech_checkpoint / "wav2vec2-large-xlsr-53-english"


@pytest.fixture(scope="session")
def save_chat_model() -> Callable[..., Path]:
    """Writes a tiny chat model into a folder: tests/chat_models.py."""
    sys.path.insert(0, str(Path(__file__).parent))
    from chat_models import save_chat_model

    return save_chat_model


@pytest.fixture(scope="session")
def chat_models(save_chat_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny chat models that extend prompts: `blind` reads text, `sees` also takes pictures."""
    folder = tmp_path_factory.mktemp("chat")
    save_chat_model(folder / "blind")
    save_chat_model(folder / "sees", sees=True)
    return folder
