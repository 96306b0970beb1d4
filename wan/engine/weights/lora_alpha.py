"""How much a LoRA file scales its ranks where no key says it: PEFT's configuration, in it or beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wan.engine.errors import BadCheckpoint
from wan.engine.weights.files import SAFETENSORS, read_metadata
from wan.engine.weights.lora_names import FIRST, SECOND, flat

__all__ = ["alphas_of"]

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration, as JSON, in a file whose keys carry no alpha."""
_PEFT = ("lora_alpha", "alpha_pattern", "use_rslora")


def alphas_of(path: Path) -> Callable[[str, int], float]:
    """(layer, rank) -> its alpha by PEFT's configuration inside the file or beside it; the rank where there is none."""
    stored = read_metadata(path).get(METADATA) if path.suffix in SAFETENSORS else None
    beside = path.parent / "adapter_config.json"
    try:
        config: Any = json.loads(stored) if stored is not None else None
        if config is None and path.stem == "adapter_model" and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"LoRA {str(path)!r}: its PEFT configuration is no JSON ({error})") from error
    if config is None:
        return lambda layer, rank: float(rank)
    if not isinstance(config, dict) or not isinstance(config.get("alpha_pattern") or {}, dict):
        raise BadCheckpoint(f"LoRA {str(path)!r}: its PEFT configuration is no object with an alpha for each name")

    def by_layer(layer: str, rank: int) -> float:
        expert = SECOND if layer.startswith(f"{SECOND}.") else FIRST
        said = {name: config.get(f"{expert}.{name}", config.get(name)) for name in _PEFT}
        patterns = said["alpha_pattern"] or {}
        alpha = next(
            (value for name, value in patterns.items() if flat(layer).endswith(flat(name))), said["lora_alpha"]
        )
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadCheckpoint(f"LoRA {str(path)!r}: its PEFT configuration has alpha {alpha!r}, which is no number")
        return float(alpha) * (math.sqrt(rank) if said["use_rslora"] else 1.0)

    return by_layer
