"""A survey as the command line asks for it: which cases, which prompts, and what cannot be done, before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.cli.benchmarking.book import Book
from wan.cli.benchmarking.cases import PLAIN, Case, cases_of, chosen, group_of, groups
from wan.cli.benchmarking.processes import OpenWorker, say
from wan.cli.benchmarking.samples import Samples
from wan.cli.benchmarking.survey import Survey, conduct, publish
from wan.cli.benchmarking.trial import Setting
from wan.cli.benchmarking.worker import plan_of
from wan.cli.checkpoint import DEMO
from wan.engine.errors import BadRequest, GenerationFailed, WanError
from wan.resources import folder

if TYPE_CHECKING:
    from wan.cli.request import Wanted
    from wan.engine.hardware import Hardware
    from wan.engine.plan import Optimization

USUAL = {"preset": "none", "attention": "sdpa"}
"""The plain run keeps to the definitions, whatever the program would choose on this machine."""
ONE_PROMPT = 16
"""Clips of a single prompt, where nothing says how many."""
NOT_HERE = ("matrix", "upstream", "noise_file", "price_per_hour", "num_runs")
Asked = dict[str, Any]


def run_survey(
    own: argparse.Namespace, rest: Sequence[str], words: Sequence[str], book: Book | None, start: OpenWorker
) -> int:
    """The whole of `--mode quality`, or what is missing of the one in `book`. Raises WanError."""
    from wan.cli.benchmarking.session import commit, new_book, video_of
    from wan.cli.request import fetch
    from wan.engine.hardware import probe

    _refuse(own)
    inquiry = _Inquiry(own, rest)
    hardware = probe(inquiry.args.device)
    survey, wanted = inquiry.survey(hardware)
    book = book or new_book(own, words, wanted.task)
    samples = Samples(book.path.with_suffix(".samples.jsonl"))
    samples.load()
    for label, reason in inquiry.refused(survey, hardware).items():
        if label not in samples.failures:
            say(f"not possible: {label}: {reason}")
            samples.fail(label, reason)
    fetch(wanted)
    threads = own.threads or "default"
    common = {**video_of(wanted), "hardware": str(hardware), "on_cpu": not hardware.is_cuda, "threads": threads}
    common["commit"] = commit()
    pictures = book.path.with_name(f"{book.path.stem}_pictures")
    publish(book, survey, samples, common)
    try:
        conduct(survey, samples, pictures, Setting(threads=own.threads), start)
    finally:
        for line in publish(book, survey, samples, common):
            print(line)
    rest_failed = [samples.failures.get(case.label) for case in survey.cases[1:]]
    if rest_failed and all(rest_failed):
        raise GenerationFailed(f"{survey.cases[1].label}: {rest_failed[0]}")
    return 0


class _Inquiry:
    """The flags, and what they come to."""

    def __init__(self, own: argparse.Namespace, rest: Sequence[str]) -> None:
        from wan.cli.args import parse
        from wan.engine.optimizations import registry
        from wan.engine.plan import options

        self.own = own
        self.registry: Sequence[type[Optimization]] = registry()
        self.options = options(self.registry)
        given = parse(rest, self.options)
        usual = {name: value for name, value in USUAL.items() if getattr(given, name) is None}
        if given.task is None and given.ckpt_dir is None and given.dit is None:
            usual["task"] = DEMO
        self.words = (*rest, *(f"--{name}={value}" for name, value in usual.items()))
        self.usual = usual
        self.args = parse(self.words, self.options)

    def survey(self, hardware: Hardware) -> tuple[Survey, Wanted]:
        """What is to be made, and the first clip of it. Raises WanError."""
        asked, shows = self._prompts()
        wanted = self._wanted(asked[0])
        cases, frames = self._cases(wanted, hardware)
        if frames is not None and self.args.frame_num is None and self.args.duration is None:
            asked = [{**each, "frame_num": frames} for each in asked]
            wanted = self._wanted(asked[0])
        survey = Survey(
            words=self.words, cases=[Case(label=PLAIN), *cases], asked=asked, shows=shows,
            trained=wanted.config.frame_num, blocked=bool(self.own.blocked),
            warmup=1 if self.own.warmup is None else self.own.warmup,
        )  # fmt: skip
        return survey, wanted

    def refused(self, survey: Survey, hardware: Hardware) -> dict[str, str]:
        """Label -> why this case cannot be asked for here; nothing is loaded to find that out."""
        found = {}
        spelled = {name for name, value in vars(self.args).items() if value is not None} - set(self.usual)
        for case in survey.cases:
            try:
                if said := spelled & set(case.values):
                    raise BadRequest(f"--{min(said)} is given for all rows")
                args = _with(self.args, {**survey.asked[0], **case.values})
                self._wanted({**survey.asked[0], **case.values})
                plan_of(args, True, hardware)
            except WanError as error:
                found[case.label] = str(error)
        if PLAIN in found:
            raise BadRequest(found[PLAIN])
        return found

    def _wanted(self, asked: Mapping[str, Any]) -> Wanted:
        from wan.cli.request import resolve

        return resolve(_with(self.args, asked))

    def _cases(self, wanted: Wanted, hardware: Hardware) -> tuple[list[Case], int | None]:
        """The rows, and the frames their videos have where that is not the task's number."""
        trained = wanted.config.frame_num
        if self.own.cases in groups():
            return group_of(self.own.cases, self.registry, trained=trained)
        every = cases_of(self.registry, trained=trained, cuda=hardware.is_cuda)
        return chosen(self.own.cases, every), None

    def _prompts(self) -> tuple[list[Asked], list[Mapping[str, str | None]] | None]:
        """What each clip is asked for, and what the demo's judge must read in it. Raises BadRequest."""
        count, first = self.own.num_prompts, self.args.base_seed
        if count is not None and count < 1:
            raise BadRequest(f"--num_prompts {count}: it must be at least 1")
        first = 0 if first is None or first < 0 else first
        if self.args.prompt_file is not None:
            asked, shows = self._from_file(Path(self.args.prompt_file).expanduser()), None
        elif self.args.prompt is None and self.args.task == DEMO:
            lines = (folder("demo") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines]
            asked, shows = [{"prompt": each["prompt"]} for each in entries], [each["shows"] for each in entries]
        else:
            asked, shows = [{}] * (count or ONE_PROMPT), None
        asked = [{"base_seed": first + number, **each} for number, each in enumerate(asked[:count])]
        return asked, None if shows is None else shows[:count]

    def _from_file(self, path: Path) -> list[Asked]:
        """The lines of --prompt_file, each what it says beside the command line."""
        from wan.cli.prompts import read_entries

        found = []
        for entry in read_entries(path, self.args, self.registry):
            said = {name: value for name, value in vars(entry.args).items() if value != getattr(self.args, name, None)}
            said.pop("_spelled", None)
            taken = sorted(said.keys() & {o.name for o in self.options})
            if taken:
                raise entry.refused(BadRequest(f"{taken[0]!r} is for the rows of the survey to say: leave it out"))
            found.append(said)
        return found


def _refuse(own: argparse.Namespace) -> None:
    for name in NOT_HERE:
        if getattr(own, name) is not None:
            raise BadRequest(f"--{name} {getattr(own, name)}: --mode quality has no use for it; leave it out")
    if own.compare:
        raise BadRequest(f"--compare {own.compare[0]}: --mode quality compares with the plain run; leave it out")


def _with(args: argparse.Namespace, asked: Mapping[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **asked, "prompt_file": None})
