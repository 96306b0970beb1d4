"""Files whose weights are in 8 bits: what they call scales, what is refused, and reading both as one weight.

Dialects of e4m3 and e5m2 files, told apart by shapes and dtypes, not by names:

    scale_weight, one number      ComfyUI and Kijai, with `scaled_fp8` as a mark and perhaps `scale_input`
    weight_scale, one number      ComfyUI since 2025, with `comfy_quant` and perhaps `input_scale`
    weight_scale, [out, 1]        LightX2V, also [out]
    none                          a plain cast

The value of a weight is codes * scale in all of them. Scales of inputs are not needed: ours are of the input at hand.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from wan.engine.errors import BadCheckpoint
from wan.engine.ops.float8 import Coded
from wan.engine.weights.files import SAFETENSORS, read_metadata
from wan.engine.weights.stream import WeightFile

__all__ = ["QuantisedFile", "is_float8", "refuse_packed"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PACKED = (torch.int8, torch.uint8)
_SCALE = re.compile(r"(?P<layer>.+)\.(scale_weight|weight_scale)")
_COMFY, _METADATA = "comfy_quant", "_quantization_metadata"
"""Where ComfyUI says how a layer is quantised: in a tensor beside it, or for all in the file's metadata."""
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_NOTE = re.compile(rf"(.*\.)?(scaled_fp8|scale_input|input_scale|{_COMFY})")
_OTHER = re.compile(r"(.*\.)?(weight_scale_2|\w+_(weight_scale|global_scale)|pre_quant_scale)")
"""Scales of packed 4-bit weights."""


def is_float8(weights: WeightFile) -> bool:
    """Whether any weight of the file is e4m3 or e5m2, or a scale lies beside one."""
    return any(d in FLOAT8 or _SCALE.fullmatch(key) or _NOTE.fullmatch(key) for key, d in weights.dtypes().items())


def refuse_packed(weights: WeightFile, spare: Iterable[str] = ()) -> None:
    """Raise BadCheckpoint, saying what was seen, if the weights are int8 or packed 4-bit numbers."""
    for key, dtype in weights.dtypes().items():
        if key not in spare and not _NOTE.fullmatch(key) and (dtype in _PACKED or _OTHER.fullmatch(key)):
            kind = str(dtype).removeprefix("torch.")
            raise BadCheckpoint(
                f"{str(weights.path)!r} is a quantised {kind} file ({key!r} is {kind}), which this version cannot "
                "use; pass the fp8, bf16 or fp16 file of the same model"
            )


def _object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a note; {} where there is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


class QuantisedFile(WeightFile):
    """The weights of a file, without scales and notes: those in 8 bits read as `Coded`, float32 where they are used.

    Raises BadCheckpoint for a scale that no weight can have; what scales hold is checked when they are read.
    """

    def __init__(self, stored: WeightFile) -> None:
        super().__init__(stored.path, {}, stored.dialect)
        self._stored = stored
        shapes, dtypes = stored.shapes(), stored.dtypes()
        self._scales: dict[str, str] = {}
        for key, shape in shapes.items():
            if match := _SCALE.fullmatch(key):
                self._take_scale(f"{match['layer']}.weight", key, shape, shapes)
        left_out = {key for key in shapes if _NOTE.fullmatch(key)} | set(self._scales.values())
        self._kept = {key: dtypes[key] for key in shapes if key not in left_out}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._stored.shapes()
        return {key: shapes[key] for key in self._kept}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: torch.float32 if dtype in FLOAT8 else dtype for key, dtype in self._kept.items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = list(self._kept if keys is None else keys)
        scales = dict(self._stored.stream(self._scales[key] for key in wanted if key in self._scales))
        for key, tensor in self._stored.stream(wanted):
            yield key, self._read(key, tensor, scales)
            del tensor  # not kept alive while the next one is read

    def check_scales(self) -> None:
        """Raise BadCheckpoint for a scale that is none, or a note of another format. Reads them and no weight."""
        for name, scale in self._stored.stream(self._scales.values()):
            self._check(name, scale.float())
        for name, note in self._stored.stream(key for key in self._stored.shapes() if key.endswith(f".{_COMFY}")):
            self._check_format(name, note.flatten().to(torch.uint8).numpy().tobytes())
        about = read_metadata(self.path).get(_METADATA) if self.path.suffix in SAFETENSORS else None
        if about is not None:
            layers = _object(about).get("layers")
            for name, said in (layers if isinstance(layers, dict) else {_METADATA: about}).items():
                self._check_format(name, json.dumps(said).encode())

    def told(self) -> str:
        """How the file has its weights in 8 bits, in words; "" where it has none."""
        shapes, dtypes = self._stored.shapes(), self._stored.dtypes()
        forms: Counter[str] = Counter()
        for key in self._kept:
            if dtypes[key] in FLOAT8:
                scale = self._scales.get(key)
                count = "no" if scale is None else "one" if math.prod(shapes[scale]) == 1 else "a row's own"
                forms[f"{str(dtypes[key]).removeprefix('torch.float8_')}, {count} scale"] += 1
        return "; ".join(f"{number} weights in 8 bits ({form})" for form, number in forms.items())

    def _take_scale(self, key: str, scale: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if key not in shapes:
            raise self._bad(scale, f"is the scale of {self.dialect.theirs(key)!r}, which the file lacks")
        if key in self._scales:
            raise self._bad(scale, f"is a second scale beside {self.dialect.theirs(self._scales[key])!r}")
        rows = shapes[key][:1]
        if math.prod(shape) != 1 and (len(shapes[key]) != 2 or shape not in (rows, (*rows, 1))):
            raise self._bad(scale, f"is {list(shape)}, neither one number nor one for each of {rows[0]} rows")
        self._scales[key] = scale

    def _read(self, key: str, tensor: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        name = self._scales.get(key)
        scale = torch.ones(1) if name is None else scales[name].float().flatten()
        if name is not None:
            self._check(name, scale)
        if tensor.dtype in FLOAT8:
            return Coded(tensor, scale.view(-1, *(1 for _ in tensor.shape[1:])))
        if not (scale == 1).all():  # converters give layers that they leave alone a scale of 1
            raise self._bad(
                str(name), f"is not 1, and its weight is {tensor.dtype}: it is not known whether to apply it"
            )
        return tensor

    def _check(self, name: str, scale: Tensor) -> None:
        if not (scale.isfinite() & (scale > 0)).all():
            raise self._bad(name, "holds numbers that no scale can be (zero, negative or not finite)")

    def _check_format(self, name: str, note: bytes) -> None:
        said = _object(note).get("format")
        if said not in _FORMATS:
            raise self._bad(name, f"has format {said!r}, of which this version reads {' and '.join(_FORMATS)}")

    def _bad(self, key: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"{str(self.path)!r}: {self.dialect.theirs(key)!r} {what}; download it again, or pass the bf16 or fp16 "
            "file of the same model"
        )
