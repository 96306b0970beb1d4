"""Hashes of weights: they tell files apart, read little, and are taken once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan.cli import env
from wan.cli.fingerprints import BLOCK_BYTES, BLOCKS, CACHE, Memory, files_of, fingerprint, fingerprint_of, of_parts

LARGE = BLOCKS * BLOCK_BYTES


def holes(path: Path, size: int) -> Path:
    """A file of `size` zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def change(path: Path, at: int, byte: bytes = b"\1") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(byte)


def test_small_file_has_the_sha256_that_other_tools_show(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    path.write_bytes(b"weights" * 1000)
    assert fingerprint(path) == f"sha256:{hashlib.sha256(b'weights' * 1000).hexdigest()}"


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, 8 * LARGE - 1, 8 * LARGE - BLOCK_BYTES])
def test_change_at_either_end_of_a_large_file_is_seen(tmp_path: Path, at: int) -> None:
    path = holes(tmp_path / "model.pth", 8 * LARGE)
    before = fingerprint(path)
    assert before.startswith("sampled-sha256:")
    change(path, at)
    assert fingerprint(path) != before


def test_files_of_zeros_differ_by_their_size(tmp_path: Path) -> None:
    sizes = [LARGE - 1, LARGE, LARGE + 1, LARGE + 2, 9 * LARGE]
    assert len({fingerprint(holes(tmp_path / "model.pth", size)) for size in sizes}) == len(sizes)


def test_every_byte_of_a_safetensors_header_counts(tmp_path: Path) -> None:
    """A header longer than a block, as of a real transformer with a thousand tensors."""
    path, header = tmp_path / "model.safetensors", json.dumps({"__metadata__": {"x": "y" * (3 * BLOCK_BYTES)}}).encode()
    holes(path, 16 * LARGE)
    change(path, 0, len(header).to_bytes(8, "little") + header)
    before = fingerprint(path)
    change(path, 8 + len(header) - 5)
    assert fingerprint(path) != before


def test_file_of_any_size_takes_a_fraction_of_a_second(tmp_path: Path) -> None:
    path = holes(tmp_path / "model.safetensors", 60 << 30)
    started = time.perf_counter()
    fingerprint(path)
    assert time.perf_counter() - started < 0.5


def test_shards_count_together_wherever_they_lie(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        for number in (1, 2):
            save_file(
                {f"w{number}": torch.full((4,), float(number))}, folder / f"model-0000{number}-of-00002.safetensors"
            )
    first, second = (folder / "model-00001-of-00002.safetensors" for folder in folders)
    assert len(files_of(first)) == 2
    assert fingerprint_of(first) == fingerprint_of(second)
    save_file({"w2": torch.full((4,), 3.0)}, folders[1] / "model-00002-of-00002.safetensors")
    assert fingerprint_of(first) != fingerprint_of(second)


def test_index_stands_for_the_shards_it_names(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    assert fingerprint_of(index) == fingerprint(tmp_path / "part.safetensors")


def test_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "vae.pth", tmp_path / "cache"
    path.write_bytes(b"old")
    parts = [("vae", path)]
    first = of_parts(parts, Memory(cache))
    known = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert of_parts(parts, Memory(cache)) == first  # same size and time: not opened
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    assert of_parts(parts, Memory(cache)) == {"vae": {"file": str(path), "hash": fingerprint(path)}}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"PATH": 3}', b'{"PATH": [1]}', b'{"PATH": [3, 4, 5]}']
)
def test_broken_cache_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    path, cache = tmp_path / "vae.pth", tmp_path / "cache"
    path.write_bytes(b"new")
    cache.mkdir()
    (cache / CACHE).write_bytes(content.replace(b"PATH", str(path).encode()))
    expected = {"vae": {"file": str(path), "hash": fingerprint(path)}}
    assert of_parts([("vae", path)], Memory(cache)) == expected
    assert list(json.loads((cache / CACHE).read_text())) == [str(path)]


def test_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    path.write_bytes(b"new")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert of_parts([("vae", path)], Memory(tmp_path / "cache"))["vae"]["hash"] == fingerprint(path)


def test_part_that_cannot_be_read_has_no_hash(tmp_path: Path) -> None:
    lost, empty = tmp_path / "gone.pth", tmp_path / "model-00001-of-00002.safetensors"
    empty.write_bytes(b"")
    assert of_parts([("vae", lost), ("dit", empty)], Memory(tmp_path)) == {
        "vae": {"file": str(lost)},
        "dit": {"file": str(empty)},
    }


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname != "Linux", reason="each system has its own folder")
def test_cache_lies_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_folder() == tmp_path / "wan-engine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert env.cache_folder() == tmp_path / "me" / ".cache" / "wan-engine"
