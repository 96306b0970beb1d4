"""Wan 2.2 speech-to-video 14B: clips of 80 frames, one after another, that follow a sound."""  # noqa: N999

from __future__ import annotations

from easydict import EasyDict

from .shared_config import make_config

__all__ = ["s2v_14B"]

# As in shared_config: byte for byte (a test holds its SHA-256).
NEGATIVE_PROMPT = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

_TRANSFORMER = EasyDict(
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    cond_dim=16,
    audio_dim=1024,
    audio_inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
    enable_adain=True,
    adain_mode="attn_norm",
    zero_init=True,
    zero_timestep=True,
    enable_motioner=False,
    add_last_motion=True,
    enable_tsm=False,
    trainable_token=False,
    enable_framepack=True,
    framepack_drop_mode="padd",
    motion_frames=73,
)

s2v_14B = make_config(  # noqa: N816
    "Wan S2V 14B",
    transformer=_TRANSFORMER,
    **{name: _TRANSFORMER[name] for name in ("dim", "ffn_dim", "num_heads", "num_layers", "audio_inject_layers")},
    audio_dim=_TRANSFORMER.audio_dim,
    motion_frames=_TRANSFORMER.motion_frames,
    drop_first_motion=True,
    wav2vec="wav2vec2-large-xlsr-53-english",
    sample_neg_prompt=NEGATIVE_PROMPT,
    sample_steps=40,
    sample_shift=3.0,
    sample_guide_scale=4.5,
)
