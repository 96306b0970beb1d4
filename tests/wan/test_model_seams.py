"""The DiT's seams and its cost: what may be hung into it or wrapped, nothing recomputed, no waiting."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wan.engine.types import Condition, Step
from wan.modules.blocks import Adapter, BlockInputs
from wan.modules.model import WanModel

TINY = {"dim": 96, "ffn_dim": 160, "num_heads": 3, "num_layers": 3, "text_dim": 48, "freq_dim": 64, "text_len": 12}
FLOAT32 = 1e-5  # float32 against float32: only the order of sums differs


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def tiny(**changes: Any) -> WanModel:
    model = WanModel(**(TINY | changes)).eval()
    nn.init.normal_(model.head.head.weight, std=0.1)  # born as zeros: nothing would reach the output
    return model.requires_grad_(False)


def condition(batch: int = 1) -> Condition:
    return Condition(context=torch.randn(batch, 7, TINY["text_dim"]))


def latents(batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 3, 4, 6)


class Modulating(TorchDispatchMode):
    """Counts additions of rows of modulation: of all six, or of the two scales among them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, rows = func.__name__.split(".")[0], tuple(out.shape[-2:]) if isinstance(out, Tensor) else ()
        self.count += (name, rows) in (("add", (6, TINY["dim"])), ("add_", (2, TINY["dim"])))
        return out


@torch.no_grad()
def test_modulation_of_all_blocks_is_two_additions_and_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for tables so large that they are made block by block: a row a token of a long video."""
    model, x, given = tiny(num_layers=5), latents(), condition()
    for timestep in (torch.tensor([500.0]), torch.tensor([[0.0, 500.0, 900.0]])):
        made = []
        for limit, launches in ((2**23, 2), (5 * timestep.numel() * 6 * TINY["dim"] - 1, 10)):
            monkeypatch.setattr("wan.modules.joints.RUN_VALUES", limit)
            with Modulating() as modulating:
                made.append(model.velocity(x, timestep, given))
            assert modulating.count == launches
        assert torch.equal(*made)


# ---- cost ------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.names.append(name)
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        tensors = [a for a in args if isinstance(a, (list, tuple)) and name == "index"]
        assert not any(i is not None and i.dtype == torch.bool for group in tensors for i in group)
        return func(*args, **(kwargs or {}))


def frame_times(count: int) -> Tensor:
    return torch.linspace(0, 900, count)[None]


@pytest.mark.parametrize("t", [torch.tensor([500.0]), frame_times(3)], ids=["one", "per frame"])
def test_velocity_never_waits_for_the_device(t: Tensor) -> None:
    model, x, cond = tiny(), latents(), condition()
    with NoWaiting(), torch.no_grad():
        model.velocity(x, t, cond)


def test_text_and_positions_are_computed_once_per_condition() -> None:
    model, x, cond = tiny(), latents(), condition()
    calls: list[str] = []
    model.text_embedding.register_forward_hook(lambda *_: calls.append("text"))
    with torch.no_grad():
        with NoWaiting() as first:
            model.velocity(x, torch.tensor([900.0]), cond)
        with NoWaiting() as second:
            model.velocity(x, torch.tensor([800.0]), cond)
    assert calls == ["text"]
    # Only the sinusoid of the timestep needs cosines in a later step.
    assert (first.names.count("cos"), second.names.count("cos")) == (4, 1)


@torch.no_grad()
def test_experts_do_not_share_a_text_embedding() -> None:
    cond, x, t = condition(), latents(), torch.tensor([500.0])
    for expert in ("high", "low"):
        step = Step(0, 1, 500.0, 0.5, 0.0, expert=expert)
        model = tiny()
        expected = model.velocity(x, t, dataclasses.replace(cond, memo={}))
        assert torch.equal(model.velocity(x, t, cond, step), expected)


@torch.no_grad()
def test_modulation_is_never_spread_over_tokens() -> None:
    model, seen = tiny(), []

    def look(block: nn.Module, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        seen.append(tuple(inputs.modulation.shape))
        return block(tokens, inputs)

    model.run_block = look
    model.velocity(latents(2), torch.tensor([500.0, 500.0]), condition(2))
    model.velocity(latents(2), frame_times(3).expand(2, -1), condition(2))
    assert set(seen) == {(2, 1, 6, 96), (2, 3, 6, 96)}


def test_a_dropped_model_is_freed_at_once() -> None:
    gc.collect()
    model = tiny()
    alive = weakref.ref(model)
    gc.disable()
    try:
        model.trunk = model.trunk  # putting the plain trunk back must not tie a knot
        del model
        assert alive() is None
    finally:
        gc.enable()


# ---- seams -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_seams_can_be_wrapped_and_see_every_block() -> None:
    model, x, t, text = tiny(), latents(), torch.tensor([500.0]), torch.randn(1, 7, TINY["text_dim"])
    plain = model.velocity(x, t, Condition(context=text))
    ran: list[str] = []

    def wrap(name: str, inner: Any) -> Any:
        def outer(*args: Any) -> Any:
            ran.append(name)
            return inner(*args)

        return outer

    model.trunk, model.run_block = wrap("trunk", model.trunk), wrap("block", model.run_block)
    layers = [layer for block in model.all_blocks() for layer in (block.self_attn, block.cross_attn)]
    for layer in layers:
        layer.attend = wrap(layer.role, layer.attend)
    assert torch.equal(model.velocity(x, t, Condition(context=text)), plain)
    assert ran == ["trunk"] + ["block", "self", "cross"] * 3


@torch.no_grad()
def test_the_trunk_does_not_write_its_input() -> None:
    model = tiny()
    inner, kept = model.trunk, []

    def trunk(tokens: Tensor, *rest: Any) -> Tensor:
        before = tokens.clone()
        out = inner(tokens, *rest)
        kept.append(torch.equal(before, tokens))
        return out

    model.trunk = trunk
    model.velocity(latents(), torch.tensor([500.0]), condition())
    assert kept == [True]


class Appending(Adapter):
    """Appends tokens that have timestep 0 and no place in the grid."""

    timesteps = (0.0,)

    def embed(self, dit: WanModel, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> Any:
        extra = torch.ones(tokens.shape[0], 2, tokens.shape[2])
        row = inputs.constant_rows[0.0]
        changed = dataclasses.replace(
            inputs,
            rope=torch.cat((inputs.rope, inputs.rope[:2])),
            rows=torch.cat((inputs.rows, torch.full((2,), row))),
            frames=torch.cat((inputs.frames, torch.full((2,), -1))),
        )
        return torch.cat((tokens, extra), 1), changed


class Hinting(Adapter):
    """Runs a block of its own beside the trunk and adds its output after main block 1."""

    after = (0,)

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks.append(block)

    def sides(self, tokens: Tensor, inputs: BlockInputs, condition: Condition) -> None:
        inputs.residuals[1] = lambda behind: 0.1 * inputs.run_block(self.blocks[0], tokens - behind, inputs)


@torch.no_grad()
def test_an_adapter_can_append_tokens_with_their_own_timestep() -> None:
    model, x, text = tiny(), latents(), torch.randn(1, 7, TINY["text_dim"])
    plain = model.velocity(x, torch.tensor([500.0]), Condition(context=text))
    model.adapters["extra"] = Appending()
    for t in (torch.tensor([500.0]), torch.full((1, 3), 500.0)):
        value = model.velocity(x, t, Condition(context=text))
        assert value.shape == plain.shape
        assert relative_error(value, plain) > 1e-4


@torch.no_grad()
def test_an_adapter_can_add_hints_through_run_block() -> None:
    model, x, text = tiny(), latents(), torch.randn(1, 7, TINY["text_dim"])
    plain = model.velocity(x, torch.tensor([500.0]), Condition(context=text))
    side = tiny().blocks[0]
    model.adapters["hints"] = Hinting(side)
    order = model.all_blocks()
    assert order == [model.blocks[0], side, model.blocks[1], model.blocks[2]]
    ran: list[nn.Module] = []
    inner = model.run_block
    model.run_block = lambda block, tokens, inputs: ran.append(block) or inner(block, tokens, inputs)
    assert relative_error(model.velocity(x, torch.tensor([500.0]), Condition(context=text)), plain) > 1e-4
    assert ran == [model.blocks[0], model.blocks[1], side, model.blocks[2]]


class Tilt(nn.Module):
    """An insert that tilts every token (a constant would vanish in the next norm)."""

    def forward(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        return tokens + torch.linspace(0, 1, tokens.shape[-1])


class Repeat(nn.Module):
    """An extra attention that gives the queries back."""

    def forward(self, q: Tensor, inputs: BlockInputs) -> Tensor:
        return q


PLACES = [
    ("inserts.after_self_attn", Tilt()),
    ("inserts.after_cross_attn", Tilt()),
    ("inserts.after_ffn", Tilt()),
    ("cross_attn.extras", Repeat()),
    ("self_attn.extras", Repeat()),
]


@pytest.mark.parametrize(("place", "module"), PLACES, ids=[place for place, _ in PLACES])
@torch.no_grad()
def test_modules_hung_into_a_block_take_part(place: str, module: nn.Module) -> None:
    model, x, text, t = tiny(), latents(), torch.randn(1, 7, TINY["text_dim"]), torch.tensor([500.0])
    plain, keys = model.velocity(x, t, Condition(context=text)), set(model.state_dict())
    where = model.blocks[1].get_submodule(place)
    if isinstance(where, nn.ModuleList):
        where.append(module)
    else:
        where["toy"] = module
    assert relative_error(model.velocity(x, t, Condition(context=text)), plain) > 1e-4
    assert set(model.state_dict()) == keys


@torch.no_grad()
def test_a_block_compiles_whole_and_agrees() -> None:
    model, x, text, t = tiny(), latents(), torch.randn(1, 7, TINY["text_dim"]), torch.tensor([500.0])
    plain = model.velocity(x, t, Condition(context=text))
    for block in model.all_blocks():
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert relative_error(model.velocity(x, t, Condition(context=text)), plain) < FLOAT32


@torch.no_grad()
def test_a_window_limits_what_a_token_sees() -> None:
    model = tiny(window_size=(2, 2), num_layers=1)
    x, t, text = latents(), torch.tensor([500.0]), torch.randn(1, 7, TINY["text_dim"])
    plain = model.velocity(x, t, Condition(context=text))
    x[..., -2:, -2:] += 1  # the last token of every frame
    moved = (model.velocity(x, t, Condition(context=text)) - plain).abs().amax((0, 1))
    assert moved[0, 0, 0] == 0
    assert moved[0, -1, -1] > 0
