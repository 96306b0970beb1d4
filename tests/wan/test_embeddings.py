"""Kept text embeddings: the same bits as computed ones, no text encoder where all are known, and never a wrong one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.embeddings import EmbeddingCache

SMALL: dict[str, Any] = {"size": (32, 32), "frame_num": 1, "sampling_steps": 1, "seed": 1}
HOW = {"device": "cpu", "dtype": "torch.float32", "text_len": 32}

Make = Callable[..., wan.WanT2V]


@pytest.fixture
def make(tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path) -> Make:
    """A new pipeline with the cache in the test's folder, as a new process would have it."""

    def build(**options: Any) -> wan.WanT2V:
        cache = options.pop("cache", EmbeddingCache(tmp_path / "kept", "tiny"))
        return wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", embeddings=cache, **options)

    return build


def video(pipe: wan.WanT2V, prompt: str = "a red bird", **arguments: Any) -> Tensor:
    made = pipe.generate(prompt, **(SMALL | arguments))
    assert made is not None
    return made


def loaded(pipe: wan.WanT2V) -> bool:
    return "text_encoder" in pipe.engine.placement.loaded()


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "kept").iterdir())


def test_known_texts_give_the_same_bits_and_the_text_encoder_is_not_loaded(make: Make, tmp_path: Path) -> None:
    plain = make(cache=None)
    first, second = make(), make()
    expected = video(plain)
    assert torch.equal(video(first), expected) and loaded(first)
    assert torch.equal(video(second), expected) and not loaded(second)
    assert len(entries(tmp_path)) == 2  # the prompt and the negative prompt
    assert not any(b"bird" in path.read_bytes() for path in entries(tmp_path))


def test_negative_prompt_is_encoded_once_ever(make: Make, tmp_path: Path) -> None:
    video(make())
    video(make(), "a blue cat on a long and winding road")
    video(make(), "a dog")
    assert len(entries(tmp_path)) == 4


def test_embedding_does_not_depend_on_the_texts_it_is_computed_beside(make: Make, tmp_path: Path) -> None:
    expected = video(make(cache=None), "a dog", n_prompt="dark and blurry and much longer than the other text is")
    video(make(), "a dog")
    mixed = make()
    assert torch.equal(
        video(mixed, "a dog", n_prompt="dark and blurry and much longer than the other text is"), expected
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content + b"more",
    ],
    ids=["a flipped bit", "a flipped bit of the hash", "truncated", "empty", "longer"],
)
def test_damaged_entry_is_computed_again_and_rewritten(
    make: Make, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    expected = video(make())
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    for path, content in whole.items():
        path.write_bytes(harm(content))
    again = make()
    assert torch.equal(video(again), expected) and loaded(again)
    assert {path: path.read_bytes() for path in entries(tmp_path)} == whole


def test_everything_that_can_change_a_bit_makes_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, states = EmbeddingCache(tmp_path, "tiny"), torch.randn(3, 8)
    cache.put("a cat", HOW, states)
    found = cache.get("a cat", HOW)
    assert found is not None and torch.equal(found, states) and found.dtype == states.dtype
    assert cache.get("a cat ", HOW) is None
    assert EmbeddingCache(tmp_path, "other").get("a cat", HOW) is None
    for name, value in {"device": "cuda", "dtype": "torch.bfloat16", "text_len": 512, "threads": 3}.items():
        assert cache.get("a cat", HOW | {name: value}) is None, name
    monkeypatch.setattr("wan.embeddings.versions", lambda: {"torch": "0"})
    assert cache.get("a cat", HOW) is None


def test_bfloat16_comes_back_as_it_was(tmp_path: Path) -> None:
    cache, states = EmbeddingCache(tmp_path, "tiny"), torch.randn(5, 8).bfloat16()[:, ::2]
    cache.put("a cat", HOW, states)
    found = cache.get("a cat", HOW)
    assert found is not None and found.dtype == torch.bfloat16 and torch.equal(found, states)


def test_text_encoder_of_the_users_own_is_asked_and_not_the_cache(make: Make) -> None:
    before = video(make())
    pipe = make()
    own = make().text_encoder
    with torch.no_grad():
        own.model.norm.weight.mul_(2)  # type: ignore[operator, union-attr]
    pipe.text_encoder = own
    assert not torch.equal(video(pipe), before)


def test_least_recently_used_go_when_the_folder_is_full(tmp_path: Path) -> None:
    states = torch.zeros(64, 64)
    cache = EmbeddingCache(tmp_path, "tiny", max_bytes=3 * (states.nbytes + 500))
    for second, text in enumerate(("first", "second", "third")):
        cache.put(text, HOW, states)
        os.utime(cache.path_of(text, HOW), (second, second))
    assert cache.get("first", HOW) is not None  # used now, so the second is the oldest
    cache.put("fourth", HOW, states)
    known = [text for text in ("first", "second", "third", "fourth") if cache.get(text, HOW) is not None]
    assert known == ["first", "third", "fourth"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= cache.max_bytes


def test_what_nobody_finished_writing_is_removed_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / "a.1234.part", tmp_path / "b.1234.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    EmbeddingCache(tmp_path, "tiny").put("a cat", HOW, torch.zeros(1, 1))
    assert not old.exists() and new.exists()


def test_folder_that_cannot_be_written_costs_the_computing_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert torch.equal(video(make()), video(make(cache=None)))


def test_programs_that_write_one_entry_at_a_time_leave_a_whole_one(tmp_path: Path) -> None:
    states = torch.randn(64, 64)

    def write() -> None:
        for _ in range(20):
            EmbeddingCache(tmp_path, "tiny").put("a cat", HOW, states)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        found = EmbeddingCache(tmp_path, "tiny").get("a cat", HOW)
        assert found is None or torch.equal(found, states)
    for thread in threads:
        thread.join()
    assert [path.suffix for path in tmp_path.iterdir()] == [".embedding"]
