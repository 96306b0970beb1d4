"""`--upstream`: a clone is run as it is, and each of its stages is held against ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wan.cli.benchmarking.trial import Seen, Trial
from wan.cli.benchmarking.upstream import Upstream, check_upstream, stage_differences
from wan.cli.request import Wanted
from wan.engine.errors import BadRequest, GenerationFailed, IncompatibleOptions
from wan.engine.hardware import Hardware

CLONE = '''
"""Names, calls and order of Wan 2.2's WanT2V; each network is a formula that a test can compute too."""
from types import SimpleNamespace
import torch
from torch import nn

class Encoder:
    """T5EncoderModel: a list of [tokens, D], without padding."""
    def __init__(self):
        self.model = nn.Linear(1, 1)
    def __call__(self, texts, device):
        return [torch.full((len(text), 4), float(len(text))) for text in texts]

class Model(nn.Module):
    """WanModel: lists in, lists out."""
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def forward(self, x, t, context, seq_len):
        return [self.factor * u + context[0].mean() for u in x]

class VAE:
    """Wan2_1_VAE is no nn.Module either."""
    def decode(self, zs):
        return [z[:3, :, :2, :2].clamp(-1, 1) for z in zs]

class WanT2V:
    def __init__(self, config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_sp=False,
                 t5_cpu=False, init_on_cpu=True, convert_model_dtype=False):
        print("printed by the clone, on standard output")
        self.config, self.text_encoder, self.vae = config, Encoder(), VAE()
        self.high_noise_model, self.low_noise_model = Model(2.0), Model(-1.0)
    def generate(self, input_prompt, size=(1280, 720), frame_num=81, shift=5.0, sample_solver="unipc",
                 sampling_steps=50, guide_scale=5.0, n_prompt="", seed=-1, offload_model=True):
        print("generating")
        if input_prompt == "break":
            raise RuntimeError("the clone broke")
        self.text_encoder.model.to("cpu")
        shape = (16, (frame_num - 1) // 4 + 1, size[1] // 8, size[0] // 8)
        context = self.text_encoder([input_prompt], "cpu")
        null = self.text_encoder([n_prompt or "bad"], "cpu")
        noise = [torch.randn(*shape, dtype=torch.float32, device="cpu", generator=torch.Generator())]
        latents = noise
        for step in range(sampling_steps):
            model = self.high_noise_model if step < 1 else self.low_noise_model
            cond = model(latents, t=torch.tensor([9]), context=context, seq_len=1)[0]
            uncond = model(latents, t=torch.tensor([9]), context=null, seq_len=1)[0]
            latents = [latents[0] - 0.1 * (uncond + guide_scale[1] * (cond - uncond))]
        return self.vae.decode(latents)[0]
'''


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "Wan2.2"
    (folder / "wan" / "configs").mkdir(parents=True)
    (folder / "wan" / "__init__.py").write_text("from . import configs\nfrom .text2video import WanT2V\n")
    (folder / "wan" / "text2video.py").write_text(CLONE)
    (folder / "wan" / "configs" / "__init__.py").write_text("WAN_CONFIGS = {'t2v-A14B': object()}\n")
    return folder


@pytest.fixture
def wanted(tiny_config: Any, tmp_path: Path) -> Wanted:
    return Wanted(
        task="t2v-A14B", config=tiny_config, checkpoint=tmp_path, prompt="a fox", n_prompt="blurry one", width=32,
        height=16, num_frames=9, fps=16, steps=2, shift=5.0, solver="unipc", guide_scale=(3.0, 4.0), seed=7,
    )  # fmt: skip


CPU = Hardware(device=torch.device("cpu"), name="CPU")


@pytest.fixture
def runner(clone: Path, wanted: Wanted) -> Iterator[Upstream]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with closing(Upstream(clone, wanted, CPU, None)) as started:
            yield started


def expected() -> dict[str, torch.Tensor]:
    """What the clone computes, by hand: the seed's noise, then two guided steps of its formulas."""
    noise = torch.randn(16, 3, 2, 4, generator=torch.Generator().manual_seed(7))
    first = 2 * noise + 10 + 4 * (5 - 10)  # texts of 5 and 10 letters, guidance 4 at high noise
    second = noise - 0.1 * first
    latents = second - 0.1 * (-second + 10 + 4 * (5 - 10))
    return {"noise": noise, "velocity": first, "latents": latents, "frames": latents[:3, :, :2, :2].clamp(-1, 1)}


def test_the_clone_makes_every_stage_from_the_same_noise(runner: Upstream) -> None:
    """Twice in one process; what it prints does not get among the answers. 1e-6: float32 in another order."""
    from wan.video import to_pixels

    should = expected()
    for _ in range(2):
        trial = runner.run(watch=True)
        assert trial.seen is not None and trial.seen.velocity is not None
        assert np.array_equal(trial.seen.texts["cond"], np.full((5, 4), 5.0))
        assert np.array_equal(trial.seen.texts["uncond"], np.full((10, 4), 10.0))
        torch.testing.assert_close(torch.tensor(trial.seen.velocity)[0], should["velocity"], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(torch.tensor(trial.latents)[0], should["latents"], rtol=1e-6, atol=1e-5)
        assert torch.equal(runner.frames, to_pixels(should["frames"]))
        assert trial.forwards == 4 and set(trial.stages) == {"text", "denoise", "decode"}
        assert trial.seconds == pytest.approx(sum(trial.stages.values()))


def test_differences_are_told_stage_by_stage() -> None:
    """Equal where nothing differs; a velocity that is off by 1 % is off by 1 % and what follows is not blamed."""
    texts = {"cond": np.ones((5, 4)), "uncond": np.ones((3, 4))}
    padded = {branch: np.pad(text, ((0, 6), (0, 0))) for branch, text in texts.items()}
    velocity, latents = np.full((1, 2, 2, 2, 2), 4.0), np.ones((1, 2, 2, 2, 2))
    theirs = Trial(
        seconds=1.0, stages={}, components={}, peaks={}, latents=latents, seen=Seen(texts=texts, velocity=velocity)
    )
    ours = dataclasses.replace(theirs, seen=Seen(texts=padded, velocity=1.01 * velocity))
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    told = {
        stage: (relative, most) for stage, relative, most in stage_differences(ours, theirs, (frames + 3, frames + 1))
    }
    assert list(told) == ["text, cond", "text, uncond", "first velocity", "final latents", "frames, of 255"]
    assert told["text, cond"] == told["text, uncond"] == told["final latents"] == (0.0, 0.0)
    assert told["first velocity"] == (pytest.approx(0.01), pytest.approx(0.04))
    assert told["frames, of 255"] == (2.0, 2.0)
    assert list(stage_differences(ours, theirs, (frames, frames[:, :1])))[-1] == ("frames, of 255", None, None)


def test_a_clone_that_breaks_fails_its_row(clone: Path, wanted: Wanted, capfd: Any) -> None:
    with (
        closing(Upstream(clone, dataclasses.replace(wanted, prompt="break"), CPU, None)) as runner,
        pytest.raises(GenerationFailed, match="--upstream ended"),
    ):
        runner.run(watch=False)
    assert "the clone broke" in capfd.readouterr().err


def test_what_a_clone_cannot_do_is_refused_before_it_starts(clone: Path, wanted: Wanted, tmp_path: Path) -> None:
    check_upstream(clone, wanted)
    with pytest.raises(BadRequest, match=r"wan/__init__\.py"):
        check_upstream(tmp_path, wanted)
    with pytest.raises(IncompatibleOptions, match="euler"):
        check_upstream(clone, dataclasses.replace(wanted, solver="euler"))
    with pytest.raises(IncompatibleOptions, match="--ckpt_dir"):
        check_upstream(clone, dataclasses.replace(wanted, checkpoint=None))
