"""Writes a checkpoint in the original layout or in diffusers', from any layout that generate.py reads.

    python tools/convert.py --ckpt_dir ./ComfyUI/models --to diffusers --out ./Wan2.2-T2V-A14B-Diffusers
    python tools/convert.py --dit a.safetensors --vae b.safetensors --t5 c.safetensors --to upstream --out ./Wan2.1
    python tools/convert.py --ckpt_dir ./Wan2.2-T2V-A14B --to upstream --fp8 lightx2v --out ./Wan2.2-T2V-A14B-fp8

Everything is checked before the first byte is written; tensors are copied one by one, so memory holds one at a time.
The folder appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from wan.cli.checkpoint import check_folder, detect_task  # noqa: E402
from wan.components import Checkpoint, Network  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.engine.errors import BadRequest, OutputError, WanError  # noqa: E402
from wan.engine.ops.float8 import Float8Linear  # noqa: E402
from wan.engine.optimizations import FP8  # noqa: E402
from wan.engine.weights.animate_names import animate_names  # noqa: E402
from wan.engine.weights.dialects import DIT  # noqa: E402
from wan.engine.weights.keymap import (  # noqa: E402
    CLIP_CUT,
    DIFFUSERS_DIT,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_T5,
    KeyMap,
    Recut,
    diffusers_vae,
    diffusers_vae22,
)
from wan.engine.weights.quantising import SPELLINGS, QuantisingFile  # noqa: E402
from wan.engine.weights.recut import CutFile  # noqa: E402
from wan.engine.weights.stream import WeightFile  # noqa: E402
from wan.engine.weights.write import Table, table_bytes, write_pth, write_safetensors  # noqa: E402
from wan.layouts import CheckpointFiles, original  # noqa: E402
from wan.layouts.library import (  # noqa: E402
    animate_config,
    image_encoder_config,
    image_processor_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from wan.modules.animate.model_animate import WanAnimateModel  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIT_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
PUBLISHED = (
    "dim",
    "eps",
    "ffn_dim",
    "freq_dim",
    "in_dim",
    "model_type",
    "num_heads",
    "num_layers",
    "out_dim",
    "text_len",
)
"""What config.json of the original checkpoints holds."""

CLIP_HEAD = "visual.head"
"""Of CLIP's image tower. `CLIPVisionModel` has no place for it, and no video model uses it."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How another library names and cuts a network, and which weights it has no place for."""

    names: KeyMap
    recut: Recut | None = None
    without: tuple[str, ...] = ()

    def of(self, weights: WeightFile) -> WeightFile:
        return CutFile(weights, self.names, self.recut, self.without)


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """Which program's files with 8 bits to write, and how `--fp8` would keep the layers."""

    spelling: str
    layers: FP8

    def of(self, network: Network) -> QuantisingFile:
        self.layers.check_component(network.component(torch.float32))
        module = network.module()
        self.layers.convert(module, network.part)
        chosen = [name for name, layer in module.named_modules() if isinstance(layer, Float8Linear)]
        return QuantisingFile(network.open(), chosen, SPELLINGS[self.spelling])


class CastFile(WeightFile):
    """The tensors of `plain`, floating ones but for `kept` in another dtype."""

    def __init__(self, plain: WeightFile, dtype: torch.dtype, kept: Collection[str]) -> None:
        super().__init__(plain.path, {}, plain.dialect)
        self._plain, self._dtype, self._kept = plain, dtype, kept

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._plain.shapes()

    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: self._cast(key, dtype) for key, dtype in self._plain.dtypes().items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in self._plain.stream(keys):
            yield key, tensor.to(self._cast(key, tensor.dtype))

    def _cast(self, key: str, stored: torch.dtype) -> torch.dtype:
        return self._dtype if stored.is_floating_point and key not in self._kept else stored


class Output:
    """A folder being written: where parts go and in which precision."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, DTYPES.get(args.dtype), int(args.shard_gb * 1e9)
        layers = FP8(fp8="weight", fp8_keep=args.fp8_keep)
        self.fp8 = None if args.fp8 is None else EightBits(spelling=args.fp8, layers=layers)

    def weights(self, network: Network) -> WeightFile:
        """What to write of a network. The VAE keeps its precision: in half precision its videos are blurred."""
        whole = network.open()
        kept: Collection[str] = ()
        if self.fp8 is not None and network.kind == DIT:
            whole = self.fp8.of(network)
            kept = whole.quantised
        return whole if self.dtype is None or network.part == "vae" else CastFile(whole, self.dtype, kept)

    def safetensors(
        self, network: Network, where: str, stem: str, naming: Naming | None, config: dict[str, Any]
    ) -> None:
        weights = self.weights(network) if naming is None else naming.of(self.weights(network))
        folder = self.folder / where
        self.json(f"{where}/config.json", config)
        print(f"{where}/{stem}.safetensors from {network.path}", flush=True)
        write_safetensors(folder, stem, table_of(weights), weights.stream(), self.shard_bytes)

    def pth(self, network: Network, name: str) -> None:
        print(f"{name} from {network.path}", flush=True)
        weights = self.weights(network)
        write_pth(self.folder / name, table_of(weights), weights.stream())

    def json(self, name: str, content: dict[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def tokenizer(self, checkpoint: Checkpoint, where: str) -> None:
        """The tokenizer's folder copied, or one made from a single file."""
        source, target = checkpoint.places.paths["tokenizer"], self.folder / where
        target.mkdir(parents=True)
        if source is not None and source.is_dir():
            for path in sorted(source.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, target / path.name)
            return
        tokenizer = checkpoint.tokenizer().tokenizer
        tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
        tokens = {name: getattr(tokenizer, name) for name in ("pad_token", "eos_token", "unk_token")}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "padding_side": "right"}
        self.json(f"{where}/special_tokens_map.json", tokens)
        self.json(f"{where}/tokenizer_config.json", tokens | fields | {"clean_up_tokenization_spaces": False})


def table_of(weights: WeightFile) -> Table:
    dtypes = weights.dtypes()
    return {key: (dtypes[key], shape) for key, shape in weights.shapes().items()}


def write_upstream(checkpoint: Checkpoint, out: Output) -> None:
    """The folders Wan was published in."""
    config = checkpoint.config
    places = original.paths(out.folder, checkpoint.places.experts, config)
    names = {part: str(path.relative_to(out.folder)) for part, path in places.items() if path is not None}
    for part in checkpoint.places.experts:
        network = checkpoint.network(part)
        sizes: Any = network.module()
        told = [key for key in (*PUBLISHED, "vace_layers", "vace_in_dim") if key in sizes.config]
        fields = {"_class_name": type(sizes).__name__} | {key: sizes.config[key] for key in told}
        out.safetensors(network, names[part], DIT_STEM, None, fields)
    out.pth(checkpoint.network("text_encoder"), names["text_encoder"])
    for part in ("vae", "clip"):
        if part in names:
            out.pth(checkpoint.network(part), names[part])
    out.tokenizer(checkpoint, names["tokenizer"])


def write_diffusers(checkpoint: Checkpoint, out: Output) -> None:
    """The folders `WanPipeline.from_pretrained` reads."""
    folders = dict(zip(checkpoint.places.experts, ("transformer", "transformer_2"), strict=False))
    for part, folder in folders.items():
        network = checkpoint.network(part)
        model: Any = network.module()
        fields = {"_class_name": CLASSES[checkpoint.kind][1]} | transformer_config(model.config)
        naming = Naming(names=DIFFUSERS_DIT)
        if isinstance(model, WanAnimateModel):
            fields |= animate_config(model)
            names, recut = animate_names(len(model.config.motion_widths) - 1)
            naming = Naming(names=names, recut=recut)
        out.safetensors(network, folder, DIT_STEM, naming, fields)
    network = checkpoint.network("text_encoder")
    fields = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"} | text_encoder_config(network.module())
    out.safetensors(network, "text_encoder", TEXT_STEM, Naming(names=TRANSFORMERS_T5), fields)
    network = checkpoint.network("vae")
    vae: Any = network.module()
    blocks, levels = vae.config.num_res_blocks, len(vae.config.dim_mult)
    names = diffusers_vae22(blocks) if vae.config.grouped else diffusers_vae(levels, blocks)
    fields = {"_class_name": "AutoencoderKLWan"} | vae_config(vae.config)
    out.safetensors(network, "vae", DIT_STEM, Naming(names=names), fields)
    if "clip" in checkpoint.places.paths:
        _write_clip(checkpoint.network("clip"), out)
    out.tokenizer(checkpoint, "tokenizer")
    _write_index(checkpoint, out, two="transformer_2" in folders.values())


def _write_clip(network: Network, out: Output) -> None:
    tower: Any = network.module()
    fields = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    naming = Naming(names=TRANSFORMERS_CLIP, recut=CLIP_CUT, without=(CLIP_HEAD,))
    out.safetensors(network, "image_encoder", TEXT_STEM, naming, fields | image_encoder_config(tower.visual))
    if CLIP_HEAD in network.shapes:
        print(f"{CLIP_HEAD} of {network.path} is left out: CLIPVisionModel has no place for it, no video model uses it")
    fields = {"image_processor_type": "CLIPImageProcessor"} | image_processor_config(tower.visual)
    out.json("image_processor/preprocessor_config.json", fields)


CLASSES = {
    "t2v": ("WanPipeline", "WanTransformer3DModel"),
    "ti2v": ("WanPipeline", "WanTransformer3DModel"),
    "i2v": ("WanImageToVideoPipeline", "WanTransformer3DModel"),
    "flf2v": ("WanImageToVideoPipeline", "WanTransformer3DModel"),
    "vace": ("WanVACEPipeline", "WanVACETransformer3DModel"),
    "animate": ("WanAnimatePipeline", "WanAnimateTransformer3DModel"),
}
"""Kind of task -> diffusers' pipeline and transformer."""


def _write_index(checkpoint: Checkpoint, out: Output, *, two: bool) -> None:
    """model_index.json and the scheduler, which in diffusers holds the sampling shift."""
    config, (pipeline, transformer) = checkpoint.config, CLASSES[checkpoint.kind]
    out.json(
        "scheduler/scheduler_config.json",
        {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config.sample_shift,
            "num_train_timesteps": config.num_train_timesteps,
            "solver_order": 2,
            "solver_type": "bh2",
        },
    )
    told = out.folder / "tokenizer" / "tokenizer_config.json"
    fields = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    kind = fields.get("tokenizer_class", "T5Tokenizer")
    parts = {}
    if pipeline != "WanAnimatePipeline":
        parts = {
            "boundary_ratio": config.get("boundary"),
            "expand_timesteps": checkpoint.kind == "ti2v",
            "transformer_2": ["diffusers", transformer] if two else [None, None],
        }
    if checkpoint.kind in ("i2v", "flf2v", "animate"):
        sees = "clip" in checkpoint.places.paths
        parts |= {
            "image_encoder": ["transformers", "CLIPVisionModel"] if sees else [None, None],
            "image_processor": ["transformers", "CLIPImageProcessor"] if sees else [None, None],
        }
    out.json(
        "model_index.json",
        {
            "_class_name": pipeline,
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", kind if kind.endswith("Fast") else f"{kind}Fast"],
            "transformer": ["diffusers", transformer],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        | parts,
    )


LAYOUTS = {"upstream": write_upstream, "diffusers": write_diffusers}
FILES = ("dit", "dit_low", "t5", "vae", "clip", "tokenizer")


def convert(args: argparse.Namespace) -> None:
    """Check, write beside the target, rename. Raises WanError; what was begun is removed."""
    target = Path(args.out).expanduser()
    if target.exists():
        raise BadRequest(f"--out {args.out!r} exists already; give a new folder")
    if not args.shard_gb > 0:
        raise BadRequest(f"--shard_gb {args.shard_gb!r}: it must be greater than 0")
    checkpoint = _checkpoint(args)
    if args.fp8 is not None and args.to != "upstream":
        raise BadRequest(f"--fp8 {args.fp8} and --to {args.to}: diffusers reads no such files; use --to upstream")
    if args.fp8 is None and args.fp8_keep is not None:
        raise BadRequest(f"--fp8_keep {args.fp8_keep!r}: without --fp8 every layer keeps its precision; leave it out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BadRequest(f"--out {args.out!r} cannot be written ({error.strerror})") from error
    out = Output(work, args)
    try:
        _check_space(checkpoint, out)
        LAYOUTS[args.to](checkpoint, out)
        work.chmod(0o755)
        work.rename(target)
    except OSError as error:
        raise OutputError(f"--out {args.out!r} could not be written ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"saved {target}")


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    files = CheckpointFiles(**{name: getattr(args, name) for name in FILES})
    folder = None if args.ckpt_dir is None else Path(args.ckpt_dir).expanduser()
    task = args.task or detect_task(folder, WAN_CONFIGS, files)
    if task not in WAN_CONFIGS:
        said = "no model was found" if task is None else f"{task!r} cannot be converted"
        raise BadRequest(f"{said}; pass --ckpt_dir or --dit, and --task with one of {', '.join(WAN_CONFIGS)}")
    check_folder(folder, task, WAN_CONFIGS, files)
    checkpoint = Checkpoint(folder, WAN_CONFIGS[task], files, task.partition("-")[0].replace("t2i", "t2v"))
    if args.to == "diffusers" and checkpoint.kind not in CLASSES:
        raise BadRequest(f"--to diffusers: diffusers has no class for the transformer of {task}; use --to upstream")
    return checkpoint


def _check_space(checkpoint: Checkpoint, out: Output) -> None:
    parts = [part for part in checkpoint.places.paths if part != "tokenizer"]
    networks = [checkpoint.network(part) for part in parts]
    needed = sum(table_bytes(table_of(out.weights(network))) for network in networks)
    free = shutil.disk_usage(out.folder).free
    if needed > free:
        raise BadRequest(f"--out needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; free some space")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt_dir", help="checkpoint folder in any layout")
    parser.add_argument("--task", help="what the checkpoint is for (default: told by its keys)")
    for name in FILES:
        parser.add_argument(f"--{name}", help="as in generate.py: this file in place of the folder's")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the layout to write")
    parser.add_argument("--out", required=True, help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of all but the VAE (default: as stored)")
    parser.add_argument(
        "--fp8", choices=SPELLINGS, help="the transformers' blocks in 8 bits (e4m3), spelled as that program reads them"
    )
    parser.add_argument("--fp8_keep", help="layers that keep their precision, as in generate.py")
    parser.add_argument("--shard_gb", type=float, default=10.0, help="largest safetensors file (default: 10)")
    try:
        convert(parser.parse_args(argv))
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
