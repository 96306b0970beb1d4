"""Step caches on a tiny two-expert model: what is skipped, what never is, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.caching.reuse import ReusedResidual, ReusedVelocity
from wan.engine.errors import BadRequest
from wan.engine.optimizations.step_cache import embedding_distances
from wan.engine.types import Condition, Step

TABLE = str(Path(__file__).parents[2] / "data" / "cache-tiny.json")
CALL: dict[str, Any] = {
    "size": (32, 32), "frame_num": 1, "sampling_steps": 16, "seed": 1, "shift": 3.0, "guide_scale": 4.0,
    "offload_model": None,
}  # fmt: skip


def step(index: int, count: int = 8) -> Step:
    return Step(index=index, count=count, t=900.0 - 100 * index, sigma=0.9, sigma_next=0.8)


class Model:
    """A pipeline on the tiny checkpoint, with the (expert, step) of every forward of the conditional branch."""

    def __init__(self, checkpoint: Path, config: Any) -> None:
        self.pipe = wan.WanT2V(config, checkpoint, device="cpu")
        self.ran: list[int] = []
        for name in self.pipe.engine.expert_names:
            dit = self.pipe.engine.network(name)
            trunk = dit.trunk
            dit.trunk = lambda tokens, inputs, condition, at, _trunk=trunk: (
                self.ran.append(at.index) if "cond" in inputs.branches else None,
                _trunk(tokens, inputs, condition, at),
            )[1]

    def __call__(self, **options: Any) -> Tensor:
        self.ran.clear()
        video = self.pipe.generate("a red bird", **CALL, **options)
        assert video is not None
        return video

    @property
    def switch(self) -> int:
        """Index of the low-noise expert's first step."""
        planned = self.pipe.report.forwards[-1].planned
        return planned["high", "cond"][1]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tiny_task: Any) -> Model:
    return Model(tiny_checkpoint, type(tiny_task)(tiny_task))


@pytest.mark.parametrize("cache", ["tea", "mag"])
def test_the_first_step_of_each_expert_and_the_last_are_computed(model: Model, cache: str) -> None:
    plain = model()
    video = model(cache=cache, cache_table=TABLE, cache_threshold=1e9, cache_max_skips=99, cache_retain=0.0)
    assert model.ran == [0, model.switch, 15]
    assert torch.isfinite(video).all() and not torch.equal(video, plain)


@pytest.mark.parametrize("cache", ["tea", "mag", "easy"])
def test_a_threshold_of_zero_gives_the_same_bits_as_no_cache(model: Model, cache: str) -> None:
    assert torch.equal(model(cache=cache, cache_table=TABLE, cache_threshold=0.0), model())
    assert model.ran == list(range(16))


def test_easy_computes_ten_steps_and_the_last_one(model: Model) -> None:
    model(cache="easy", cache_threshold=1e9)
    assert model.switch + 2 <= 10, "the low-noise expert has measured its rate by then"
    assert model.ran == [*range(10), 15]


@pytest.mark.parametrize("cache", ["tea", "mag", "easy"])
def test_batched_guidance_skips_the_same_steps(model: Model, cache: str) -> None:
    options = {"cache": cache, "cache_table": TABLE, "cache_threshold": 0.2}
    video = model(**options)
    ran = list(model.ran)
    assert (model(use_batched_cfg=True, **options) - video).abs().max() < 1e-4
    assert model.ran == ran and len(ran) < 16


def test_tea_measures_the_time_embedding_of_the_very_steps(model: Model) -> None:
    dit: Any = model.pipe.engine.network("high")
    steps = [step(index) for index in range(3)]
    e = [dit.time_signals(torch.tensor([s.t]))[0][0] for s in steps]
    expected = [0.0] + [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(e, e[1:], strict=False)]
    assert embedding_distances(dit, steps, "e") == pytest.approx(expected, rel=1e-5)


# The two ways to answer a step ------------------------------------------------------------------------------------


class Inputs:
    def __init__(self, *branches: str) -> None:
        self.branches = branches


def counted(calls: list[tuple[int, tuple[str, ...]]]) -> Any:
    def trunk(tokens: Tensor, inputs: Any, condition: Any, at: Step) -> Tensor:
        calls.append((at.index, inputs.branches))
        return tokens + len(calls)

    return trunk


def test_a_skipped_step_adds_the_last_residual_of_its_own_branch() -> None:
    calls: list[tuple[int, tuple[str, ...]]] = []
    trunk = ReusedResidual(counted(calls), {1, 2}, torch.float32)
    tokens = torch.zeros(1, 2, 3)
    for name in ("uncond", "cond"):
        trunk(tokens, Inputs(name), None, step(0))
    later = [trunk(tokens + 10, Inputs(name), None, step(i)) for i in (1, 2) for name in ("uncond", "cond")]
    assert [float(each.mean()) for each in later] == [11, 12, 11, 12]
    assert calls == [(0, ("uncond",)), (0, ("cond",))]


def test_a_branch_that_was_not_asked_for_in_the_last_computed_step_is_computed() -> None:
    calls: list[tuple[int, tuple[str, ...]]] = []
    trunk = ReusedResidual(counted(calls), {1, 3}, torch.float32)
    tokens = torch.zeros(1, 2, 3)
    trunk(tokens, Inputs("uncond"), None, step(0))
    trunk(tokens, Inputs("cond"), None, step(0))
    trunk(tokens, Inputs("cond"), None, step(2))
    trunk(tokens, Inputs("uncond"), None, step(3))
    assert calls[-1] == (3, ("uncond",)), "its residual is of step 0"


def test_easy_follows_the_published_rule() -> None:
    """Independent of the code: rate k of two computed steps, k * drift / |velocity| summed until the threshold."""
    xs = [torch.full((1, 1, 1, 2, 2), value) for value in (0.0, 1.0, 1.5, 1.9, 2.4)]
    outputs = iter(torch.full((1, 1, 1, 2, 2), value) for value in (2.0, 3.0, 5.0))
    asked: list[int] = []

    def inner(latents: Tensor, at: Step, branches: Any) -> dict[str, Tensor]:
        asked.append(at.index)
        return {"cond": next(outputs)}

    easy = ReusedVelocity(inner, {2, 3, 4}, threshold=0.31)
    condition = {"cond": Condition(context=torch.zeros(1, 1, 1))}
    got = [float(easy(x, step(i), condition)["cond"].mean()) for i, x in enumerate(xs)]
    # k = |3 - 2| / |1 - 0| = 1; step 2: 0.5 / 3 = 0.17, skipped; step 3: + 0.4 / 3 = 0.30, skipped; step 4: over.
    assert asked == [0, 1, 4]
    assert got == pytest.approx([2.0, 3.0, 1.5 + 2.0, 1.9 + 2.0, 5.0])


# What a user is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "tea"}, "nobody has published a table for this model"),
        ({"cache": "mag", "cache_table": "nowhere.json"}, "neither a file nor one of Wan2.1"),
        ({"cache": "mag", "cache_table": "Wan2.1-T2V-1.3B"}, "'high' is missing"),
        ({"cache": "mag", "cache_table": "Wan2.2-TI2V-5B"}, "use --cache tea or easy"),
        ({"cache": "tea", "cache_table": "Wan2.2-TI2V-5B", "cache_signal": "e0"}, "coefficients for e only"),
        ({"cache": "easy", "cache_threshold": -0.1}, "--cache_threshold -0.1"),
        ({"cache": "mag", "cache_max_skips": 0}, "--cache_max_skips 0"),
        ({"cache": "mag", "cache_retain": 1.5}, "--cache_retain 1.5"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, tiny_config: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequest, match=said):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", **options)


def test_a_damaged_table_is_named(tmp_path: Path, tiny_checkpoint: Path, tiny_config: Any) -> None:
    file = tmp_path / "table.json"
    for text, said in (("{", "cannot be read"), ("[]", "is no table"), (json.dumps({"mag": {"ratios": 3}}), "damaged")):
        file.write_text(text)
        with pytest.raises(BadRequest, match=said):
            wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", cache="mag", cache_table=str(file))


def test_a_model_with_two_published_tables_is_asked_which(tiny_checkpoint: Path, tiny_config: Any) -> None:
    tiny_config["__name__"] = "Config: Wan I2V 14B"
    with pytest.raises(BadRequest, match="Wan2.1-I2V-14B-480P' or 'Wan2.1-I2V-14B-720P"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", cache="mag")
