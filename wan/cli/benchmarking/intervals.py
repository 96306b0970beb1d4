"""How sure a share or a mean is: 95 % intervals that need no assumption about the shape of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

RESAMPLED = 4000
Z = 1.96


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return (centre - spread) / (1 + Z * Z / count), (centre + spread) / (1 + Z * Z / count)


def of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the percentiles of means of samples drawn anew, the same every time it is asked."""
    import numpy as np

    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (RESAMPLED, len(data)))
    low, high = np.percentile(data[drawn].mean(axis=1), (2.5, 97.5))
    return float(data.mean()), float(low), float(high)
