"""Compiled code is kept where the user says, and only what this program made is ever deleted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.cli.args import parse
from wan.cli.caches import TAG, TAG_NAME, keep_compiled
from wan.cli.generate import main
from wan.engine.errors import BadRequest
from wan.engine.optimizations import registry
from wan.engine.plan import Plan, options


@pytest.fixture(autouse=True)
def no_place_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))


def keep(argv: Sequence[str], **chosen: Any) -> str | None:
    """Where torch keeps compiled code after this command line."""
    keep_compiled(parse(argv, options(registry())), Plan.of(registry(), chosen))
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def test_compiled_code_lies_in_a_tagged_folder_of_its_version_of_torch(tmp_path: Path) -> None:
    kept = Path(str(keep(["--compile_cache_dir", str(tmp_path / "mine")], compile=True)))
    assert kept.parent == tmp_path / "mine"
    assert kept.name.removeprefix("torch-") in str(torch.__version__)
    assert (kept / TAG_NAME).read_text() == TAG


@pytest.mark.parametrize("argv", [["--compile_cache_dir", "off"], ["--print_plan"]], ids=str)
def test_torch_keeps_its_own_place_if_asked_or_nothing_runs(argv: list[str]) -> None:
    assert keep(argv, compile=True) is None


def test_the_place_that_torch_writes_for_itself_is_not_the_users(tmp_path: Path) -> None:
    import torch._inductor.runtime.cache_dir_utils as compiler

    torchs = compiler.cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == torchs
    named = ["--compile_cache_dir", str(tmp_path / "mine")]
    assert keep(named) == torchs
    assert str(keep(named, vae_compile=True)).startswith(str(tmp_path / "mine"))


def test_the_users_variable_wins_and_a_run_that_compiles_nothing_sets_none() -> None:
    assert keep([]) is None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = "/theirs"
    assert keep([], compile=True) == "/theirs"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match=r"--compile_cache_dir .*file/x.*choose another, or off"):
        keep(["--compile_cache_dir", str(tmp_path / "file" / "x")], compile=True)


def test_only_folders_with_our_tag_are_deleted_and_links_are_not_followed(tmp_path: Path, capsys: Any) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    ours = Path(str(keep(["--compile_cache_dir", str(cache)], compile=True)))
    (ours / "code.so").write_bytes(bytes(3 * 2**20))
    for other in ("torch-foreign", "photos"):
        (cache / other).mkdir()
        (cache / other / "precious").write_text("")
    (cache / "photos" / TAG_NAME).write_text(TAG)
    outside.mkdir()
    (outside / TAG_NAME).write_text(TAG)
    (cache / "torch-link").symlink_to(outside, target_is_directory=True)
    (ours / "link").symlink_to(outside, target_is_directory=True)
    before = set(tmp_path.rglob("*"))

    argv = ["--clear_compile_cache", "--compile_cache_dir", str(cache)]
    assert main([*argv, "--dry_run"]) == 0
    assert capsys.readouterr().out == f"would delete {ours}: 2 files, 3.0 MiB\n"
    assert set(tmp_path.rglob("*")) == before

    assert main(argv) == 0
    assert capsys.readouterr().out == f"deleted {ours}: 2 files, 3.0 MiB\n"
    assert set(tmp_path.rglob("*")) == {path for path in before if path != ours and ours not in path.parents}
    assert main(argv) == 0
    assert capsys.readouterr().out == f"nothing of ours to delete in {cache}\n"


def test_dry_run_alone_is_refused_as_it_does_not_mean_a_video(capsys: Any) -> None:
    assert main(["--dry_run"]) == 2
    assert "--clear_compile_cache" in capsys.readouterr().err
