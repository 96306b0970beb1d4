"""How many latent frames the VAE decodes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan.engine.errors import BadRequest
from wan.engine.hardware import Hardware
from wan.engine.options import option
from wan.engine.plan import Optimization, Order

if TYPE_CHECKING:
    from wan.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class VAEFrames(Optimization):
    """Decode this many latent frames at a time. More of them fill a card better and are launched less often; the VAE's
    activations grow with them, which the planner counts, while what it remembers of earlier frames does not.

    Convolutions of more frames may sum in another order. Where memory runs out the number is the first to go.
    """

    order = Order.PLACEMENT
    grade = "rounding"
    tolerance = 1e-2
    cost = "the VAE's activations, once for each frame"
    per_call = True
    vae_frames_per_call: int = option(0, "latent frames decoded at a time (0: as many as have 8192 latent pixels)")

    def check(self, hardware: Hardware) -> None:
        if self.vae_frames_per_call < 0:
            raise BadRequest(
                f"--vae_frames_per_call {self.vae_frames_per_call!r}: give a number of latent frames, 2 to 4 for large "
                "videos, or 0 to have it chosen by size"
            )

    def apply(self, engine: Engine) -> None:
        engine.set_frames_per_call(self.vae_frames_per_call)
