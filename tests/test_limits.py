"""tools/measure_limits.py without a GPU: what it compares agrees, nothing is lost, and predictions name real rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.engine.types import Condition
from wan.modules.model import WanModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_originals_operations_give_our_velocity(dtype: torch.dtype, tolerance: float) -> None:
    from limits import reference

    from wan.engine.ops.attention import sdpa

    dit = WanModel(dim=48, ffn_dim=96, freq_dim=32, num_heads=2, num_layers=2, text_dim=24, text_len=10).eval()
    for parameter in dit.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    dit.head.head.weight.normal_(std=0.1)
    for name, parameter in dit.named_parameters():
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if not ("time" in name or "norm" in name or "modulation" in name or layer == "head"):
            parameter.data = parameter.to(dtype)
    latents, text, time = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 7, 24), torch.tensor([900.0, 37.0])
    ours = dit.velocity(latents, time, Condition(context=text))
    theirs = reference.velocity(dit, latents, time, text, sdpa)
    assert (theirs - ours).norm() / ours.norm() < tolerance


def test_a_row_is_on_the_disk_as_soon_as_it_is_there_and_failures_are_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from limits.book import Book, Work

    path = tmp_path / "rows.json"
    book = Book(path, {"part": "small"}, torch.device("cpu"), budget_s=100)

    def rows() -> dict[str, Any]:
        return {row["key"]: row for row in json.loads(path.read_text())["rows"]}

    order: list[str] = []

    def broken() -> None:
        order.append("b")
        raise torch.OutOfMemoryError("no room\nat all")

    acts = {"a": lambda: order.append("a"), "b": broken, "c": lambda: order.append("c")}
    book.race({key: (act, Work(bytes=8.0, flop=2.0)) for key, act in acts.items()}, runs=2)
    assert "".join(order) == "abcacac"
    assert [len(rows()[key]["seconds"]) for key in "abc"] == [2, 0, 2]
    assert rows()["b"]["failed"] == "OutOfMemoryError: no room"
    assert rows()["a"]["gb_s"] == pytest.approx(8 / rows()["a"]["median_s"] / 1e9)
    late = Book(path, {}, torch.device("cpu"), budget_s=-1)
    late.race({"d": (lambda: order.append("d"), Work())}, runs=1)
    assert order[-1] == "c" and "time was up" in rows()["d"]["failed"]


def test_what_cannot_be_written_leaves_what_was(tmp_path: Path) -> None:
    import partly

    path = tmp_path / "new" / "rows.json"
    partly.write(path, {"rows": [1]})
    with pytest.raises(TypeError):
        partly.write(path, {"rows": [torch.zeros(1)]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(path.parent.iterdir()) == [path]


def test_a_prediction_is_told_beside_what_was_measured_and_null_without(tmp_path: Path) -> None:
    from limits.page import page
    from limits.predictions import PREDICTIONS

    assert all(each.told({})["measured"] is None and each.told({})["within"] is None for each in PREDICTIONS)
    assert page([]).count("| not measured | - |") == len(PREDICTIONS)
    ratio = next(each for each in PREDICTIONS if each.of)
    rows = {ratio.row: {"median_s": 3.0}, ratio.of: {"median_s": 2.0}}
    told = replace(ratio, low=1.4, high=1.6).told(rows)
    assert (told["measured"], told["within"]) == (1.5, True)
    assert replace(ratio, high=1.2).told(rows)["within"] is False


@pytest.mark.slow
def test_both_parts_run_to_their_end_and_measure_all_that_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import measure_limits
    from limits.page import page
    from limits.predictions import PREDICTIONS

    files = [tmp_path / f"limits_{part}.json" for part in ("small", "large")]
    for path in files:
        assert measure_limits.main([path.stem.removeprefix("limits_"), "--smoke", "--output", str(path)]) == 0
    rows = [row for path in files for row in json.loads(path.read_text())["rows"]]
    absent = [row["key"] for row in rows if row["failed"]]
    assert all(key.startswith("attention/") for key in absent), absent
    distances: dict[str, float] = {row["key"]: row["work"]["distance"] for row in rows if row["work"]["distance"]}
    assert max(distances.values()) < 5e-3
    # What a CPU has not: other attention, kernels, pinned memory, swapping; and products have other widths there.
    kinds = {row["key"].split("/")[0] for row in rows}
    assert {each.row.split("/")[0] for each in PREDICTIONS} <= kinds
    forwards = {row["key"] for row in rows}
    wanted = {key for each in PREDICTIONS for key in (each.row, each.of) if "/ours" in key} - {"A14B 720p/ours swapped"}
    assert wanted <= forwards
    assert "Tiny sizes" in page([json.loads(path.read_text()) for path in files])


def test_smoke_results_never_land_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    import measure_limits

    with pytest.raises(SystemExit) as stopped:
        measure_limits.main(["small", "--smoke"])
    assert stopped.value.code == 2 and "--output" in capsys.readouterr().err
