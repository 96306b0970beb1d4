"""Writes the pages of docs/ that are derived from the code: optimizations, families, cli, FILENAME_GUIDE,
the matrix in reliability, the choices in memory, the tables in presets and few-step, and those of tools/guide_pages.py.

python tools/gen_docs.py            write them (make docs)
python tools/gen_docs.py --check    exit 1 and name the pages that are out of date
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "cli")]

import fault_table  # noqa: E402 (what is promised and tested)
import guide_pages  # noqa: E402
from guide_pages import GENERATED, table  # noqa: E402
from limits import analysis_page  # noqa: E402
from limits import page as limits_page  # noqa: E402

from wan.cli import args as cli  # noqa: E402
from wan.cli import benchmark, naming, presets  # noqa: E402
from wan.cli.benchmarking import summary  # noqa: E402
from wan.cli.benchmarking.cases import cases_of  # noqa: E402
from wan.configs import SUPPORTED_SIZES, WAN_CONFIGS  # noqa: E402
from wan.engine.optimizations import registry  # noqa: E402
from wan.engine.options import Option, options_of  # noqa: E402
from wan.engine.plan import Optimization, Order, options  # noqa: E402
from wan.engine.sampling import recipes  # noqa: E402
from wan.families import class_name, family_of  # noqa: E402

GRADES = {
    "bitwise": "the same bits",
    "rounding": "the same formula in another order of summation: differs by rounding",
    "lossy": "approximate",
}


def spelled(value: Any) -> str:
    """A default as a user would write it."""
    if value is None or value == "":
        return "-"
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def flag_row(o: Option) -> list[str]:
    on = ", ".join(f"`{flag}`" for flag in o.flags)
    choices = " | ".join(map(str, o.choices)) if o.choices else ""
    off = ", ".join(f"`{flag}`" for flag in o.off)
    return [on + (f" {choices}" if choices else ""), off or "-", spelled(o.default), o.help]


def optimizations_page() -> str:
    """Every optimisation of the registry, in the order of application."""
    lines = [
        GENERATED,
        "# Optimisations",
        "",
        "Each works from the command line, in a preset (`configs/*.toml`) and as a keyword of the classes; where it",
        'says "per call", also as a keyword of `generate`. They are checked together before any weight is read and',
        "applied in the order of this page.",
        "",
    ]
    ordered = sorted(registry(), key=lambda kind: (kind.order, kind.__name__))
    anchor = "[{0}](#{1})"
    rows = [
        [
            anchor.format(kind.__name__, kind.__name__.lower()),
            options_of(kind)[0].help,
            spelled(options_of(kind)[0].default),
            kind.grade,
        ]
        for kind in ordered
    ]
    lines += table(("", "does", "default", "result"), rows)
    lines += measured()
    for kind in ordered:
        lines += ["", *optimization_section(kind)]
    return "\n".join(lines) + "\n"


def measured() -> list[str]:
    """What the surveys of the demo model found, those of most prompts first, and what none of them looked at."""
    paths = (ROOT / "docs" / "benchmarks").glob("quality-t2v-demo*.json")
    surveys = [(path, json.loads(path.read_text(encoding="utf-8"))["rows"]) for path in sorted(paths)]
    if not surveys:
        return []
    surveys.sort(key=lambda survey: -max(row["runs"] for row in survey[1]))
    seen = {row["variant"] for _, rows in surveys for row in rows if row["runs"]}
    asked = [case.label for case in cases_of(registry(), trained=33, cuda=True)]
    missing = ", ".join(f"`{label}`" for label in asked if label not in seen)
    return [
        "",
        "## Measured on the demo model",
        "",
        "A small model on easy pictures: read the order, not the numbers, into other checkpoints, and measure",
        "yours with `benchmark_t2v.py --mode quality`. What columns are: [benchmarks](benchmarks/README.md#quality);",
        "where zero lies within the interval of a difference none was seen.",
        *(line for path, _ in surveys for line in survey_lines(path)),
        "",
        f"Not measured: {missing}." if missing else "No row is missing.",
    ]


def survey_lines(path: Path) -> list[str]:
    """One survey: how it was made, its table, its picture."""
    found, place = json.loads(path.read_text(encoding="utf-8")), path.relative_to(ROOT / "docs")
    rows, plain = found["rows"], found["rows"][0]
    return [
        "",
        f"{max(row['runs'] for row in rows)} clips, {plain['frames']} frames, {plain['size']}, {plain['steps']} steps,",
        f"{plain['hardware']}, commit {found['commit']}; all that was recorded: [{path.name}]({place.as_posix()}).",
        "",
        *summary.markdown(rows),
        "",
        *(f"`--quality {row['quality']}` is `{row['variant']}`." for row in rows if row["quality"]),
        "",
        f"![One clip of each row]({place.with_suffix('.png').as_posix()})",
    ]


def optimization_section(kind: type[Optimization]) -> list[str]:
    """One optimisation: its docstring, flags and facts."""
    facts = [
        f"Result: {GRADES[kind.grade]}" + (f" (tests allow {kind.tolerance:g} relative)" if kind.tolerance else "")
    ]
    facts.append(f"Applied: {Order(kind.order).name}" + (", per call" if kind.per_call else ""))
    facts += [f"Not with {conflict.other}: {conflict.why}" for conflict in kind.conflicts]
    lines = [f"## {kind.__name__}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
    lines += table(("flag", "off", "default", "meaning"), [flag_row(o) for o in options_of(kind)])
    return [*lines, "", *(f"- {fact}" for fact in facts)]


def families_page() -> str:
    """Every task that runs, with its class and defaults."""
    lines = [GENERATED, "# Tasks", "", "`python generate.py --task <task>`; the class is `wan.<class>`.", ""]
    header = ("task", "class", "family", "experts", "dim x layers", "sizes", "frames", "steps", "shift", "guidance")
    rows = []
    for task, config in WAN_CONFIGS.items():
        rows.append(
            [
                f"`{task}`",
                f"`{class_name(task)}`",
                family_of(task).name,
                "2" if config.get("boundary") else "1",
                f"{config.dim} x {config.num_layers}",
                ", ".join(SUPPORTED_SIZES[task]).replace("*", "x"),
                *(spelled(config.get(field)) for field in ("frame_num", "sample_steps", "sample_shift")),
                guidance(config),
            ]
        )
    lines += table(header, rows)
    lines += [
        "",
        "Other sizes run with `--any_size` if both sides are multiples of 16; frames are 4n+1. Guidance of two-expert",
        "models is (low noise, high noise).",
    ]
    return "\n".join(lines) + "\n"


def guidance(config: Any) -> str:
    scale = config.get("sample_guide_scale")
    return ", ".join(map(str, scale)) if isinstance(scale, tuple) else spelled(scale)


def cli_page() -> str:
    """Every flag of generate.py."""
    known = options(registry())
    lines = [
        GENERATED,
        "# generate.py",
        "",
        "All flags of the original Wan 2.1 and 2.2 programs parse, with the same names and defaults. A dash may stand",
        "for an underscore. What is not spelled comes from the preset, then from the task's configuration.",
        "",
        "```",
        inspect.cleandoc(cli.EXAMPLES),
        "```",
    ]
    groups = dict.fromkeys(flag.group for flag in cli.FLAGS)
    for group in groups:
        rows = [plain_flag_row(flag) for flag in cli.FLAGS if flag.group == group]
        lines += ["", f"## {group.capitalize()}", "", *table(("flag", "default", "meaning"), rows)]
    lines += ["", "## Optimisations", "", "What they do and cost: [optimizations.md](optimizations.md).", ""]
    lines += table(("flag", "off", "default", "meaning"), [flag_row(o) for o in known])
    lines += ["", "## Known, but without effect yet", ""]
    lines += ["They accept their default and refuse another value in one line.", ""]
    rows = [[f"`--{flag.name}`", spelled(flag.default), flag.help, flag.missing] for flag in cli.unavailable(known)]
    lines += table(("flag", "default", "meaning", "waits for"), rows)
    lines += ["", "## benchmark_t2v.py", "", "All of the above, and ([how to measure](benchmarks/README.md)):", ""]
    actions = [action for action in benchmark.build_parser()._actions if action.dest != "help"]
    lines += table(("flag", "meaning"), [[f"`{action.option_strings[0]}`", action.help or ""] for action in actions])
    return "\n".join(lines) + "\n"


def plain_flag_row(flag: cli.Flag) -> list[str]:
    names = ", ".join(f"`{name}`" for name in (f"--{flag.name}", *flag.aliases))
    choices = " " + " | ".join(flag.choices) if flag.choices else ""
    return [names + choices, spelled(flag.default), flag.help]


def filename_page() -> str:
    """The fields of --name and what becomes of them."""
    takes = {naming.TEXT: "characters at most", naming.NUMBER: "digits at least", naming.FIXED: "-"}
    rows = [[f"`{{{f.name}}}`", f.help, f.example or "-", takes[f.kind]] for f in naming.FIELDS]
    return "\n".join([GENERATED, FILENAME_HEAD, *table(("field", "is", "example", "`:N`"), rows), FILENAME_RULES])


FILENAME_HEAD = """# Names of videos

```bash
python generate.py --task t2v-demo                                                   # task_size_1_prompt_time.mp4
python generate.py --task t2v-demo --save_file clips/                                # the same, in that folder
python generate.py --task t2v-demo --save_file clips/fox.mp4                         # that file
python generate.py --task t2v-demo --name "{task}_{size}_{seed}_{prompt:40}"         # by fields
python generate.py --task t2v-demo --name "{date}/{resolution}_{index:4}" --save_file clips/
```

Without `--name` a video is called as upstream calls it: task, size, the degree of parallelism, 50 characters of the
prompt, the time. `--name` makes it of text and fields:
"""

FILENAME_RULES = f"""
- `/` makes sub-folders. `..`, absolute paths, unknown fields and stray braces are refused before anything is loaded;
  `{{{{` and `}}}}` stand for braces.
- A text without a length has at most {naming.DEFAULT_LENGTH} characters. A name or folder has at most
  {naming.MAX_BYTES} bytes in UTF-8; where it would have more, the longest text gives way, so that a seed at the end
  stays.
- The ending is .mp4, or .png for one frame, unless the pattern ends in {", ".join(naming.ENDINGS)}.
- Every name is one that Windows, macOS and Linux take: characters such as `:` or `?` and line breaks become `_`, marks
  nobody sees (direction of text, zero width) go, names of devices (`CON`, `LPT1`) get a `_`, dots and blanks at the
  ends go.
- A name of the program's own never overwrites: where the file exists, or another run is making it, `-2`, `-3`, ... is
  added, or `{{index}}` counts on. The name is taken at the start by a folder `NAME.mp4.run` beside it, so programs that
  start in the same second do not meet.
- A file named with `--save_file` is replaced, at once and only after the new video was read back.
"""


def reliability_page() -> str:
    """The page as written, its matrix from the tests."""
    mark = "<!-- Generated by tools/gen_docs.py from tests/cli/fault_table.py: run `make docs`. -->\n"
    written = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition(mark)[0]
    header = ("stage", "fault", "status", "what is kept", "go on with")
    return written + mark + "\n" + "\n".join(table(header, fault_table.matrix())) + "\n"


def presets_page() -> str:
    """The page as written, its table from configs/."""
    mark = "<!-- Generated by tools/gen_docs.py from configs/: run `make docs`. -->\n"
    written = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8").partition(mark)[0]
    said = {path.stem: presets.read_preset(path) for path in sorted((ROOT / "configs").glob("*.toml"))}
    names = [name for kind in registry() for o in options_of(kind) if any((name := o.name) in p for p in said.values())]
    rows = [[f"`{stem}`", *(spelled(values.get(name)) for name in names)] for stem, values in said.items()]
    return written + mark + "\n" + "\n".join(table(("preset", *(f"`{name}`" for name in names)), rows)) + "\n"


def few_step_page() -> str:
    """The page as written, its table from the recipes."""
    mark = "<!-- Generated by tools/gen_docs.py from wan/engine/sampling/recipes.toml: run `make docs`. -->\n"
    written = (ROOT / "docs" / "few-step.md").read_text(encoding="utf-8").partition(mark)[0]
    rows = []
    for name, given in recipes.published().items():
        recipe = recipes.recipe_named(name)
        levels = ", ".join(f"{sigma:.4g}" for phase in recipe.phases for sigma in phase.sigmas)
        about = f"{given['about']}. Source: {given['source']}"
        rows.append([f"`{name}`", str(recipe.forwards), str(recipe), levels or "by the shift", about, given["files"]])
    header = ("recipe", "forwards", "steps", "noise levels", "what it is", "weights")
    return written + mark + "\n" + "\n".join(table(header, rows)) + "\n"


def pages() -> dict[Path, str]:
    """Path of each generated page and what belongs in it."""
    docs = ROOT / "docs"
    return {
        docs / "optimizations.md": optimizations_page(),
        docs / "families.md": families_page(),
        docs / "cli.md": cli_page(),
        docs / "FILENAME_GUIDE.md": filename_page(),
        docs / "reliability.md": reliability_page(),
        docs / "memory.md": guide_pages.memory_page(),
        docs / "presets.md": presets_page(),
        docs / "few-step.md": few_step_page(),
        docs / "OPTIMIZATION_GUIDE.md": guide_pages.guide_page(),
        docs / "OPTIMIZATION_SUMMARY.md": guide_pages.summary_page(),
        docs / "BENCHMARK_RESULTS.md": guide_pages.results_page(),
        docs / "benchmarks" / "limits.md": limits_page.page(),
        **{docs / name: text for name, text in analysis_page.pages().items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args()
    made = pages()
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not args.check:
            path.write_text(made[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is out of date: run make docs' if args.check else 'written'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
