"""Every optimisation there is. A new one is a file beside this one and one import line below."""

from __future__ import annotations

from wan.engine.optimizations.attention import Attention
from wan.engine.optimizations.attention_guidance import NAG, EnhanceVideo, SkipLayers
from wan.engine.optimizations.batched_cfg import BatchedCFG
from wan.engine.optimizations.block_swap import BlockSwap
from wan.engine.optimizations.compile import Compile
from wan.engine.optimizations.context_windows import ContextWindows
from wan.engine.optimizations.dtype import Precision, ResidualPrecision
from wan.engine.optimizations.few_step import FewStep
from wan.engine.optimizations.fp8 import FP8, T5FP8
from wan.engine.optimizations.fused_qkv import FusedQKV
from wan.engine.optimizations.guidance import APG, CFGInterval, CFGZeroStar, FreSca, GuidanceRescale
from wan.engine.optimizations.kernels import Kernels
from wan.engine.optimizations.lockstep_cfg import LockstepCFG
from wan.engine.optimizations.lora import LoRA
from wan.engine.optimizations.numerics import TF32, BF16Reduction, CudnnBenchmark, Deterministic
from wan.engine.optimizations.offload import Offload
from wan.engine.optimizations.riflex import RIFLEx
from wan.engine.optimizations.row_chunks import AttentionRows, FFNRows
from wan.engine.optimizations.shared_first_block import SharedFirstBlock
from wan.engine.optimizations.step_cache import StepCache
from wan.engine.optimizations.stream_t5 import StreamT5
from wan.engine.optimizations.t5_cpu import T5CPU
from wan.engine.optimizations.text_keys import TextKeys
from wan.engine.optimizations.vae_compile import VAECompile
from wan.engine.optimizations.vae_cpu import VAECPU
from wan.engine.optimizations.vae_dtype import VAEPrecision
from wan.engine.optimizations.vae_frames import VAEFrames
from wan.engine.optimizations.vae_layers import VAEChannelsLast, VAEMatmulAttention, VAESubpixel
from wan.engine.optimizations.vae_tiling import VAETiling
from wan.engine.plan import Optimization

__all__ = [
    "APG", "Attention", "AttentionRows", "BF16Reduction", "BatchedCFG", "BlockSwap", "CFGInterval", "CFGZeroStar",
    "Compile", "ContextWindows", "CudnnBenchmark", "Deterministic", "EnhanceVideo", "FFNRows", "FP8", "FewStep",
    "FreSca", "FusedQKV", "GuidanceRescale", "Kernels", "LoRA", "LockstepCFG", "NAG", "Offload", "Precision", "RIFLEx",
    "ResidualPrecision", "SharedFirstBlock", "SkipLayers", "StepCache", "StreamT5", "T5CPU", "T5FP8", "TF32",
    "TextKeys", "VAECPU", "VAEChannelsLast", "VAECompile", "VAEFrames", "VAEMatmulAttention", "VAEPrecision",
    "VAESubpixel", "VAETiling", "registry",
]  # fmt: skip


def registry() -> tuple[type[Optimization], ...]:
    """The classes imported above, in the order they are applied, by name within one order."""
    found = [value for value in globals().values() if isinstance(value, type) and issubclass(value, Optimization)]
    return tuple(sorted((cls for cls in found if cls is not Optimization), key=lambda cls: (cls.order, cls.__name__)))
