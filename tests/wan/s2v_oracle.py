"""The speech-to-video transformer written down plainly: float64, one sample, token by token where that is clearest.

It knows the published keys and nothing of `wan`, so that the two can only agree by both being right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def velocity(  # noqa: PLR0913
    state: State, *, heads: int, inject: Sequence[int], text_len: int, x: Tensor, t: float, text: Tensor, ref: Tensor,
    motion: Tensor, pose: Tensor, audio: Tensor, motion_frames: tuple[int, int], drop_motion: bool,
) -> Tensor:  # fmt: skip
    """x and pose [16, T, H, W], text [S, D_text], ref [16, 1, H, W], motion [16, M, H, W], audio [25, A, Ta]."""
    w = {key: value.double() for key, value in state.items()}
    x, text, ref, motion, pose, audio = (each.double() for each in (x, text, ref, motion, pose, audio))
    local, whole = audio_tokens(w, audio, *motion_frames)

    noisy = conv(w, "patch_embedding", x) + conv(w, "cond_encoder", pose)
    mask = w["trainable_cond_mask.weight"]
    frames, rows, columns = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    parts = [noisy + mask[0], conv(w, "patch_embedding", ref) + mask[1]]
    places = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
    places += [(30, r, c) for r in range(rows) for c in range(columns)]
    if not drop_motion:
        packed, positions = motion_tokens(w, motion, rows, columns)
        parts.append(packed + mask[2])
        places += positions
    tokens = torch.cat(parts)
    turn = torch.stack([angles(place, tokens.shape[1] // heads) for place in places])
    own = len(noisy)

    e = {time: time_vector(w, time) for time in (t, 0.0)}
    e0 = {time: linear(w, "time_projection.1", F.silu(vector)).view(6, -1) for time, vector in e.items()}
    text = torch.cat([text, text.new_zeros(text_len - len(text), text.shape[1])])
    text = linear(w, "text_embedding.2", F.gelu(linear(w, "text_embedding.0", text), approximate="tanh"))

    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))
    for index in range(depth):
        tokens = block(w, f"blocks.{index}", tokens, text, turn, [e0[t]] * own + [e0[0.0]] * (len(tokens) - own), heads)
        if index in inject:
            number = list(inject).index(index)
            tokens = torch.cat([listen(w, number, tokens[:own], local, whole, heads), tokens[own:]])

    shift, scale = w["head.modulation"][0] + e[t]
    out = linear(w, "head.head", norm(tokens[:own]) * (1 + scale) + shift)
    out = out.view(frames, rows, columns, 2, 2, -1)
    return torch.einsum("frcyxo->ofrycx", out).reshape(-1, frames, 2 * rows, 2 * columns)


def audio_tokens(w: State, audio: Tensor, before: int, first: int) -> tuple[Tensor, Tensor]:
    """[T, 5, D] and [T, D]: what each latent frame hears, from features [25, A, Ta]."""
    audio = torch.cat([audio[:, :, :1].repeat(1, 1, before), audio], 2)
    weight = F.silu(w["casual_audio_encoder.weights"]).view(-1, 1, 1)
    mixed = (audio * weight).sum(0) / weight.sum()
    encoder = "casual_audio_encoder.encoder"
    heard = causal(w, f"{encoder}.conv1_local.conv", mixed, 1)
    tokens = []
    for part in heard.chunk(4):
        each = act(part)
        each = act(causal(w, f"{encoder}.conv2.conv", each, 2))
        tokens.append(act(causal(w, f"{encoder}.conv3.conv", each, 2)).T)
    padding = w[f"{encoder}.padding_tokens"].view(1, -1).expand(len(tokens[0]), -1)
    whole = act(causal(w, f"{encoder}.conv1_global.conv", mixed, 1))
    whole = act(causal(w, f"{encoder}.conv2.conv", whole, 2))
    whole = linear(w, f"{encoder}.final_linear", act(causal(w, f"{encoder}.conv3.conv", whole, 2)).T)
    return torch.stack([*tokens, padding], 1)[first:], whole[first:]


def causal(w: State, name: str, x: Tensor, stride: int) -> Tensor:
    """[C, T] -> [C', ceil(T / stride)]; each output sees the past alone, the first entry stands for what was before."""
    past = torch.cat([x[:, :1], x[:, :1], x], 1)
    kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    columns = [
        torch.einsum("oik,ik->o", kernel, past[:, at : at + 3]) + bias for at in range(0, past.shape[1] - 2, stride)
    ]
    return torch.stack(columns, 1)


def act(x: Tensor) -> Tensor:
    return F.silu(norm(x.T)).T


def motion_tokens(w: State, motion: Tensor, rows: int, columns: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Newest frame finely, two before it at half size, sixteen before those at a quarter size and four together."""
    empty = motion.new_zeros(16, max(0, 19 - motion.shape[1]), *motion.shape[2:])
    motion = torch.cat([empty, motion], 1)[:, -19:]
    oldest, older, newest = motion[:, :16], motion[:, 16:18], motion[:, 18:]
    tokens = [
        conv(w, "frame_packer.proj", newest), conv(w, "frame_packer.proj_2x", older),
        conv(w, "frame_packer.proj_4x", oldest),
    ]  # fmt: skip

    def spread(size: int, over: int) -> list[int]:
        return np.linspace(0, over - 1, size).astype(int).tolist()

    places = [(-1, r, c) for r in range(rows) for c in range(columns)]
    places += [(-3, r, c) for r in spread(rows // 2, rows) for c in spread(columns // 2, columns)]
    places += [
        (f, r, c) for f in (-19, -14, -9, -4) for r in spread(rows // 4, rows) for c in spread(columns // 4, columns)
    ]
    return torch.cat(tokens), places


def block(w: State, name: str, x: Tensor, text: Tensor, turn: Tensor, rows: Sequence[Tensor], heads: int) -> Tensor:
    m = torch.stack([w[f"{name}.modulation"][0] + row for row in rows])  # [L, 6, D]
    a = norm(x) * (1 + m[:, 1]) + m[:, 0]
    x = x + m[:, 2] * attention(w, f"{name}.self_attn", a, a, heads, turn)
    c = norm(x) * w[f"{name}.norm3.weight"] + w[f"{name}.norm3.bias"]
    x = x + attention(w, f"{name}.cross_attn", c, text, heads)
    f = norm(x) * (1 + m[:, 4]) + m[:, 3]
    return x + m[:, 5] * linear(w, f"{name}.ffn.2", F.gelu(linear(w, f"{name}.ffn.0", f), approximate="tanh"))


def listen(w: State, number: int, x: Tensor, local: Tensor, whole: Tensor, heads: int) -> Tensor:
    """Tokens of a latent frame look at the five audio tokens of that frame."""
    out = []
    for frame, hears, mood in zip(x.chunk(len(local)), local, whole, strict=True):
        shift, scale = linear(w, f"audio_injector.injector_adain_layers.{number}.linear", F.silu(mood)).chunk(2)
        normed = F.layer_norm(frame, frame.shape[-1:], eps=1e-5) * (1 + scale) + shift
        out.append(frame + attention(w, f"audio_injector.injector.{number}", normed, hears, heads))
    return torch.cat(out)


def attention(w: State, name: str, x: Tensor, y: Tensor, heads: int, turn: Tensor | None = None) -> Tensor:
    q = rms(linear(w, f"{name}.q", x)) * w[f"{name}.norm_q.weight"]
    k = rms(linear(w, f"{name}.k", y)) * w[f"{name}.norm_k.weight"]
    v = linear(w, f"{name}.v", y)
    q, k, v = (each.view(len(each), heads, -1) for each in (q, k, v))
    if turn is not None:
        q, k = rotated(q, turn), rotated(k, turn)
    weights = (torch.einsum("inc,jnc->nij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return linear(w, f"{name}.o", torch.einsum("nij,jnc->inc", weights, v).flatten(1))


def angles(place: tuple[int, int, int], width: int) -> Tensor:
    side = 2 * (width // 6)
    bands = (width - 2 * side, side, side)
    turns = [at * 10000 ** (-2 * i / band) for at, band in zip(place, bands, strict=True) for i in range(band // 2)]
    return torch.tensor(turns, dtype=torch.float64)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def time_vector(w: State, t: float) -> Tensor:
    half = w["time_embedding.0.weight"].shape[1] // 2
    angle = t * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    wave = torch.cat([angle.cos(), angle.sin()]).float().double()
    return linear(w, "time_embedding.2", F.silu(linear(w, "time_embedding.0", wave)))


def conv(w: State, name: str, x: Tensor) -> Tensor:
    """Tokens [L, D] of x [C, T, H, W]."""
    kernel = w[f"{name}.weight"]
    return F.conv3d(x[None], kernel, w[f"{name}.bias"], stride=kernel.shape[2:])[0].flatten(1).T


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
