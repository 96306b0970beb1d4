"""Who computes an operation: the definition unless a kernel was chosen, that was tried and was right, and fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wan.engine.errors import IncompatibleOptions, MissingPackage, UnsupportedHardware
from wan.engine.hardware import Hardware
from wan.engine.ops import providers
from wan.engine.ops.op import Kernel, computed_by, op
from wan.engine.ops.providers import PROVIDERS, Provider, choose, refusal

CPU = Hardware(device=torch.device("cpu"), name="CPU")
H100 = Hardware(device=torch.device("cuda", 0), name="H100", sm=(9, 0), total_memory=1, free_memory=1)


@op(examples=lambda draw: [(draw(4, 8), 2.0), (draw(3, 1, dtype=torch.bfloat16), -1.0)], tolerance=1e-3)
def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor."""
    return x * factor


def right(x: Tensor, factor: float) -> Tensor:
    return x * factor if x.shape[0] < 99 else NotImplemented


def wrong(x: Tensor, factor: float) -> Tensor:
    return x * factor * 1.01


def unwritten(x: Tensor, factor: float) -> Tensor:
    return torch.full_like(x, float("nan"))


def broken(x: Tensor, factor: float) -> Tensor:
    raise AssertionError("no\nsuch instruction")


def elsewhere(x: Tensor, factor: float) -> Tensor:
    return NotImplemented


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    providers.working.cache_clear()
    yield
    providers.working.cache_clear()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`offer(name=kernel, ...)`: providers of these names, whose cards are all there are, each with one kernel."""

    class Anywhere(Provider):
        def refusal(self, hardware: Hardware) -> None:
            return None

    def offered(**kernels: Kernel) -> None:
        for name, kernel in kernels.items():
            made = Anywhere(name=name, load=lambda kernel=kernel: {scaled: kernel}, min_sm=(0, 0))
            monkeypatch.setitem(PROVIDERS, name, made)
        monkeypatch.setattr(providers, "AUTO", tuple(kernels))

    return offered


def test_a_kernel_computes_while_it_is_chosen_and_where_it_may() -> None:
    x = torch.ones(2, 2)
    calls: list[Any] = []

    def kernel(x: Tensor, factor: float) -> Tensor:
        calls.append(factor)
        return right(x, factor)

    with computed_by({scaled: kernel}):
        assert torch.equal(scaled(x, 3.0), x * 3) and not calls  # gradients are recorded: the definition
        with torch.no_grad():
            assert scaled(torch.ones(2), factor=5.0).tolist() == [5, 5] and calls == [5.0]
            assert len(scaled(torch.ones(100), 5.0)) == 100 and len(calls) == 2  # too large for the kernel
            assert torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(2), 7.0)[0] == 7
            assert len(calls) == 2
    with torch.no_grad():
        assert scaled(torch.ones(2), 5.0)[0] == 5 and len(calls) == 2
    assert scaled.__doc__ == "x * factor." and scaled.name == "scaled"


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (wrong, r"odd kernel of scaled gives wrong values \(relative error 1.0e-02\)"),
        (unwritten, "odd kernel of scaled gives wrong values"),
        (broken, "odd kernel of scaled fails: AssertionError: no; PyTorch computes instead"),
    ],
)
def test_a_kernel_that_does_not_work_is_left_out_with_one_warning(
    offer: Callable[..., None], kernel: Kernel, told: str
) -> None:
    offer(odd=kernel)
    with pytest.warns(RuntimeWarning, match=told):
        assert choose("odd", CPU) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("odd", CPU) == {}


def test_auto_takes_the_first_working_kernel_of_each_operation(offer: Callable[..., None]) -> None:
    offer(first=elsewhere, second=right, third=right)
    assert {each.name: name for each, (name, _) in choose("auto", CPU).items()} == {"scaled": "second"}
    assert choose("first", CPU) == {}


def test_auto_finds_what_is_for_cpus_and_a_named_provider_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu = {each.name: name for each, (name, _) in choose("auto", CPU).items()}
    assert on_cpu == {"norm_rotate": "cpu", "linear": "cpu"}
    assert refusal("auto", CPU) is None and refusal("torch", CPU) is None
    with pytest.raises(UnsupportedHardware, match="--kernels cpu is for CPUs, this is .*; use --kernels auto or torch"):
        choose("cpu", H100)
    with pytest.raises(
        UnsupportedHardware, match="--kernels triton needs .* sm_80 .* CPU; use --kernels auto or torch"
    ):
        choose("triton", CPU)
    old = Hardware(device=torch.device("cuda", 0), name="GTX 1080", sm=(6, 1), total_memory=1, free_memory=1)
    assert "GTX 1080 (sm_61" in str(refusal("triton", old))
    with pytest.raises(IncompatibleOptions, match="--kernels 'fast' is unknown; choose one of torch, auto, triton"):
        choose("fast", CPU)
    monkeypatch.setattr(providers, "installed", lambda package: False)
    missing = refusal("triton", H100)
    assert isinstance(missing, MissingPackage) and "pip install triton" in str(missing)
    if not providers.PROVIDERS["cuda"].unbuilt():
        return  # compiled here
    unbuilt = refusal("cuda", H100)
    assert isinstance(unbuilt, MissingPackage) and "pip install --no-build-isolation" in str(unbuilt)
