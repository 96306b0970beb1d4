"""On a GPU: swapped blocks give the same bits, come from pinned memory, and are copied while others compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from wan.engine.swapping import Swap, block_bytes_of, homes_of, swap_bytes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WIDTH, TOKENS, COUNT = 2048, 16384, 6


def stack() -> nn.ModuleList:
    """Six blocks of 64 MB in pinned memory; each computes several times as long as it is copied."""
    blocks = nn.ModuleList(
        nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(8)))
        for _ in range(COUNT)
    )
    homes = homes_of(blocks, list(blocks), pin=True)
    for key, parameter in blocks.requires_grad_(False).named_parameters():
        home = homes[key]
        assert isinstance(home, torch.Tensor) and home.is_pinned()
        parameter.data = home.copy_(parameter.data)
    return blocks


def seconds(blocks: nn.ModuleList, run: Callable[..., Any], x: Any) -> tuple[float, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in (False, True):
        out = x
        if timed:
            begin.record()
        for block in blocks:
            out = run(block, out)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, out


@torch.inference_mode()
def test_copies_hide_behind_computing_and_change_no_bit() -> None:
    blocks, x = stack(), torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, device=CUDA)
    swap = Swap(list(blocks), CUDA, prefetch=1)
    run = swap.wrap(lambda block, x: block(x))
    before = torch.cuda.memory_allocated()
    run(blocks[0], x[:1])
    slots = torch.cuda.memory_allocated() - before
    assert slots <= swap_bytes(block_bytes_of(list(blocks)), COUNT, 1) + 2**20
    swapped, out = seconds(blocks, run, x)
    swap.release()
    assert not any(parameter.is_cuda for parameter in blocks.parameters())
    resident, expected = seconds(blocks.to(CUDA), lambda block, x: block(x), x)
    assert torch.equal(out, expected)
    assert swapped < 1.2 * resident


@torch.inference_mode()
def test_a_block_that_serves_two_branches_in_turn_is_copied_once() -> None:
    """Few tokens, so that copies take the time: two branches block by block wait for half of them."""
    blocks, x = stack(), torch.randn(64, WIDTH, dtype=torch.bfloat16, device=CUDA)
    swap = Swap(list(blocks), CUDA, prefetch=1)
    run = swap.wrap(lambda block, x: block(x))
    alone, out = seconds(blocks, run, x)
    in_turns, both = seconds(blocks, lambda block, pair: [run(block, each) for each in pair], [x, x])
    swap.release()
    assert all(torch.equal(each, out) for each in both)
    assert in_turns < 1.4 * alone, "as long as one branch needs, not as two"
