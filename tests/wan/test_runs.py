"""What a run keeps on disk: an interrupted denoise continues to the same bits, finished latents are only decoded."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan
from wan.engine.errors import BadRequest, GenerationFailed
from wan.engine.types import Denoising
from wan.runs import Latents, Run, read_latents, read_record, read_tensors, write_tensors

SMALL: dict[str, Any] = {
    "size": (64, 48), "frame_num": 5, "shift": 12.0, "sampling_steps": 8, "guide_scale": (3.0, 4.0), "seed": 42,
}  # fmt: skip


@pytest.fixture
def make(tiny_checkpoint: Path, tiny_config: Any) -> Callable[..., Tensor]:
    """The video of the small request by a pipeline of its own, as another process would make it."""

    def make(**arguments: Any) -> Tensor:
        pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu")
        video = pipe.generate("a red bird", **(SMALL | arguments))
        assert video is not None
        return video

    return make


class Killed(BaseException):
    """The process is gone: nothing in the program may catch it."""


def killed_after(run: Run, step: int) -> Run:
    stepped = run.stepped

    def dying(state: Denoising, resumable: bool) -> None:
        stepped(state, resumable)
        if state.done == step:
            raise Killed

    run.stepped = dying  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_killed_denoise_continues_to_the_same_bits(
    make: Callable[..., Tensor], tmp_path: Path, solver: str, step: int
) -> None:
    straight = make(sample_solver=solver)
    run = Run(tmp_path / "run", {}, every=2)
    run.begin()
    with pytest.raises(Killed):
        make(sample_solver=solver, keeper=killed_after(run, step))
    steps: list[int] = []
    resumed = make(
        sample_solver=solver,
        keeper=Run(tmp_path / "run", {}),
        observe=(lambda step, latents: steps.append(step.index),),
    )
    assert torch.equal(resumed, straight)
    assert steps == list(range(step // 2 * 2, 8))


def test_finished_latents_are_decoded_without_denoising_again(make: Callable[..., Tensor], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {"prompt": "a red bird"}, every=2)
    run.begin()
    straight = make(keeper=run)
    latents, record = read_latents(run.latents_path())
    assert latents.shape == (1, 16, 2, 6, 8)
    assert record == {"prompt": "a red bird"}
    assert not (run.folder / "state.safetensors").exists()
    steps: list[int] = []
    for keeper in (Run(tmp_path / "run", {}), Latents(latents)):
        again = make(keeper=keeper, observe=(lambda step, latents: steps.append(step.index),))
        assert torch.equal(again, straight)
    assert steps == []


def test_state_is_kept_only_where_the_next_forward_is_a_computed_one(
    make: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan.engine.engine import Engine

    begin = Engine._begin

    def with_cache(engine: Engine, plan: Any) -> None:
        begin(engine, plan)
        engine.resume_only(lambda step: step.index in (3, 6))

    monkeypatch.setattr(Engine, "_begin", with_cache)
    kept: list[int] = []
    run = Run(tmp_path / "run", {}, every=2)
    run.begin()
    keep = run._keep
    monkeypatch.setattr(
        run, "_keep", lambda path, tensors: kept.append(int(tensors.get("done", [-1])[0])) or keep(path, tensors)
    )
    make(keeper=run)
    assert kept == [3, 6, -1]  # due after 2 and 4 and 6, and -1 are the finished latents


def test_latents_at_the_change_of_experts_are_kept_when_asked(make: Callable[..., Tensor], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {}, every=0, keep_switch=True)
    run.begin()
    seen: list[Tensor] = []
    make(keeper=run, observe=(lambda step, latents: seen.append(latents) if step.expert == "high" else None,))
    assert torch.equal(read_latents(run.switch_path())[0], seen[-1])
    run.close(keep_latents=tmp_path / "kept.safetensors")
    assert not run.folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.safetensors", "switch-kept.safetensors"]


def test_state_of_another_request_is_refused(make: Callable[..., Tensor], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {}, every=2)
    run.begin()
    with pytest.raises(Killed):
        make(keeper=killed_after(run, 2))
    with pytest.raises(BadRequest, match=r"holds latents \[1, 16, 2, 6, 8\].*needs \[1, 16, 3, 6, 8\]"):
        make(keeper=Run(tmp_path / "run", {}), frame_num=9)


def test_full_disk_costs_a_note_and_not_the_video(
    make: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make()
    notes: list[str] = []

    class Listener:
        def stage(self, name: str, detail: str = "") -> None: ...
        def step(self, step: Any, seconds: float, share: float, ahead: float) -> None: ...
        def note(self, text: str) -> None:
            notes.append(text)

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path / "run", {}, every=2, progress=Listener())
    run.begin()
    monkeypatch.setattr("wan.runs.write_tensors", refuse)
    assert torch.equal(make(keeper=run), straight)
    assert all("No space left" in note for note in notes)
    written = [Path(note.split("'")[1]).name for note in notes]
    assert written[:4] == ["state.safetensors"] * 3 + ["latents-0.safetensors"]
    assert len(written) == 5 and Path(notes[4].split("'")[1]).parent == Path(tempfile.gettempdir())


def test_file_in_the_making_never_replaces_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"latents": torch.ones(1, 1, 1, 1, 1)}, {})

    def torn(file: int) -> None:
        raise OSError("torn")

    monkeypatch.setattr("os.fsync", torn)
    with pytest.raises(OSError, match="torn"):
        write_tensors(path, {"latents": torch.zeros(1, 1, 1, 1, 1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert read_latents(path)[0].item() == 1


def test_what_is_no_run_or_no_latents_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"--resume .*no run was left there"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps([1]))
    with pytest.raises(BadRequest, match="holds a list"):
        read_record(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadRequest, match=r"x\.safetensors.*cannot be read"):
        read_latents(tmp_path / "x.safetensors")
    write_tensors(tmp_path / "y.safetensors", {"weight": torch.ones(2)}, {})
    with pytest.raises(BadRequest, match=r"y\.safetensors.*weight"):
        read_latents(tmp_path / "y.safetensors")


def test_forwards_that_do_not_match_the_plan_are_an_error(
    tiny_checkpoint: Path, tiny_config: Any, tmp_path: Path
) -> None:
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", use_batched_cfg=True)
    pipe.generate("a red bird", **SMALL)
    assert pipe.report.describe_forwards() == "high 6 uncond + 6 cond, low 2 uncond + 2 cond"

    def forgetful(inner: Any, dit: Any, segment: Any) -> Any:
        last: dict[str, Any] = {}

        def denoiser(latents: Tensor, step: Any, branches: Any) -> Any:
            if step.index != 7:
                last.update(inner(latents, step, branches))
            return dict(last)

        return denoiser

    begin = pipe.engine._begin

    def with_bug(plan: Any) -> None:
        begin(plan)
        pipe.engine.wrap_denoiser(forgetful)

    pipe.engine._begin = with_bug  # type: ignore[method-assign]
    run = Run(tmp_path / "run", {})
    run.begin()
    with pytest.raises(GenerationFailed, match="1 forwards of expert 'low' for branch 'uncond'.*plan has 2"):
        pipe.generate("a red bird", keeper=run, **SMALL)
    assert run.latents_path().is_file()  # even then what was made is kept

    def with_cache(plan: Any) -> None:
        with_bug(plan)
        pipe.engine.expect_forwards(lambda place, within: (within[0] - 1, within[1]))

    pipe.engine._begin = with_cache  # type: ignore[method-assign]
    pipe.generate("a red bird", **SMALL)
    assert "low 1 uncond of 1 to 2" in pipe.report.describe_forwards()


def test_state_of_the_first_step_can_be_written(make: Callable[..., Tensor], tmp_path: Path) -> None:
    """There the latents are what the solver remembers: one memory under two names."""
    straight = make()
    run = Run(tmp_path / "run", {}, every=1)
    run.begin()
    with pytest.raises(Killed):
        make(keeper=killed_after(run, 1))
    assert torch.equal(make(keeper=Run(tmp_path / "run", {})), straight)


def test_interruption_writes_the_last_step_whatever_was_due(make: Callable[..., Tensor], tmp_path: Path) -> None:
    straight = make()
    run = Run(tmp_path / "run", {}, every=100)
    run.begin()
    with pytest.raises(Killed):
        make(keeper=killed_after(run, 3))
    assert not (run.folder / "state.safetensors").exists()
    assert run.interrupted()
    steps: list[int] = []
    watch = (lambda step, latents: steps.append(step.index),)
    assert torch.equal(make(keeper=Run(tmp_path / "run", {}), observe=watch), straight)
    assert steps == [3, 4, 5, 6, 7]


def test_broken_latents_are_no_state_to_go_on_from(
    make: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are noticed a step late, when the state may have been due already."""
    run = Run(tmp_path / "run", {}, every=2)
    run.begin()
    stepped = run.stepped

    def broken(state: Denoising, resumable: bool) -> None:
        if state.done == 4:
            state.latents = state.latents * float("nan")
        stepped(state, resumable)
        if state.done == 4:
            raise Killed

    monkeypatch.setattr(run, "stepped", broken)
    with pytest.raises(Killed):
        make(keeper=run)
    assert int(read_tensors(run.folder / "state.safetensors")[0]["done"]) == 2


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"latents": torch.ones(1, 1, 1, 1, 4)}, {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"x\.safetensors' is damaged: its checksum is another"):
        read_latents(path)


def test_one_process_at_a_time_has_the_folder(tmp_path: Path) -> None:
    first, second = Run(tmp_path / "run", {}), Run(tmp_path / "run", {})
    first.begin()
    with pytest.raises(BadRequest, match=rf"another process \({os.getpid()}\) is at work in"):
        second.begin()
    first.release()
    second.begin()
    second.close()
    assert not (tmp_path / "run").exists()
