"""diffusers' names of Animate's transformer. It also splits a layer, drops dims of 1 and leaves out constants."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from wan.engine.weights.keymap import DIFFUSERS_DIT, Dialect, KeyMap, Recut

_OURS, _THEIRS = "motion_encoder.enc.net_app.convs", "motion_encoder"
_CONV = (("conv1.1", "conv1.act_fn"), ("conv1.0", "conv1"), ("conv2.2", "conv2.act_fn"), ("conv2.1", "conv2"))
_PAIRS = (
    ("pose_patch_embedding", "pose_patch_embedding"),
    ("face_adapter.fuser_blocks.*.linear1_q", "face_adapter.*.to_q"),
    ("face_adapter.fuser_blocks.*.linear1_k", "face_adapter.*.to_k"),
    ("face_adapter.fuser_blocks.*.linear1_v", "face_adapter.*.to_v"),
    ("face_adapter.fuser_blocks.*.linear2", "face_adapter.*.to_out"),
    ("face_adapter.fuser_blocks.*.q_norm", "face_adapter.*.norm_q"),
    ("face_adapter.fuser_blocks.*.k_norm", "face_adapter.*.norm_k"),
    ("face_encoder.conv1_local.conv", "face_encoder.conv1_local"),
    ("face_encoder.conv2.conv", "face_encoder.conv2"),
    ("face_encoder.conv3.conv", "face_encoder.conv3"),
    ("face_encoder", "face_encoder"),
    ("motion_encoder.enc.fc.*", "motion_encoder.motion_network.*"),
    ("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight"),
    (f"{_OURS}.0.1", f"{_THEIRS}.conv_in.act_fn"),
    (f"{_OURS}.0.0", f"{_THEIRS}.conv_in"),
)
_BLUR = torch.tensor([1.0, 3.0, 3.0, 1.0])


def diffusers_animate(prefix: str, keys: Iterable[str]) -> Dialect:
    """`WanAnimateTransformer3DModel`; how many blocks its motion encoder has is seen from the keys."""
    pattern = re.compile(re.escape(prefix) + r"motion_encoder\.res_blocks\.(\d+)\.")
    names, recut = animate_names(1 + max((int(match[1]) for key in keys if (match := pattern.match(key))), default=-1))
    return Dialect(prefix, names, recut=recut)


def animate_names(blocks: int) -> tuple[KeyMap, Recut]:
    """Names and cut of the class whose motion encoder has so many blocks."""
    pairs = [*_PAIRS, (f"{_OURS}.{blocks + 1}", f"{_THEIRS}.conv_out")]
    biases, kernels = [f"{_OURS}.0.1.bias"], []
    for block in range(blocks):
        # We count the first convolution too, and the blur before each that shrinks the picture.
        ours, theirs = f"{_OURS}.{block + 1}", f"{_THEIRS}.res_blocks.{block}"
        pairs += [(f"{ours}.{mine}", f"{theirs}.{other}") for mine, other in (*_CONV, ("skip.1", "conv_skip"))]
        biases += [f"{ours}.conv1.1.bias", f"{ours}.conv2.2.bias"]
        kernels += [f"{ours}.conv2.0.kernel", f"{ours}.skip.0.kernel"]
    kernel = _BLUR[:, None] * _BLUR / _BLUR.sum() ** 2
    recut = Recut(
        "linear1_kv", ("linear1_k", "linear1_v"), dict.fromkeys(biases, 1), dict.fromkeys(biases, 2),
        dict.fromkeys(kernels, kernel),
    )  # fmt: skip
    return KeyMap((*DIFFUSERS_DIT.pairs, *pairs)), recut
