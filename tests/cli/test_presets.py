"""Presets: which one `auto` takes and why, what of it gives way, and what `--print_plan` says of all of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from wan.cli import presets
from wan.cli.args import parse
from wan.cli.budget import budget_of
from wan.cli.cards import CARDS, SHEETS, nearest
from wan.cli.generate import main
from wan.components import dummy_components
from wan.conditioning.geometry import parse_size
from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS
from wan.engine.budget import MARGIN_BYTES, Planner, Wishes
from wan.engine.compiling import Compiled
from wan.engine.errors import BadRequest, IncompatibleOptions
from wan.engine.hardware import Hardware
from wan.engine.optimizations import Compile, registry
from wan.engine.plan import Plan, options
from wan.engine.prediction import PLAIN, Models, Predictor, Video, predict
from wan.sizes import models_of

DUMMY = ["--task", "t2v-1.3B", "--load_format", "dummy", "--device", "cpu"]
CPU = Hardware(device=torch.device("cpu"), name="CPU")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def card(name: str, sm: tuple[int, int], total_gb: float, free_gb: float | None = None) -> Hardware:
    free = total_gb if free_gb is None else free_gb
    return Hardware(
        device=torch.device("cuda"), name=name, sm=sm, total_memory=int(total_gb * 1e9), free_memory=int(free * 1e9)
    )


def told(argv: list[str], capsys: Any, **program: Any) -> str:
    assert main([*DUMMY, "--print_plan", *argv], **program) == 0
    return str(capsys.readouterr().err)


def run_line(argv: list[str], capsys: Any, **program: Any) -> str:
    return next(line for line in told(argv, capsys, **program).splitlines() if line.startswith("run "))


# Which one -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "preset"),
    [
        (CPU, "cpu"),
        (card("NVIDIA H100 80GB HBM3", (9, 0), 85.0), "h100"),
        (card("NVIDIA H100 NVL", (9, 0), 100.0), "h100"),
        (card("NVIDIA H200", (9, 0), 150.0), "h200"),
        (card("NVIDIA GH200 480GB", (9, 0), 101.0), "h100"),
        (card("NVIDIA A100-SXM4-80GB", (8, 0), 85.0), "a100_80gb"),
        (card("NVIDIA A100-PCIE-40GB", (8, 0), 42.4), "a100_40gb"),
        (card("NVIDIA L40S", (8, 9), 47.7), "l40s"),
        (card("NVIDIA L4", (8, 9), 23.7), "l4"),
        (card("NVIDIA RTX A6000", (8, 6), 51.0), "a6000"),
        (card("NVIDIA GeForce RTX 5090", (12, 0), 33.7), "rtx5090"),
        (card("NVIDIA GeForce RTX 4090", (8, 9), 25.3), "rtx4090"),
        (card("NVIDIA GeForce RTX 4090", (8, 9), 25.3, free_gb=6.0), "rtx4090"),  # its own, however full it is
        (card("NVIDIA GeForce RTX 3090 Ti", (8, 6), 25.3), "rtx3090"),
        (card("NVIDIA GeForce RTX 3060", (8, 6), 12.6), "rtx3060_12gb"),
        # None of their own:
        (card("NVIDIA RTX 4500 Ada Generation", (8, 9), 25.2), "rtx4090"),
        (card("NVIDIA RTX 4500 Ada Generation", (8, 9), 25.2, free_gb=13.0), "rtx3060_12gb"),
        (card("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 17.1), "rtx3060_12gb"),
        (card("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10.5), "auto"),
        (card("NVIDIA A10", (8, 6), 23.7), "rtx3090"),
        (card("NVIDIA B200", (10, 0), 191.0), "h200"),
        (card("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 102.0), "h100"),
        (card("Tesla V100-SXM2-32GB", (7, 0), 34.0), "auto"),
        (card("NVIDIA GeForce RTX 3060", (8, 6), 8.6), "auto"),
    ],
    ids=lambda value: f"{value.name} {value.free_memory / 1e9:.0f}" if isinstance(value, Hardware) else value,
)
def test_auto_goes_by_name_then_by_free_memory_and_capability(hardware: Hardware, preset: str) -> None:
    chosen, why = nearest(hardware)
    assert chosen == preset
    own = hardware.is_cuda and any(entry.named(hardware) for entry in CARDS)
    assert why and (hardware.name in why) == (hardware.is_cuda and not own)


def test_every_card_has_its_preset_and_every_preset_is_valid_and_exact(root: Path) -> None:
    """Each says only what options have, nothing lossy, and a reason for every line."""
    files = {path.stem: path for path in (root / "configs").glob("*.toml")}
    assert set(files) == {entry.preset for entry in CARDS} | {"cpu", "auto"}
    for path in files.values():
        said = presets.read_preset(path)
        plan = Plan.of(registry(), said, source=path.name)
        assert "lossy" not in {o.grade for o in plan.enabled()}, path.name
        assert set(presets.comments(path)) == set(said), path.name


def test_the_preset_taken_and_why_is_told(capsys: Any) -> None:
    assert "preset  cpu, flag auto: there is no CUDA card\n" in told(["--preset", "auto"], capsys)
    assert "\npreset" not in told(["--preset", "none"], capsys, default_preset="auto")


# How good it is ------------------------------------------------------------------------------------------------------


@functools.cache
def text_encoder(sizes: str) -> Any:
    """One for all tasks: building it takes most of the time."""
    task = next(task for task in WAN_CONFIGS if str(WAN_CONFIGS[task].get("t5_sizes")) == sizes)
    return next(each for each in dummy_components(WAN_CONFIGS[task]) if each.name == "text_encoder").build()


@functools.cache
def cases() -> dict[tuple[Models, Video], str]:
    """Every task in every size, those that cost the same once: a picture that is turned, another task's network."""
    found: dict[tuple[Models, Video], str] = {}
    for task, config in WAN_CONFIGS.items():
        shared = functools.partial(text_encoder, str(config.get("t5_sizes")))
        networks = [
            dataclasses.replace(each, build=shared) if each.name == "text_encoder" else each
            for each in dummy_components(config)
        ]
        models = models_of(networks)
        for size in map(parse_size, SUPPORTED_SIZES[task]):
            shape = {"width": max(size), "height": min(size)}
            video = Video(frames=config.frame_num, encodes="t2v" not in task, **shape)
            found.setdefault((models, video), f"{task} {size}")
    return found


SWITCHES = ("offload_model", "vae_cpu", "t5_cpu", "compile", "vae_tiling")
RIVALS = [
    dict(zip((*SWITCHES, "block_swap"), values, strict=True)) | dict.fromkeys(branches, True)
    for *values, branches in itertools.product(
        *[(False, True)] * len(SWITCHES), (0, 10, 40), ((), ("use_batched_cfg",), ("lockstep_cfg",))
    )
]
"""Other ways to run: what the planner's options and torch.compile offer, a few values each; beside these, rows."""
ROWS = [{"ffn_rows": ffn, "attention_rows": attention} for ffn in (0, 8192) for attention in (0, 8192)]


@functools.cache
def least_bytes(models: Models, video: Video) -> list[int]:
    """What each rival needs at least, with the rows that need least: neither they nor the card change it otherwise."""
    predictor = Predictor(models, video, SHEETS[CARDS[0].sheet])
    return [min(predictor.predict(rival | rows).peak_bytes for rows in ROWS) for rival in RIVALS]


@pytest.mark.slow
def test_a_turned_picture_costs_the_same() -> None:
    models, video = next(case for case in cases() if case[1].width != case[1].height)
    turned = dataclasses.replace(video, width=video.height, height=video.width)
    for rival in RIVALS[::7]:
        lying, standing = (predict(models, each, SHEETS[CARDS[0].sheet], rival) for each in (video, turned))
        assert (lying.phases, lying.seconds) == (standing.phases, standing.seconds)


def test_no_exact_way_to_run_that_fits_is_predicted_clearly_faster_than_preset_and_planner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any task in any size on any card: within free memory, nothing lossy but invisible tiles, within 5 %."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "triton" or find(name, *a))
    for entry in CARDS:
        check_card(entry)


def check_card(entry: Any) -> None:
    sheet = SHEETS[entry.sheet]
    here = card(f"NVIDIA {sheet.name}", entry.sm, sheet.memory / 1e9)
    free = here.free_memory - MARGIN_BYTES
    plan, preset = presets.plan_and_preset(parse(["--preset", "auto"], options(registry())), registry(), here, "none")
    assert preset is not None and (preset.path.stem, preset.left_out) == (entry.preset, ())
    assert {o.grade for o in plan.enabled()} <= {"bitwise", "rounding"}
    names = PLAIN.keys() & {o.name for o in options(registry())}
    wishes = Wishes(available=frozenset(names), others={name: plan.values()[name] for name in names})
    checked: list[dict[str, Any]] = []
    for (models, video), case in cases().items():
        fitting = [rival for rival, least in zip(RIVALS, least_bytes(models, video), strict=True) if least <= free]
        try:
            chosen = Planner(models, video, sheet, wishes).choose(free)
        except IncompatibleOptions:
            assert not fitting, (sheet.name, case, fitting[0])
            continue
        assert chosen.peak_bytes <= free, (sheet.name, case)
        values = plan.values() | {name: chosen.values[name] for name in chosen.reasons}
        if values not in checked:
            checked.append(values)
            Plan.of(registry(), values, source="").check(here)
        predictor = Predictor(models, video, sheet)
        best = min(map(predictor.predict, fitting), key=lambda found: found.total_seconds, default=chosen)
        assert chosen.total_seconds <= 1.05 * best.total_seconds, (sheet.name, case, chosen.values, best.values)


# What wins -----------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_a_preset_and_a_preset_over_a_default(capsys: Any) -> None:
    Path("mine.toml").write_text("tf32 = true\nt5_cpu = true\n")
    line = run_line(["--preset", "mine.toml", "--no-tf32"], capsys)
    assert "t5_cpu=True (preset mine)" in line and "tf32=True" not in line
    assert "offload_model=True (default for one process)" in line


def test_what_a_preset_says_gives_way_where_it_cannot_act() -> None:
    """Nobody asked for it: a card without tensor cores for it, or a missing package, is told and no error."""
    old = card("NVIDIA GeForce GTX 1080", (6, 1), 8.5)
    args = parse(["--preset", "h100"], options(registry()))
    plan, preset = presets.plan_and_preset(args, registry(), old, "none")
    assert preset is not None and not plan.values()["compile"] and plan.values()["tf32"]
    [line] = [line for line in preset.lines() if "compile" in line]
    assert re.match(r"note: preset h100 without compile.*: --compile needs sm_70 or newer", line)


def test_what_a_file_of_the_users_says_does_not_give_way(capsys: Any) -> None:
    Path("mine.toml").write_text('attention = "flash3"\n')
    assert main([*DUMMY, "--preset", "mine.toml"]) == 2
    assert "--attention flash3 needs a CUDA card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("warp = 9", "preset mine.toml: no option is called 'warp'; known: .*tf32"),
        ("tf32 = 3", "preset mine.toml: tf32 = 3 is not a bool"),
        ("[tf32]\non = true", "flat list"),
        ("tf32 = yes please", "cannot be read"),
        ('reserve_vram = "4"', "preset mine.toml: reserve_vram = '4' is not a size of memory: write 12GB"),
        ('reserve_vram = "4GB"', "--reserve_vram 4.0 GB: there is no GPU here"),
        (
            "compile = true\ncompile_mode = 'max-autotune'\ncuda_graphs = false",
            "--no-cuda_graphs and --compile_mode max",
        ),
    ],
)
def test_a_preset_with_a_mistake_is_refused(content: str, says: str, capsys: Any) -> None:
    Path("mine.toml").write_text(content)
    assert main([*DUMMY, "--preset", "mine.toml"]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_preset_may_leave_memory_to_others_and_a_flag_says_otherwise() -> None:
    Path("mine.toml").write_text('reserve_vram = "10GB"  # the desktop\n')
    here = card("NVIDIA L40S", (8, 9), 48.0, free_gb=47.0)

    def left(*argv: str) -> tuple[int, list[str]]:
        args = parse(["--preset", "mine.toml", *argv], options(registry()))
        _, preset = presets.plan_and_preset(args, registry(), here, "none")
        assert preset is not None
        budget = budget_of(args, here, "mine.toml", preset.reserve_vram)
        assert budget is not None and budget.asked
        return budget.size, preset.lines()

    assert left() == (int(38e9), ["preset  mine, leaves 10.0 GB of GPU memory to others"])
    assert left("--reserve_vram", "20GB") == (int(28e9), ["preset  mine"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--compile --cuda_graphs --compile_mode max-autotune-no-cudagraphs", "--cuda_graphs and --compile_mode max-"),
        ("--compile --no-cuda_graphs --compile_mode reduce-overhead", "--no-cuda_graphs and --compile_mode reduce-"),
        ("--cuda_graphs --no-cuda_graphs", "contradict"),
        ("--cuda_graphs", "add --compile"),
        ("--compile --cuda_graphs", "--cuda_graphs needs a CUDA card"),
    ],
)
def test_cuda_graphs_that_contradict_or_cannot_be_end_with_2(flags: str, says: str, capsys: Any) -> None:
    assert main([*DUMMY, *flags.split()]) == 2
    assert says in capsys.readouterr().err


def test_cuda_graphs_are_a_mode_of_the_compiler_and_of_a_preset_only_they_give_way() -> None:
    here = card("NVIDIA L4", (8, 9), 23.7)
    said = {"compile": True, "cuda_graphs": True}
    assert Compile(**said).mode == Compile(**said, compile_mode="reduce-overhead").mode == "reduce-overhead"
    assert Compile(**said, compile_mode="max-autotune").mode == "max-autotune"
    assert Compile(compile=True, cuda_graphs=False).mode == "default"
    args = parse(["--preset", "l4", "--compile_mode", "reduce-overhead", "--no-compile_dynamic"], options(registry()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiled, "backend", "eager")  # no compiler is needed to say so
        plan, preset = presets.plan_and_preset(args, registry(), here, "none")
    assert preset is not None and [line for line in preset.lines() if "cuda_graphs" in line]
    assert plan.values()["compile"] and plan.values()["compile_mode"] == "reduce-overhead"


def test_a_preset_may_not_be_a_folder() -> None:
    Path("odd.toml").mkdir()
    with pytest.raises(BadRequest, match="no such file"):
        presets.find_preset("odd.toml", CPU)


# --print_plan --------------------------------------------------------------------------------------------------------


def test_print_plan_has_a_row_for_every_option_with_its_source_and_reason(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_TORCH_COMPILE", "0")
    rows = told(["--vae_cpu", "--frame_num", "5", "--size", "480p"], capsys, default_preset="auto", variables=True)
    found = {line.split()[0]: line.split(maxsplit=2)[1:] for line in rows.splitlines() if "  " in line}
    assert {o.name for o in options(registry())} <= set(found)
    assert found["vae_cpu"] == ["on", "flag"]
    assert found["compile"] == ["off", "WAN_TORCH_COMPILE=0 in the environment"]
    assert re.fullmatch(r"preset cpu, default auto +a tensor-core format", found["tf32"][1])
    assert found["param_dtype"] == ["-", "default"]


def test_print_plan_tells_tokens_and_weights_of_the_headers(capsys: Any, tiny_checkpoint: Path) -> None:
    """t2v-1.3B has 1.42 billion parameters: 2.6 GiB in bfloat16, and a little in float32."""
    lines = told(["--size", "480p"], capsys)
    assert "tokens  32760 = 21 x 30 x 52 of the whole video" in lines
    [size] = re.findall(r"weights dit (\d\.\d\d) GiB, text_encoder 10\.5\d GiB, vae 0\.47 GiB", lines)
    assert 2.64 < float(size) < 2.72
    [whole] = re.findall(r"weights dit (\d\.\d\d) GiB", told(["--size", "480p", "--param_dtype", "float32"], capsys))
    assert float(whole) == pytest.approx(1.42e9 * 4 / 2**30, rel=0.01)
