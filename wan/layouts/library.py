"""The networks as diffusers and transformers describe them: arguments of their classes, and their config.json."""

from __future__ import annotations

from typing import Any

from wan.modules.vae_statistics import LATENT_MEAN, LATENT_STD


def transformer_config(sizes: Any) -> dict[str, Any]:
    """Arguments of `WanTransformer3DModel` for the config of a `WanModel`, or of its VACE form for VACE's."""
    vace = {"vace_layers": "vace_layers", "vace_in_dim": "vace_in_channels"}
    fields = {theirs: sizes[name] for name, theirs in vace.items() if name in sizes}
    if sizes.image_dim:
        fields |= {"image_dim": sizes.image_dim, "added_kv_proj_dim": sizes.dim}
        fields |= {"pos_embed_seq_len": sizes.image_positions} if sizes.image_positions else {}
    return fields | {
        "patch_size": list(sizes.patch_size),
        "num_attention_heads": sizes.num_heads,
        "attention_head_dim": sizes.dim // sizes.num_heads,
        "in_channels": sizes.in_dim,
        "out_channels": sizes.out_dim,
        "text_dim": sizes.text_dim,
        "freq_dim": sizes.freq_dim,
        "ffn_dim": sizes.ffn_dim,
        "num_layers": sizes.num_layers,
        "cross_attn_norm": sizes.cross_attn_norm,
        "qk_norm": "rms_norm_across_heads" if sizes.qk_norm else None,
        "eps": sizes.eps,
    }


def vae_config(sizes: Any) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan` for a `VAEConfig`."""
    fields = {
        "base_dim": sizes.encoder_dim,
        "decoder_base_dim": sizes.decoder_dim,
        "z_dim": sizes.z_dim,
        "dim_mult": list(sizes.dim_mult),
        "num_res_blocks": sizes.num_res_blocks,
        "temperal_downsample": list(sizes.temporal_down),
        "latents_mean": list(LATENT_MEAN[sizes.z_dim]),
        "latents_std": list(LATENT_STD[sizes.z_dim]),
        "scale_factor_spatial": sizes.patch_size * 2 ** (len(sizes.dim_mult) - 1),
        "scale_factor_temporal": 2 ** sum(sizes.temporal_down),
    }
    if not sizes.grouped:
        return fields
    pixels = 3 * sizes.patch_size**2
    return fields | {
        "is_residual": True,
        "patch_size": sizes.patch_size,
        "in_channels": pixels,
        "out_channels": pixels,
    }


def text_encoder_config(encoder: Any) -> dict[str, Any]:
    """Arguments of `UMT5Config` for our encoder."""
    block = encoder.blocks[0]
    buckets, heads = block.pos_embedding.embedding.weight.shape
    return {
        "vocab_size": encoder.token_embedding.weight.shape[0],
        "d_model": encoder.dim,
        "d_kv": encoder.dim_attn // heads,
        "d_ff": block.ffn.fc1.weight.shape[0],
        "num_layers": len(encoder.blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
    }
