"""Which steps a step cache skips, decided from numbers that are known before the first step. Plain Python, no tensors.

A schedule is for the steps of one expert, positions 0 to n - 1: networks that change carry nothing over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def magcache_skips(ratios: Sequence[float], may_skip: Collection[int], threshold: float, most: int) -> frozenset[int]:
    """The positions that reuse the residual of the step before them.

    `ratios[i]` says by how much the norm of the residual changes from step i - 1 to step i. A step of `may_skip` is
    skipped while the summed departure of the running product from 1 stays below `threshold`, at most `most` in a row.
    Source: arXiv:2506.09045; MagCache4Wan2.1.
    """
    skipped = set()
    product, error, row = 1.0, 0.0, 0
    for position in sorted(may_skip):
        product *= ratios[position]
        error += abs(1 - product)
        row += 1
        if error < threshold and row <= most:
            skipped.add(position)
        else:
            product, error, row = 1.0, 0.0, 0
    return frozenset(skipped)


def teacache_skips(
    distances: Sequence[float], may_skip: Collection[int], threshold: float, coefficients: Sequence[float]
) -> frozenset[int]:
    """The positions that reuse the residual of the step before them.

    `distances[i]` is the relative L1 distance of the time embedding from step i - 1 to step i, of which a polynomial
    (`coefficients`, highest power first) estimates how far the output moves. A step of `may_skip` is skipped while
    the summed estimate stays below `threshold`; polynomials fall below 0 too, so that 0 has to mean never by itself.
    Source: arXiv:2411.19108; TeaCache4Wan2.1.
    """
    if threshold <= 0:
        return frozenset()
    skipped = set()
    moved = 0.0
    for position in range(len(distances)):
        if position not in may_skip:
            moved = 0.0
            continue
        moved += polynomial(coefficients, distances[position])
        if moved < threshold:
            skipped.add(position)
        else:
            moved = 0.0
    return frozenset(skipped)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The value at `x`; highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def resampled(table: Sequence[float], count: int) -> list[float]:
    """`table`, measured at its own number of steps, for `count` steps: the nearest entry by share of the way."""
    if count == 1:
        return [table[0]]
    return [table[round(i * (len(table) - 1) / (count - 1))] for i in range(count)]


def retained(count: int, share: float, *, last: bool) -> frozenset[int]:
    """The positions that may be skipped: none in the first `share` of the steps, nor the first, nor, if `last`, the
    last."""
    # Twice over and cut, as in the published rule, which counts the forwards of both guidance branches.
    first = next((i for i in range(count) if 2 * i >= int(2 * count * share)), count)
    return frozenset(range(max(1, first), count - last))
