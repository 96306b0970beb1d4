"""Installing: CUDA kernels are compiled where that can be, and nothing that is missing or broken stops it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.utils.cpp_extension

ROOT = Path(__file__).resolve().parents[1]
Nvcc = Callable[[str], None]


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_wan", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nvcc:
    """A torch with CUDA, and an nvcc that is a shell script where its text is given."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")

    def install(text: str) -> None:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\n{text}\n")
        nvcc.chmod(0o755)

    return install


def told(setup: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    setup.build_kernels(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_without_torch_the_line_says_how_to_let_it_be_seen(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--no-build-isolation" in told(setup, tmp_path, capsys)


def test_nothing_is_compiled_for_a_torch_without_cuda(
    setup: ModuleType, machine: Nvcc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    machine("echo started >> $0.log")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch has no CUDA" in told(setup, tmp_path, capsys)
    assert not list(tmp_path.glob("bin/*.log"))


@pytest.mark.parametrize(
    ("nvcc", "words"),
    [
        (None, "nvcc is not there"),
        ("echo compute_20", "knows none of sm_80"),
        ("echo 'x.cu(3): error: no such thing' >&2; exit 2", r"fails: x.cu(3): error: no such thing; those of Triton"),
    ],
)
def test_a_compiler_that_is_missing_or_broken_is_one_line(
    setup: ModuleType, machine: Nvcc, nvcc: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if nvcc is not None:
        machine(nvcc)
    assert words in told(setup, tmp_path, capsys)
    assert not (tmp_path / setup.LIBRARY).exists()


def test_kernels_are_compiled_for_all_cards_the_compiler_knows(
    setup: ModuleType, machine: Nvcc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = "compute_75\\ncompute_80\\ncompute_90"
    machine(f'if [ "$1" = --list-gpu-arch ]; then printf "{listing}"; else echo "$@" > {tmp_path}/{setup.LIBRARY}; fi')
    assert told(setup, tmp_path, capsys) == "CUDA kernels compiled successfully"
    codes = [word for word in (tmp_path / setup.LIBRARY).read_text().split() if "code=" in word]
    assert [code.partition(",code=")[2] for code in codes] == ["sm_80", "sm_90", "compute_90"]


def test_a_wheel_with_kernels_is_tied_to_a_platform(setup: ModuleType, machine: Nvcc) -> None:
    assert not setup.WithKernels().has_ext_modules()
    machine("true")
    assert setup.WithKernels().has_ext_modules()
