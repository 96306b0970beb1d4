"""Bytes of activations that one forward of the DiT holds at its peak, by formula: what a plan is made with.

It counts what plain eager blocks keep; `tests/engine/test_activations.py` holds it to the tensors that
`wan.engine.live_bytes` sees. Compiled blocks are laid out by the compiler, which keeps fewer temporaries but does not
write the residual stream where it stands: count two streams for them.
"""

from __future__ import annotations

from wan.engine.ops.rows import RUN_VALUES

__all__ = ["dit_activation_bytes"]


def dit_activation_bytes(  # noqa: PLR0913 - a formula of plain numbers, all by name
    *,
    dim: int,
    ffn_dim: int,
    tokens: int,
    batch: int = 1,
    text_len: int = 512,
    head_dim: int = 128,
    ffn_rows: int = 0,
    attention_rows: int = 0,
    param_bytes: int = 2,
    stream_bytes: int = 4,
    streams: int = 1,
) -> int:
    """Peak bytes of a forward's own tensors, weights not among them.

    `tokens` counts all of the trunk, appended ones too. `ffn_rows` and `attention_rows` are those options, 0 for all
    tokens at once. `param_bytes` is the size of the dtype that Linear layers compute in, `stream_bytes` of the
    residual stream's, which is float32 whatever the weights are unless it is chosen. `streams` is how many of these
    live at once: one more where a trunk wrapper keeps its input (step caches), for VACE's side stack, and for compiled
    blocks.
    """
    width = batch * dim * param_bytes  # of a token in the compute dtype
    fed, asked = (min(rows or tokens, tokens) for rows in (ffn_rows, attention_rows))
    # A projection is normed, weighted and turned in float32, a run of tokens at a time.
    turning = min(RUN_VALUES, asked * batch * dim) * (param_bytes + 8)
    row_sums = 4 * batch * (dim // head_dim)
    keys = 2 * tokens * width
    if asked < tokens:  # what enters and its keys and values while they are collected; or queries, output, projected
        attention = keys + 3 * asked * width + turning
    else:
        attention = keys + tokens * width + max(tokens * (width + row_sums), turning)
    hidden = fed * batch * (dim + ffn_dim) * param_bytes
    stream = streams * tokens * batch * dim * stream_bytes
    places = tokens * (4 * head_dim + 8 + 8)
    text = batch * text_len * dim * param_bytes
    return stream + max(attention, hidden) + places + text
