"""What is told of a machine: enough for a report, nothing private."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from wan.cli import environment
from wan.engine.ops.attention import BACKENDS


@pytest.fixture
def save_env(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return runpy.run_path(str(root / "tools" / "save_env.py"))["main"]


def test_report_is_text_and_json_without_a_gpu_and_without_secrets(save_env: Any, tmp_path: Path, capsys: Any) -> None:
    os.environ |= {"HF_TOKEN": "hf_secret", "DASH_API_KEY": "sk-secret", "HF_HOME": str(Path.home() / "models")}
    assert save_env(["--out", str(tmp_path / "env.json")]) == 0
    out = capsys.readouterr().out
    text = (tmp_path / "env.json").read_text()
    found = json.loads(text)
    assert "secret" not in text + out
    assert found["variables"]["HF_HOME"] == str(Path("~") / "models")
    assert {"torch", "numpy"} <= set(found["packages"])
    assert found["attention"].keys() == BACKENDS.keys() and found["attention"]["sdpa"] == "works"
    assert found["known_bad"] == environment.known_bad(found["torch"])
    assert all(f"{name}:" in out for name in found)
    assert "known_bad: none\n" in out + "\n" or found["known_bad"]
    assert f"  sdpa: {found['attention']['sdpa']}\n" in out


def test_file_that_cannot_be_written_is_told(save_env: Any, tmp_path: Path, capsys: Any) -> None:
    assert save_env(["--out", str(tmp_path)]) == 3
    assert "error: --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("torch", "cudnn", "bad"),
    [
        ("2.9.0+cu130", "91002", True), ("2.9.1", "91300", True), ("2.9.1", "91500", False), ("2.9.0", None, False),
        ("2.8.0", "91002", False), ("2.90.0", "91002", False), ("2.13.0", "92000", False),
    ],
)  # fmt: skip
def test_versions_that_go_badly_together_are_told_with_effect_cure_and_source(
    torch: str, cudnn: str | None, bad: bool
) -> None:
    lines = environment.known_bad({"torch": torch} | ({"cudnn": cudnn} if cudnn else {}))
    assert [("conv3d" in line, "9.15" in line, "#166122" in line) for line in lines] == [(True,) * 3] * bad
