"""Swapped blocks are where they are needed when they are needed, and change not one bit. No GPU needed.

Copies on a stream may happen at any time between their being asked for and their being waited for. Two copy engines
stand for the ends of that span; both refuse to write over a block that has not finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan.engine.arena import Arena
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import registry
from wan.engine.placement import DeviceMover, Placement, Policy, tensors_of
from wan.engine.plan import Plan
from wan.engine.swapping import RowsFromRAM, Swap, fewest_swapped, homes_of, swap_bytes, swapped_blocks
from wan.engine.types import Condition, Step
from wan.engine.weights.stream import load_into
from wan.modules.model import WanModel
from wan.modules.t5 import T5Encoder
from wan.modules.vace_model import VaceCondition, VaceWanModel

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 5}


class Copies:
    """Copies when asked (`late` False) or only when waited for, and writes down what happens."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.events: list[str] = []
        self.pending: dict[int, Sequence[tuple[Tensor, Tensor]]] = {}
        self.busy: set[int] = set()

    def fetch(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert slot not in self.busy, "a block is written over while it computes"
        self.events.append(f"fetch {slot}")
        for target, source in copies:
            assert target.shape == source.shape
            target.fill_(0xFF)  # NaN in every floating dtype: nothing may read it before the copy
        self.pending[slot] = copies
        if not self.late:
            self._copy(slot)

    def arrive(self, slot: int) -> None:
        self.events.append(f"arrive {slot}")
        self._copy(slot)
        self.busy.add(slot)

    def computed(self, slot: int) -> None:
        self.events.append(f"computed {slot}")
        self.busy.discard(slot)

    def finish(self) -> None:
        self.events.append("finish")

    def _copy(self, slot: int) -> None:
        for target, source in self.pending.pop(slot, ()):
            target.copy_(source)


def seeded(build: Callable[[], nn.Module]) -> Any:
    model = build().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # some are born as zeros: nothing would reach the output
    return model


def plain() -> Any:
    return seeded(lambda: WanModel(**SIZES))


def vace() -> Any:
    return seeded(lambda: VaceWanModel(vace_layers=(0, 2), vace_in_dim=6, **SIZES))


def condition_of(model: Any, batch: int = 1) -> Condition:
    context = torch.randn(batch, 4, 16)
    if not isinstance(model, VaceWanModel):
        return Condition(context=context)
    return VaceCondition(context=context, control=torch.randn(batch, 6, 2, 4, 4), control_scale=torch.ones(batch))


def velocity(model: Any, batch: int = 1) -> Tensor:
    torch.manual_seed(1)
    x, condition = torch.randn(batch, 16, 2, 4, 4), condition_of(model, batch)
    with torch.inference_mode():
        return model.velocity(x, torch.full((batch,), 500.0), condition)


def under_way(count: int, prefetch: int, blocks: Sequence[nn.Module]) -> int:
    """Blocks fetched for a forward that does not come; the last block of all keeps its slot till another begins."""
    return min(count, prefetch + 1) - (count == len(blocks))


def test_the_next_copy_is_under_way_before_a_block_runs_and_no_slot_is_written_before_its_block_has_finished() -> None:
    copies, blocks = Copies(late=True), [nn.Linear(2, 2) for _ in range(3)]
    swap = Swap(blocks, CPU, prefetch=1, copies=copies)
    run = swap.wrap(lambda block, x: copies.events.append(f"run {blocks.index(block)}") or block(x))
    for _ in range(2):
        for block in blocks:
            run(block, torch.ones(2))
    swap.release()
    assert copies.events == [
        "computed 0", "computed 1", "fetch 0", "fetch 1",  # blocks 0 and 1
        "arrive 0", "run 0", "computed 0", "fetch 0",  # block 2 comes while 1 runs
        "arrive 1", "run 1", "computed 1", "fetch 1",  # block 0 of the next forward, while 2 runs
        "arrive 0", "run 2", "computed 0", "fetch 0",
        "arrive 1", "run 0", "computed 1", "fetch 1",
        "arrive 0", "run 1", "computed 0", "fetch 0",
        "arrive 1", "run 2", "computed 1",  # its slot is free for others when one of them begins
        "finish",
    ]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("build", [plain, vace])
def test_swapping_changes_no_bit_however_many_blocks_and_slots(build: Callable[[], Any], late: bool) -> None:
    model = build()
    blocks, inner = model.all_blocks(), model.run_block
    expected, both = velocity(model), velocity(model, batch=2)
    places = [tensor.data_ptr() for tensor in tensors_of(model)]
    for count, prefetch in [(1, 1), (2, 0), (3, 1), (4, 2), (len(blocks), 1), (len(blocks), 9)]:
        copies = Copies(late)
        swap = Swap(swapped_blocks(blocks, count), CPU, prefetch=prefetch, copies=copies)
        model.run_block = swap.wrap(inner)
        for _ in range(2):
            assert torch.equal(velocity(model), expected)
        assert torch.equal(velocity(model, batch=2), both)
        slots = min(count, prefetch + 1)
        fetches = [event for event in copies.events if event.startswith("fetch")]
        # One visit a forward and what is on its way at the end: a block is never fetched twice, or for nothing.
        assert len(fetches) == (count if slots == count else 3 * count + under_way(count, prefetch, blocks))
        assert len({event.split()[1] for event in copies.events}) == slots
        swap.release()
        assert [tensor.data_ptr() for tensor in tensors_of(model)] == places


@pytest.mark.parametrize("build", [plain, vace])
@pytest.mark.parametrize(("count", "prefetch"), [(5, 0), (3, 1), (5, 2)])
def test_branches_in_lockstep_share_the_copies_of_a_block_and_keep_their_bits(
    build: Callable[[], Any], count: int, prefetch: int
) -> None:
    """Two branches, three steps: one after the other they copy every swapped block twice a step, in step once."""
    model = build()
    x, times = torch.randn(1, 16, 2, 4, 4), torch.full((1,), 500.0)
    branches = {name: condition_of(model) for name in ("uncond", "cond")}
    step, stacked = Step(0, 3, 500.0, 0.5, 0.4), type(branches["cond"]).cat(list(branches.values()))
    copies, copied = [Copies(late=True), Copies(late=True)], []
    with torch.inference_mode():
        alone = {name: model.velocity(x, times, each, step, (name,)) for name, each in branches.items()}
        inner = model.run_block
        for together, engine in enumerate(copies):
            swap = Swap(swapped_blocks(model.all_blocks(), count), CPU, prefetch=prefetch, copies=engine)
            model.run_block = swap.wrap(inner)
            for _ in range(3):
                if together:
                    found = model.velocities(x, dict.fromkeys(branches, times), branches, stacked, step)
                else:
                    found = {name: model.velocity(x, times, each, step, (name,)) for name, each in branches.items()}
                assert all(torch.equal(found[name], alone[name]) for name in branches)
            swap.release()
            copied.append(sum(event.startswith("fetch") for event in engine.events))
    assert not torch.equal(alone["uncond"], alone["cond"])
    coming = under_way(count, prefetch, model.all_blocks())
    assert copied == [2 * 3 * count + coming, 3 * count + coming]


def test_blocks_out_of_turn_and_exceptions_cost_a_copy_and_nothing_else() -> None:
    copies, blocks = Copies(late=True), [seeded(lambda: nn.Linear(2, 2)) for _ in range(5)]
    swap = Swap(blocks, CPU, prefetch=1, copies=copies)

    def fragile(block: nn.Module, x: Tensor | None) -> Tensor:
        if x is None:
            raise torch.OutOfMemoryError("no memory")
        return block(x)

    run, x = swap.wrap(fragile), torch.ones(2)
    for index in (0, 1, 3, 0, 4, 4, 2):
        assert torch.equal(run(blocks[index], x), blocks[index](x))
    with pytest.raises(torch.OutOfMemoryError):
        run(blocks[1], None)
    assert torch.isfinite(blocks[1].weight).all()
    assert torch.equal(run(blocks[2], x), blocks[2](x))
    stranger = nn.Linear(2, 2)
    assert torch.equal(run(stranger, x), stranger(x))


def test_weights_are_written_where_they_stay_and_a_block_is_one_copy() -> None:
    """The parameters lie in the arena itself, side by side, in the dtype they are declared in."""
    source = plain()
    with torch.device("meta"):
        model = WanModel(**SIZES).bfloat16().requires_grad_(False)
    blocks = swapped_blocks(model.all_blocks(), 3)
    homes = homes_of(model, blocks, pin=False)
    load_into(
        model, source.state_dict().items(), dtype=lambda key: torch.bfloat16, place=lambda key, _: homes.get(key, CPU)
    )
    arena = {home.untyped_storage().data_ptr() for home in homes.values()}
    assert {t.untyped_storage().data_ptr() for block in blocks for t in tensors_of(block)} == arena
    assert len(arena) == 1
    others = [t for block in model.all_blocks() if block not in blocks for t in tensors_of(block)]
    assert not arena & {t.untyped_storage().data_ptr() for t in others}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key].bfloat16())
    copied: list[int] = []

    class Counting(Copies):
        def fetch(self, slot: int, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
            copied.append(len(copies))

    swap = Swap(blocks, CPU, prefetch=2, copies=Counting(late=False))
    swap.wrap(lambda block: None)(blocks[0])
    assert copied == [1, 1, 1]


def test_what_the_trunk_reads_of_a_block_stays_with_the_rest() -> None:
    model = plain()
    expected, early = velocity(model), model.read_by_trunk()
    assert len(early) == len(model.blocks)
    assert not homes_of(model, model.all_blocks(), pin=False, stay=early).keys() & early.keys()
    swap = Swap(model.all_blocks(), CPU, prefetch=1, copies=Copies(late=True), stay=early.values())
    assert not {id(tensor) for tensor in swap.tensors()} & {id(tensor) for tensor in early.values()}
    model.run_block = swap.wrap(model.run_block)
    assert torch.equal(velocity(model), expected)


def test_an_arena_that_comes_in_pieces_is_copied_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.engine.arena.ARENA_BYTES", 2048)
    model = plain()
    expected = velocity(model)
    arena = Arena(2**20, pin=False)
    for tensor in tensors_of(model.blocks):
        tensor.data = arena.take(tensor).copy_(tensor.data)
    swap = Swap(model.all_blocks(), CPU, prefetch=1, copies=Copies(late=True))
    model.run_block = swap.wrap(model.run_block)
    assert torch.equal(velocity(model), expected)


def test_swapped_blocks_stay_when_the_rest_of_the_network_moves_and_slots_go_with_the_last_use() -> None:
    model, copies = plain(), Copies(late=False)
    moved: set[int] = set()

    class Watch(DeviceMover):
        def to_device(self, name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
            moved.update(map(id, tensors))

        def to_host(self, name: str, tensors: Sequence[Tensor]) -> None:
            copies.events.append("leaves")

    swap = Swap(model.all_blocks(), CPU, prefetch=1, copies=copies)
    model.run_block = swap.wrap(model.run_block)
    placement = Placement(torch.device("cuda"), Watch())  # only a name here
    placement.add("dit", lambda where: model, Policy.AFTER_USE)
    placement.get("dit")
    placement.swap("dit", swap)
    with placement.use("dit"), placement.use("dit"):
        velocity(model)
    assert copies.events[-2:] == ["finish", "leaves"]
    assert moved == set(map(id, tensors_of(model))) - set(map(id, swap.tensors()))


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_again_for_another_slot() -> None:
    model = plain()
    blocks, inner = model.all_blocks(), model.run_block
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    expected = velocity(model)
    torch._dynamo.utils.counters.clear()
    swap = Swap(swapped_blocks(blocks, 3), CPU, prefetch=1, copies=Copies(late=True))
    model.run_block = swap.wrap(inner)
    for _ in range(3):
        assert torch.equal(velocity(model), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_swap_bytes_counts_what_stays_and_the_slots() -> None:
    sizes = [10, 10, 30, 10, 10]
    assert swap_bytes(sizes, 0, 1) == 70
    assert swap_bytes(sizes, 5, 1) == 60  # two slots of the largest
    assert swap_bytes(sizes, 1, 7) == 70  # one block has one slot, whatever the prefetch
    equal = [7] * 40
    assert [swap_bytes(equal, n, 1) for n in (1, 2, 3, 20, 40)] == [280, 280, 273, 154, 14]
    assert fewest_swapped(equal, 1, 280) == 0
    assert fewest_swapped(equal, 1, 154) == 20
    assert fewest_swapped(equal, 1, 1) == 40


def encoder() -> Any:
    return seeded(lambda: T5Encoder(50, 16, 16, 24, num_heads=2, num_layers=4, num_buckets=8, shared_pos=False))


def test_a_streamed_text_encoder_has_two_layers_on_the_device_and_the_same_bits() -> None:
    model, ids = encoder(), torch.tensor([[3, 7, 9, 1]])
    expected = model(ids)
    copies = Copies(late=True)
    swap = Swap(model.all_blocks(), CPU, prefetch=1, copies=copies)
    model.run_block = swap.wrap(model.run_block)
    assert torch.equal(model(ids), expected)
    assert {event for event in copies.events if event.startswith("fetch")} == {"fetch 0", "fetch 1"}
    staying = set(map(id, swap.tensors()))
    assert [key for key, value in model.named_parameters() if id(value) not in staying] == [
        "token_embedding.weight",
        "norm.weight",
    ]


def test_a_table_in_ram_answers_where_the_numbers_are() -> None:
    table = RowsFromRAM(6, 4)
    numbers = torch.tensor([[1, 5]])
    assert torch.equal(table(numbers), table.weight[numbers])
    assert RowsFromRAM(6, 4).to("cpu")(numbers).device == numbers.device


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_swap": -1}, "--block_swap -1"),
        ({"block_swap": 2, "prefetch_blocks": -1}, "--prefetch_blocks -1"),
    ],
    ids=str,
)
def test_numbers_below_zero_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Plan.of(registry(), values).check(Hardware(device=CPU, name="CPU"))


def test_more_blocks_than_there_are_is_refused_before_a_weight_is_read(tiny_checkpoint: Path, tiny_config: Any) -> None:
    import wan

    with pytest.raises(BadRequest, match="--block_swap 3: 'low' has 2 blocks|--block_swap 3: 'high' has 2 blocks"):
        wan.WanT2V(tiny_config, tiny_checkpoint, device="cpu", block_swap=3)


def test_streaming_the_text_encoder_to_the_gpu_and_computing_it_on_the_cpu_exclude_each_other() -> None:
    with pytest.raises(IncompatibleOptions, match=r"--stream_t5 and --t5_cpu"):
        Plan.of(registry(), {"t5_cpu": True, "stream_t5": True}).check(Hardware(device=CPU, name="CPU"))
