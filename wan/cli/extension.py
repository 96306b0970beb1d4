"""`--use_prompt_extend`: prompts rewritten by a language model, after all checks and before the video's weights come.

What goes wrong there costs a warning, never the video: it is then made from the user's own prompt. Both prompts stand
in the record, whose flags hold the one the video was made from, so that it is repeated without asking again.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.cli.generate import Job
    from wan.cli.naming import Claims
    from wan.cli.report import Terminal
    from wan.cli.request import Wanted

KEY = "prompt_extension"
"""Of a record: the user's prompt, and who extended it or why nobody did."""

FAILED = "failed"

DASHSCOPE = "dashscope"

PICTURES = ("image", "first_frame", "last_frame", "src_ref_images")
"""Input flags whose pictures a language model is shown, in this order."""

_PATIENCE = 3
"""After so many failures in a row nobody is asked any more: a queue must not wait for a dead service job by job."""

_LOG = logging.getLogger("wan.cli.extension")


@dataclass(frozen=True, kw_only=True)
class Extension:
    """Who shall extend a job's prompt: a model's name or folder, seeing `pictures`, writing in `language`."""

    method: str
    model: str
    language: str
    pictures: tuple[Path, ...] = ()
    offline: bool = False

    @property
    def settings(self) -> dict[str, str]:
        """What decides the text beside prompt, pictures and seed."""
        return {"method": self.method, "model": self.model, "language": self.language}

    def __str__(self) -> str:
        seen = f", shown {len(self.pictures)} pictures" if len(self.pictures) > 1 else ", shown the picture"
        return f"the prompt by {self.model} ({self.method}), in {self.language}{seen if self.pictures else ''}"


def asked(args: argparse.Namespace, wanted: Wanted) -> Extension | None:
    """What the command line says of extension; None where it asks for none."""
    if not args.use_prompt_extend:
        return None
    from wan.utils import prompt_extend

    files: Mapping[str, Path] = {} if wanted.inputs is None else wanted.inputs.files
    pictures = tuple(path for name in PICTURES for key, path in files.items() if key.startswith(name))
    method = args.prompt_extend_method or "local_qwen"
    name = prompt_extend.dashscope_model if method == DASHSCOPE else prompt_extend.local_model
    return Extension(
        method=method, model=name(args.prompt_extend_model, is_vl=bool(pictures)), pictures=pictures,
        language=args.prompt_extend_target_lang or "zh", offline=bool(args.offline),
    )  # fmt: skip


def tell_unused(args: argparse.Namespace) -> None:
    """Log the flags that say how to extend where nothing shall be extended."""
    names = ("prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")
    for name in names:
        if getattr(args, name) is not None and not args.use_prompt_extend:
            _LOG.info("--%s has no effect without --use_prompt_extend", name)


def carried(job: Job, made: Mapping[str, Any] | None) -> Job:
    """`job` that repeats, or goes on with, what `made` records: a prompt is extended once."""
    if made is None:
        return job
    before, same = made.get(KEY), job.wanted.prompt == made.get("flags", {}).get("prompt")
    done = isinstance(before, dict) and same and FAILED not in before
    continues = job.care.resume is not None or job.care.latents is not None
    if job.extend is not None and (done or continues):
        why = "it was extended when the video was first made" if done else "a run goes on with what it began with"
        job = dataclasses.replace(job, extend=None, notes=(*job.notes, f"the prompt is not extended: {why}"))
    return with_prompt(job, job.wanted.prompt, before) if isinstance(before, dict) and same else job


def carried_on(job: Job, folder: Path) -> Job:
    """`job` that goes on with the run in `folder`, with the prompt it has there."""
    from wan.runs import read_record

    made = read_record(folder)
    if not isinstance(made.get(KEY), dict):
        return job
    return dataclasses.replace(with_prompt(job, str(made["flags"]["prompt"]), made[KEY]), extend=None)


def asked_for(made: Mapping[str, Any], extend: Extension | None = None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The flags of a record with the user's own prompt, and how it was to be extended: the same before and after."""
    before = made.get(KEY)
    if not isinstance(before, dict):
        return dict(made.get("flags", {})), None if extend is None else dict(extend.settings)
    flags = {**made.get("flags", {}), "prompt": before.get("prompt")}
    return flags, {name: before.get(name) for name in ("method", "model", "language")}


def with_prompt(job: Job, prompt: str, entry: Mapping[str, Any]) -> Job:
    """`job` with the prompt it is made from and the record's entry about it."""
    flags = {**job.record["flags"], "prompt": prompt}
    return dataclasses.replace(
        job, wanted=dataclasses.replace(job.wanted, prompt=prompt), record={**job.record, "flags": flags, KEY: entry}
    )


def extended(jobs: Sequence[Job], terminal: Terminal) -> list[Job]:
    """The jobs, each with its prompt extended if it asks for that. The language model is gone when this returns."""
    if all(job.extend is None for job in jobs):
        return list(jobs)
    terminal.stage("extend prompt")
    writer = _Writer(terminal)
    try:
        return [job if job.extend is None else writer.extend(job, job.extend) for job in jobs]
    finally:
        writer.close()
        terminal.end_stage()


def extended_and_named(args: argparse.Namespace, job: Job, claims: Claims, terminal: Terminal) -> Job:
    """The job of a command line: its file, if the program names it, is called by the prompt that came out."""
    from wan.cli.generate import names_file, output_path

    before = job.wanted.prompt
    (job,) = extended([job], terminal)
    if job.wanted.prompt == before or names_file(args):
        return job
    claims.give_back(job.output.path)
    path = output_path(args, job.wanted, claims)
    made = {**job.record, "output": {**job.record["output"], "path": os.path.abspath(path)}}
    return dataclasses.replace(job, output=dataclasses.replace(job.output, path=path), record=made)


class _Writer:
    """Asks one language model after the other; that of the last job stays until another is needed."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._expander: Any = None
        self._kind: tuple[Any, ...] | None = None
        self._reason = ""
        self._failures = 0

    def extend(self, job: Job, extend: Extension) -> Job:
        wanted = job.wanted
        entry: dict[str, Any] = {"prompt": wanted.prompt, **extend.settings, "seed": wanted.seed}
        since = self._terminal.clock()
        prompt, self._reason = self._answer(job, extend)
        if self._reason:
            self._failures += 1
            self._terminal.line(
                f"warning: the prompt could not be extended, the video is made from it as it is: {self._reason}"
            )
            return with_prompt(job, wanted.prompt, {**entry, FAILED: self._reason})
        self._failures = 0
        seconds = self._terminal.clock() - since
        self._terminal.line(f"prompt  {prompt!r} (extended by {extend.model} in {seconds:.1f} s)")
        return with_prompt(job, prompt, entry)

    def close(self) -> None:
        if self._expander is not None:
            self._expander.close()
        self._expander = self._kind = None

    def _answer(self, job: Job, extend: Extension) -> tuple[str, str]:
        """The extended prompt and "", or the reason why there is none."""
        if self._failures >= _PATIENCE:
            return "", self._reason
        try:
            self._choose(job, extend)
        except ValueError as error:  # no key, or an address that is none
            return "", str(error)
        image = list(extend.pictures) if len(extend.pictures) > 1 else next(iter(extend.pictures), None)
        output = self._expander(job.wanted.prompt, tar_lang=extend.language, image=image, seed=job.wanted.seed)
        return (str(output.prompt), "") if output.status else ("", str(output.message) or "no reason was given")

    def _choose(self, job: Job, extend: Extension) -> None:
        """The expander for a job, by upstream's names. Raises ValueError."""
        from wan.utils import prompt_extend

        kind = (extend.method, extend.model, bool(extend.pictures), extend.offline, job.wanted.task)
        if kind == self._kind:
            return
        self.close()
        who: dict[str, Any] = {"model_name": extend.model, "task": job.wanted.task, "is_vl": bool(extend.pictures)}
        if extend.method == DASHSCOPE:
            self._expander = prompt_extend.DashScopePromptExpander(**who)
        else:
            self._expander = prompt_extend.QwenPromptExpander(**who, device=job.hardware.device, offline=extend.offline)
        self._kind = kind
