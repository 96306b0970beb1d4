"""Weights as a stream of (key, tensor): read one tensor at a time, put straight where it is used.

At no moment do two copies of a network exist: a file is read with plain reads into the tensor that becomes the
parameter, and what must change dtype or device is released before the next tensor is read.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, nn

from wan.engine.errors import BadCheckpoint
from wan.engine.ops.float8 import Coded, Float8Linear, quantize_weight
from wan.engine.weights.files import SHARD, Entry, read_header, read_index, shards_of, truncated
from wan.engine.weights.keymap import Dialect

HEAP_BYTES = 2**16
DUMMY_POOL = 4_194_319
"""Random numbers shared by all dummy tensors; a prime, so that no two rows of a matrix are the same numbers."""


class WeightFile:
    """The tensors of a checkpoint, in one file or many. Only headers have been read."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], dialect: Dialect | None = None) -> None:
        self.path = path
        self.dialect = dialect or Dialect()
        self._entries = dict(entries)

    def renamed(self, dialect: Dialect) -> WeightFile:
        """The same tensors under our names. Raises BadCheckpoint where two weights get one name."""
        entries: dict[str, Entry] = {}
        for stored, entry in self._entries.items():
            key = dialect.ours(stored)
            if key in entries:
                raise BadCheckpoint(f"{str(self.path)!r} holds {dialect.theirs(key)!r} twice, also as {stored!r}")
            if key is not None:
                entries[key] = entry
        return WeightFile(self.path, entries, dialect)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by key."""
        return {key: entry.shape for key, entry in self._entries.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored dtype of every tensor by key."""
        return {key: entry.dtype for key, entry in self._entries.items()}

    def stream(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor on the CPU in the stored dtype), in file order; `keys` None means all.

        Raises BadCheckpoint naming file and key for a key that is absent or cannot be read.
        """
        wanted = list(self._entries) if keys is None else list(keys)
        absent = [key for key in wanted if key not in self._entries]
        if absent:
            raise BadCheckpoint(f"{str(self.path)!r} has no {absent[0]!r}; is it the checkpoint of another model?")
        wanted.sort(key=lambda key: (str(self._entries[key].path), self._entries[key].offset))
        with ExitStack() as stack:
            files: dict[Path, FileIO] = {}
            for key in wanted:
                entry = self._entries[key]
                if entry.path not in files:
                    files[entry.path] = stack.enter_context(FileIO(entry.path))
                yield key, _read(files[entry.path], entry, key)


def open_weights(path: Path) -> WeightFile:
    """The weights in a .safetensors file, an index or folder of shards, or a .pth file (read as weights only).

    Raises BadCheckpoint for a file that is missing, truncated, of another format, or that would execute code.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if path.name.endswith(".index.json"):
        return WeightFile(path, read_index(path))
    entries: dict[str, Entry] = {}
    for shard in shards_of(path):
        entries |= read_header(shard)
    return WeightFile(path, entries)


def find_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """The index, file or first shard in `folder` whose name begins with `stem`; raises BadCheckpoint if none does."""
    folder = Path(folder)
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    shards = sorted(path for path in folder.glob(f"{stem}-*.safetensors") if SHARD.fullmatch(path.name))
    if not shards:
        raise BadCheckpoint(
            f"{str(folder)!r} has no {stem}.safetensors, no shards of it and no {stem}.safetensors.index.json; "
            "pass the folder that was downloaded"
        )
    return shards_of(shards[0])[0]


def check_fit(module: nn.Module, weights: WeightFile) -> None:
    """Raise one BadCheckpoint naming file and keys unless `weights` are just what `module` needs. Reads no weight."""
    stored = weights.dialect.theirs
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes = weights.shapes()
    faults = _faults(
        missing=[stored(key) for key in expected if key not in shapes],
        unexpected=[stored(key) for key in shapes if key not in expected],
        misshaped=[
            _misshaped(stored(key), shape, expected[key])
            for key, shape in shapes.items()
            if shape != expected.get(key, shape)
        ],
    )
    if faults:
        raise BadCheckpoint(
            f"{str(weights.path)!r} does not fit {type(module).__name__}: {faults}. Is it the checkpoint of another "
            "model, or damaged?"
        )


def load_into(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: Callable[[str], torch.dtype | None],
    place: Callable[[str, Tensor], torch.device | Tensor],
) -> None:
    """Make the tensors of `weights` the parameters and buffers of `module`, which is on the meta device.

    `dtype` gives the storage dtype of a key (None: as it comes; only floating tensors are converted), `place` where
    it lands: a device, or the very tensor it is written into. Weights of layers that keep 8 bits are quantised on the
    way. Raises one BadCheckpoint naming every kind of key that does not fit.
    """
    float8 = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, Float8Linear)}
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for key, tensor in weights:
        if key not in expected:
            unexpected.append(key)
        elif expected[key] != tuple(tensor.shape):
            misshaped.append(_misshaped(key, tensor.shape, expected[key]))
        else:
            for part, value in _stored(key, tensor, float8, place).items():
                found[part] = _settle(value, dtype(part), place(part, value))
        del tensor  # not kept alive while the next one is read
    missing = [key for key in expected if key not in found and not any(m.startswith(f"{key} ") for m in misshaped)]
    if faults := _faults(missing=missing, unexpected=unexpected, misshaped=misshaped):
        raise BadCheckpoint(
            f"the weights do not fit {type(module).__name__}: {faults}. Is it the checkpoint of another model?"
        )
    module.load_state_dict(found, strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{left[0]} is no part of the state dict, so no checkpoint can fill it"


def dummy_weights(module: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random weights for every key of a meta module, in its dtypes, scaled so that activations stay of order one.

    Matrices and kernels are normal with variance 1 / fan-in, modulation with 1 / D; norm weights are 1, biases 0.
    The same seed and key always give the same numbers.
    """
    return _dummies(module.state_dict(), seed)


def _dummies(table: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    pool = torch.randn(DUMMY_POOL, generator=torch.Generator().manual_seed(seed))
    for key, tensor in table.items():
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            spread = _dummy_deviation(key, tensor.shape)
            if spread is None:
                value.fill_(1.0)
            elif spread:
                _fill(value.view(-1), pool, zlib.crc32(key.encode()) % DUMMY_POOL, spread)
        yield key, value


def _read(file: FileIO, entry: Entry, key: str) -> Tensor:
    if entry.tensor is not None:
        return entry.tensor
    raw = _buffer(entry.span)
    rest = memoryview(raw.numpy())  # type: ignore[arg-type]
    file.seek(entry.offset)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise truncated(entry, key)
        rest = rest[count:]
    flat = raw.view(entry.dtype)
    return flat.view(entry.shape) if entry.stride is None else flat.as_strided(entry.shape, entry.stride).contiguous()


def _buffer(num_bytes: int) -> Tensor:
    # Memory of its own from the system goes back whole. From the heap, a tensor that is released after conversion
    # would leave a hole between those that stay, and the holes add up to a second copy of the network.
    if num_bytes < HEAP_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def _stored(
    key: str, tensor: Tensor, float8: Container[str], place: Callable[[str, Tensor], torch.device | Tensor]
) -> dict[str, Tensor]:
    """What is stored for one tensor that was read: itself, or its codes and scales."""
    if key not in float8:
        return {key: tensor}
    where = place(key, tensor)
    device = where.device if isinstance(where, Tensor) else where
    codes, scale = quantize_weight(tensor.on(device) if isinstance(tensor, Coded) else tensor.to(device))
    return {key: codes, f"{key}_scale": scale}


def _settle(tensor: Tensor, dtype: torch.dtype | None, where: torch.device | Tensor) -> Tensor:
    if isinstance(where, Tensor):
        return where.copy_(tensor)
    # To the device first: a GPU converts much faster than the CPU. What stays in place is not copied at all.
    moved = tensor.on(where).numbers() if isinstance(tensor, Coded) else tensor.to(where)
    return moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved


def _misshaped(key: str, shape: Sequence[int], wanted: Sequence[int]) -> str:
    return f"{key} is {list(shape)}, not {list(wanted)}"


def _faults(*, missing: Sequence[str], unexpected: Sequence[str], misshaped: Sequence[str]) -> str:
    named = _named("missing", missing), _named("unexpected", unexpected), _named("of the wrong shape", misshaped)
    return "; ".join(filter(None, named))


def _named(kind: str, faults: Sequence[str]) -> str:
    if not faults:
        return ""
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return f"{len(faults)} {kind} ({', '.join(faults[:3])}{more})"


def _dummy_deviation(key: str, shape: Sequence[int]) -> float | None:
    """Standard deviation of a dummy tensor; None for one that multiplies (norm weights), 0 for one that adds."""
    if key.endswith("bias"):
        return 0.0
    if key.endswith("modulation"):
        return float(shape[-1] ** -0.5)
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    return None if fan_in == 1 else fan_in**-0.5


def _fill(flat: Tensor, pool: Tensor, start: int, deviation: float) -> None:
    # Drawing billions of normals takes minutes on a CPU; scaling shifted pieces of one pool takes seconds.
    filled = 0
    while filled < flat.numel():
        piece = pool[start : start + flat.numel() - filled]
        torch.mul(piece, deviation, out=flat[filled : filled + piece.numel()])
        filled, start = filled + piece.numel(), 0
