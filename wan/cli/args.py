"""The flags of `generate.py`: a table of what to make, one of flags whose code is missing, every optimisation's own.

Every flag of Wan 2.1's and 2.2's programs parses, under its name and with its default. In the namespace None means
"not spelled", so that presets and task defaults can fill it. Loads no torch.
"""

from __future__ import annotations

import argparse
import difflib
import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from wan.engine.errors import BadRequest
from wan.engine.options import Option, Spelling, add_arguments

MAKE, CHECKPOINT, RUN, OUTPUT, SAFETY = "what to make", "checkpoint", "how to run", "output", "safety"
INPUT = "inputs of some tasks"

PROGRAM_DEFAULTS = {"attention": "auto"}
"""What the program chooses where the library keeps to the plain model."""

SOLVERS = ("unipc", "dpm++", "euler")


@dataclass(frozen=True)
class Flag:
    """One flag outside the optimisations. `default` is what the user is told; the namespace holds None until spelled.

    `kind` None makes it a switch without a value. `missing` names the work whose code is not here yet: such a flag
    accepts its default alone.
    """

    name: str
    kind: Callable[[str], Any] | None
    default: Any
    help: str
    group: str = MAKE
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    missing: str = ""
    is_file: bool = False
    """Whether its value is the path of a file that is read."""

    @property
    def dest(self) -> str:
        """Its name in the namespace, where `args.from` could not be written."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


def guidance(text: str) -> float | tuple[float, float]:
    """One number, or `low,high`: the scales of the low-noise and the high-noise expert."""
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise argparse.ArgumentTypeError(f"{text!r} is not one number, nor two as LOW,HIGH")


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", re.IGNORECASE)


def memory(text: str) -> int:
    """Bytes of 12GB (10^9 each), 12GiB (2^30), 11.5G (as GB) or 900MB."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of memory: write 12GB, 11.5GB, 900MB or 12GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "kmgt".index(match[2].lower())))


# fmt: off
FLAGS = (
    Flag("task", str, "read from --ckpt_dir, else t2v-A14B", "t2v-, i2v-, flf2v-14B, ...; docs/families.md lists them"),
    Flag("prompt", str, "an example", "what the video shows"),
    Flag("n_prompt", str, "the task's", "what it must not show", aliases=("--negative_prompt",)),
    Flag("prompt_file", str, None, "many videos: a prompt a line, or .jsonl with flags for each; docs/queues.md"),
    Flag("size", str, "1280*720, or the task's first", "WIDTH*HEIGHT, WIDTHxHEIGHT, 720p or 480p (landscape)"),
    Flag("any_size", None, False, "also allow sizes the model was not trained on (multiples of 16)"),
    Flag("frame_num", int, "the task's, mostly 81", "frames to make, 4n+1; 1 makes an image"),
    Flag("duration", float, None, "seconds, instead of --frame_num: the nearest 4n+1 frames at the frame rate"),
    Flag("base_seed", int, -1, "same seed, same device: same video; -1 draws one", aliases=("--seed",)),
    Flag("noise_device", str, "the model's", "cpu makes seeds agree across cards", choices=("cpu", "cuda")),
    Flag("sample_solver", str, "unipc", "how the noise is removed", choices=SOLVERS),
    Flag("sample_steps", int, "the task's", "solver steps"),
    Flag("sample_shift", float, "the task's", "above 1 spends more of the steps at high noise"),
    Flag("sample_guide_scale", guidance, "the task's", "how strictly to follow the prompt; or LOW,HIGH by expert"),
    Flag("from", str, None, "repeat a video (.mp4, .png or its .json): all it was made with, but what is spelled here"),
    Flag("use_prompt_extend", None, False, "rewrite the prompt with a language model; docs/prompt-extension.md"),
    Flag("prompt_extend_method", str, "local_qwen", "a model here, or a service", choices=("dashscope", "local_qwen")),
    Flag("prompt_extend_model", str, "Qwen2.5_14B, QwenVL2.5_7B; qwen-plus, qwen-vl-max", "its name or folder"),
    Flag("prompt_extend_target_lang", str, "zh", "language of the rewritten prompt", choices=("zh", "en")),
    Flag("image", str, None, "picture the video begins with (i2v, ti2v), or who speaks (s2v)", INPUT, is_file=True),
    Flag("first_frame", str, None, "the same, for a video that also has a last frame", INPUT, is_file=True),
    Flag("last_frame", str, None, "picture the video ends with (flf2v-14B, i2v-A14B)", INPUT, is_file=True),
    Flag("fit", str, "area", "how pictures meet --size: as an area, or exactly", INPUT,
         ("area", "crop", "pad", "stretch")),
    Flag("extend", int, None, "make it in clips of N frames at most, each going on from the last (i2v tasks)", INPUT),
    Flag("extend_overlap", int, 1, "frames that a clip of --extend is given of the one before, 4n+1", INPUT),
    Flag("match_color", None, False, "give later clips of --extend the colours of the first", INPUT),
    Flag("src_video", str, None, "video that guides a new one (vace tasks)", INPUT, is_file=True),
    Flag("src_mask", str, None, "white where --src_video is made anew, black where it stays", INPUT, is_file=True),
    Flag("src_ref_images", str, None, "pictures of what shall appear, separated by commas (vace tasks)", INPUT),
    Flag("context_scale", float, 1.0, "how strongly video and pictures act (vace tasks)", INPUT),
    Flag("src_root_path", str, None, "folder that Wan's preprocessing made (animate-14B)", INPUT),
    Flag("refert_num", int, 1, "frames a clip shares with the one before, 1 or 5 (animate-14B)", INPUT),
    Flag("replace_flag", None, False, "put the character in a person's place (animate-14B)", INPUT),
    Flag("use_relighting_lora", None, False, "light the character as the video is lit (animate-14B)", INPUT),
    Flag("ckpt_dir", str, None, "checkpoint folder, or OWNER/NAME on Hugging Face; t2v-demo has its own", CHECKPOINT),
    Flag("offline", None, False, "download nothing: OWNER/NAME must be in the Hugging Face cache", CHECKPOINT),
    Flag("dit", str, None, "transformer file, of two experts the high-noise one; replaces --ckpt_dir's", CHECKPOINT),
    Flag("dit_low", str, None, "file of the low-noise transformer", CHECKPOINT),
    Flag("t5", str, None, "file of the umT5 text encoder", CHECKPOINT),
    Flag("vae", str, None, "file of the VAE", CHECKPOINT),
    Flag("audio", str, None, "speech that --image speaks (s2v-14B)", INPUT, is_file=True),
    Flag("num_clip", int, None, "how many clips to make at most; else as many as --audio lasts (s2v-14B)", INPUT),
    Flag("infer_frames", int, 80, "frames of a clip, a multiple of 4 (s2v-14B)", INPUT),
    Flag("pose_video", str, None, "poses to take (s2v-14B)", INPUT, is_file=True),
    Flag("audio_start", str, "upstream", "begin the sound at 0 s as upstream, or with the lips (s2v-14B)", INPUT,
         ("upstream", "sync")),
    Flag("start_from_ref", None, False, "begin with --image itself (s2v-14B)", INPUT),
    Flag("enable_tts", None, False, "make the speech of --tts_text, by CosyVoice 2 (s2v-14B)", INPUT),
    Flag("tts_prompt_audio", str, None, "sample of the voice, 5 to 15 s", INPUT, is_file=True),
    Flag("tts_prompt_text", str, None, "what is said in it", INPUT),
    Flag("tts_text", str, None, "what to say", INPUT),
    Flag("clip", str, None, "file of the CLIP image encoder", CHECKPOINT),
    Flag("tokenizer", str, None, "umT5's tokenizer: a folder, tokenizer.json or spiece.model", CHECKPOINT),
    Flag("load_format", str, "auto", "dummy: random weights, no checkpoint needed", CHECKPOINT, ("auto", "dummy")),
    Flag("preset", str, "none", "options by NAME (configs/NAME.toml), FILE.toml, auto (by hardware) or none", RUN),
    Flag("quality", str, None, "options by what they may cost: exact, nothing lossy; balanced; fast", RUN,
         ("exact", "balanced", "fast")),
    Flag("device", str, "cuda, else cpu", "cpu, cuda or cuda:N", RUN),
    Flag("vram_budget", memory, "what is free, with --preset auto", "GPU memory to stay within, such as 12GB", RUN),
    Flag("reserve_vram", memory, "what others use, and 0.3GB", "GPU memory to leave to others, such as 4GB", RUN),
    Flag("find_max", str, None, "say how many frames, or which size, fit, and stop", RUN, ("frames", "size")),
    Flag("print_plan", None, False, "say what would be done, and stop", RUN),
    Flag("expert_batch", int, 1, "of a --prompt_file, videos for which each of two experts is brought in once", RUN),
    Flag("embedding_cache", str, "the user's cache folder", "folder that keeps text embeddings, or off", RUN),
    Flag("compile_cache_dir", str, "the user's cache folder", "folder that keeps compiled code, or off (torch's)", RUN),
    Flag("clear_compile_cache", None, False, "delete kept compiled code, and stop", RUN),
    Flag("dry_run", None, False, "with --clear_compile_cache: only say what it would delete", RUN),
    Flag("save_file", str, "task_size_prompt_time", "the .mp4 (or .png, one frame) to write, or a folder", OUTPUT),
    Flag("name", str, None, "the file's name with fields: '{task}_{seed}_{prompt:40}'; docs/FILENAME_GUIDE.md", OUTPUT),
    Flag("results", str, "FILE.results.jsonl", "what became of each video of a --prompt_file", OUTPUT),
    Flag("fps", int, "the task's", "frames per second of the file", OUTPUT),
    Flag("crf", int, "10", "H.264 quality: 0 is lossless, 51 worst", OUTPUT),
    Flag("no_metadata", None, False, "keep prompt and settings out of the file, and write no .json beside it", OUTPUT),
    Flag("no_sidecar", None, False, "write no .json beside the file", OUTPUT),
    Flag("resume", str, None, "continue an interrupted run: its folder (VIDEO.run) or the video's name", SAFETY),
    Flag("decode", str, None, "make the video from kept latents (a .safetensors file)", SAFETY),
    Flag("state_every", int, 5, "keep the state of the run after every N steps; 0 never", SAFETY),
    Flag("keep_latents", None, False, "keep the latents beside the video, also those at the expert switch", SAFETY),
    Flag("timeout_s", float, None, "give up after this many seconds; the run can be resumed", SAFETY),
)

_PARALLEL = "running on several GPUs"

MISSING = (
    Flag("ulysses_size", int, 1, "Ulysses degree", missing=_PARALLEL),
    Flag("ring_size", int, 1, "ring-attention degree", missing=_PARALLEL),
    Flag("t5_fsdp", None, False, "shard the text encoder", missing=_PARALLEL),
    Flag("dit_fsdp", None, False, "shard the transformer", missing=_PARALLEL),
)
# fmt: on

DESCRIPTION = (
    "Make a video from a text with Wan 2.1 or 2.2, by the flags of the original programs. A dash may stand for any\n"
    "underscore."
)

EXAMPLES = """examples:
  python generate.py --task t2v-demo
  python generate.py --task t2v-1.3B --size 480p --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "A cat walks on the grass"
  python generate.py --task t2v-A14B --size 720p --duration 5 --ckpt_dir ./Wan2.2-T2V-A14B --seed 42 --prompt "..."
  python generate.py --ckpt_dir ./Wan2.2-T2V-A14B --size 720p --prompt_file prompts.txt --expert_batch 16

exit status: 0 made and saved, 2 cannot be done as asked, 3 made but not saved as asked, 4 failed while generating,
130 interrupted (Ctrl-C), 143 ended by SIGTERM, 129 by SIGHUP; what was kept and how to go on is told"""


class Parser(argparse.ArgumentParser):
    """Raises BadRequest instead of printing a page of usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise BadRequest(message.removeprefix("argument "))


def build_parser(options: Iterable[Option]) -> Parser:
    """The parser of `generate.py`: the tables above and the flags of `options` (those of every optimisation)."""
    options = list(options)
    parser = Parser(
        prog="generate.py", usage="python generate.py [--task TASK] [--ckpt_dir FOLDER] [--prompt TEXT] [flags]",
        description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
    )  # fmt: skip
    groups = {name: parser.add_argument_group(name) for name in (MAKE, INPUT, CHECKPOINT, RUN, OUTPUT, SAFETY)}
    for flag in FLAGS:
        _add(groups[flag.group], flag)
    add_arguments(groups[RUN], options)
    _show_defaults(groups[RUN], options)
    rest = unavailable(options)
    group = parser.add_argument_group(
        "known, but not in this version yet (only the default is accepted)", _by_work(rest)
    )
    for flag in rest:
        _add(group, flag)
    return parser


def _by_work(flags: Iterable[Flag]) -> str:
    """The unavailable flags as a short list: one line for each piece of work they wait for."""
    lines: dict[str, list[str]] = {}
    for flag in flags:
        lines.setdefault(flag.missing, []).append(f"--{flag.name}" + (f" {flag.default}" if flag.default else ""))
    return "\n".join(f"{work}: {', '.join(names)}" for work, names in lines.items())


def unavailable(options: Iterable[Option]) -> list[Flag]:
    """The flags that accept their default alone: those in `MISSING` that no option has taken over."""
    taken = {o.name for o in options}
    return [flag for flag in MISSING if flag.name not in taken]


def parse(argv: Sequence[str], options: Iterable[Option], parser: Parser | None = None) -> argparse.Namespace:
    """The namespace of `argv`; what was not spelled is None. Raises BadRequest with one line that names the flag.

    `parser` is one that was built of these options before.
    """
    options = list(options)
    parser = parser or build_parser(options)
    known = {action.replace("-", "_"): action for action in parser._option_string_actions}
    args, extra = parser.parse_known_args([_canonical(token, known) for token in argv])
    if extra:
        raise BadRequest(_unknown(extra[0], known))
    for flag in unavailable(options):
        value = getattr(args, flag.name)
        if value is not None and value != flag.default:
            said = f"--{flag.name}" if flag.kind is None else f"--{flag.name} {value}"
            only = "" if flag.kind is None or flag.default is None else f", or give its default {flag.default}"
            raise BadRequest(f"{said}: {flag.missing} is not in this version yet; leave the flag out{only}")
    return args


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    said = flag.help if flag.default in (None, False) else f"{flag.help} (default: {flag.default})"
    if flag.missing:
        said = argparse.SUPPRESS
    if flag.kind is None:
        group.add_argument(f"--{flag.name}", action=Spelling, nargs=0, const=True, help=said)
        return
    group.add_argument(
        f"--{flag.name}", *flag.aliases, dest=flag.dest, action=Spelling, type=flag.kind, help=said.replace("%", "%%"),
        choices=flag.choices or None, metavar=None if flag.choices else flag.name.upper(),
    )  # fmt: skip


def _show_defaults(group: argparse._ArgumentGroup, options: Iterable[Option]) -> None:
    by_name = {o.name: o for o in options}
    for action in group._group_actions:
        o = by_name.get(action.dest)
        if o is None or action.help in (None, argparse.SUPPRESS):
            continue
        default = PROGRAM_DEFAULTS.get(o.name, o.default)
        parts = (
            []
            if default is None
            else [f"default: {'off' if default is False else 'on' if default is True else default}"]
        )
        parts += [f"off: {', '.join(o.off)}"] if o.off and default is not False else []
        action.help = f"{action.help} ({'; '.join(parts)})" if parts else action.help


def _canonical(token: str, known: dict[str, str]) -> str:
    """`token` as the parser spells it: --offload-model and --no_tf32 become --offload_model and --no-tf32."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return known.get(flag.replace("-", "_"), flag) + equals + value


def _unknown(token: str, known: dict[str, str]) -> str:
    if not token.startswith("-"):
        return f"unexpected {token!r}: a value of several words needs quotes, as in --prompt 'a red ball'"
    flag = token.partition("=")[0].replace("-", "_")
    stem = flag.lstrip("_")
    part = [name for name in known if stem and (name.endswith(f"_{stem}") or name.startswith(f"__{stem}_"))]
    close = part or difflib.get_close_matches(flag, list(known), n=1)
    hint = f"did you mean {known[close[0]]}?" if close else "--help lists all"
    return f"unknown flag {token.partition('=')[0]}: {hint}"
