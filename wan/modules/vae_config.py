"""The numbers that tell the two Wan VAEs, and tiny ones of either layout, apart: read from a checkpoint's shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wan.engine.errors import BadCheckpoint


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The numbers that make a Wan VAE; the defaults are VAE 2.1."""

    z_dim: int = 16
    encoder_dim: int = 96
    decoder_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    grouped: bool = False
    """Levels in groups with a shortcut around each (2.2) instead of one flat list (2.1)."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VAEConfig:
        """Read from the shapes of a state dict with upstream's keys; raises BadCheckpoint if it is no Wan VAE."""
        pattern = re.compile(
            r"encoder\.downsamples\.(\d+)(?:\.downsamples\.(\d+))?\.(?:residual\.2|resample\.1)\.weight"
        )
        found = [match for key in shapes if (match := pattern.fullmatch(key))]
        found.sort(key=lambda match: (int(match[1]), int(match[2] or 0)))
        widths: list[list[int]] = [[]]
        temporal: list[bool] = []
        for match in found:
            if ".resample." in match[0]:
                temporal.append(match[0].replace("resample.1", "time_conv") in shapes)
                widths.append([])
            else:
                widths[-1].append(shapes[match[0]][0])
        try:
            base, pixels = shapes["encoder.conv1.weight"][:2]
            return cls(
                z_dim=shapes["conv2.weight"][0],
                encoder_dim=base,
                decoder_dim=shapes["decoder.head.0.gamma"][0],
                dim_mult=tuple(level[0] // base for level in widths),
                num_res_blocks=len(widths[0]),
                temporal_down=tuple(temporal),
                patch_size=math.isqrt(pixels // 3),
                grouped=found[0][2] is not None,
            )
        except (KeyError, IndexError) as missing:
            raise BadCheckpoint(
                f"not a Wan VAE: {missing} is not in its {len(shapes)} tensors; "
                "pass Wan2.1_VAE.pth, Wan2.2_VAE.pth or a file with the same keys"
            ) from missing


VAE_2_1 = VAEConfig()
VAE_2_2 = VAEConfig(z_dim=48, encoder_dim=160, decoder_dim=256, patch_size=2, grouped=True)
