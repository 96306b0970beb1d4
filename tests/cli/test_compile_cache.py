"""The real compiler, and a folder that keeps what it made: another prompt or process compiles nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_setup import Driver
from PIL import Image

import wan
from wan.engine.optimizations import Compile
from wan.modules.blocks import WanAttentionBlock


@pytest.mark.slow  # C++ is compiled, and two processes start: half a minute
def test_compiled_code_serves_the_next_prompt_and_the_next_process(
    tiny_checkpoint: Path, tiny_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told in a line by the step that compiles: one form of block serves two experts and both prompts, the second
    process finds it in the folder and adds nothing to it. The pictures are the same."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    prompts, cache = tmp_path / "prompts.txt", tmp_path / "compiled"
    prompts.write_text("a red bird\na blue bird\n")
    task = ["--task", "t2v-A14B", "--ckpt_dir", str(tiny_checkpoint), "--size", "32x32", "--any_size"]
    few = ["--frame_num", "1", "--sample_steps", "3", "--seed", "1", "--device", "cpu"]
    compiled = ["--compile", "--compile_cache_dir", str(cache), "--prompt_file", str(prompts)]

    def told(name: str) -> tuple[list[str], list[bytes]]:
        folder = tmp_path / name
        folder.mkdir()
        driver = Driver(tiny_checkpoint, tiny_task, folder)
        saved = ["--save_file", f"{folder}/", "--results", str(folder / "results.jsonl")]
        assert driver.here([*task, *few, *compiled, *saved]) == 0
        driver.stop()
        paths = sorted(folder.glob("*.png"), key=lambda path: "red" in path.name)
        pictures = [Image.open(path).tobytes() for path in paths]
        return re.findall(r"compile: [\d.]+ s (.*)", (folder / "driver.err").read_text()), pictures

    first, made = told("first")
    kept = {path for path in cache.rglob("*.so") if path.is_file()}
    second, again = told("second")
    assert (first, second) == (["cold"], ["from the cache"])
    assert kept and {path for path in cache.rglob("*.so") if path.is_file()} == kept
    assert len(made) == 2 and again == made


# After such an error Dynamo 2.13 leaves its frame evaluation installed for the process; calls then hold their arguments
# until they return, and what counts live tensors would count more of them.
@pytest.mark.slow
def test_a_graph_break_is_an_error_and_not_a_slow_video(
    tiny_checkpoint: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compile, "backend", "eager")
    forward = WanAttentionBlock.forward

    def breaking(self: WanAttentionBlock, *arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *arguments)

    monkeypatch.setattr(WanAttentionBlock, "forward", breaking)
    pipe = wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", compile=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        pipe.generate("a red bird", size=(32, 32), frame_num=1, sampling_steps=1, seed=1)
