"""The networks as diffusers and transformers describe them: arguments of their classes, and their config.json."""

from __future__ import annotations

from typing import Any

from wan.modules.clip import MEAN, STD
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


def animate_config(model: Any) -> dict[str, Any]:
    """Arguments that `WanAnimateTransformer3DModel` has besides those of every transformer."""
    sizes, side = model.config, model.face_size
    return {
        "latent_channels": sizes.out_dim,
        "motion_encoder_channel_sizes": {str(side >> index): width for index, width in enumerate(sizes.motion_widths)},
        "motion_encoder_size": side,
        "motion_style_dim": sizes.motion_widths[-1],
        "motion_dim": sizes.motion_dim,
        "motion_encoder_dim": sizes.motion_encoder_dim,
        "face_encoder_hidden_dim": sizes.face_dim,
        "face_encoder_num_heads": sizes.face_heads,
        "inject_face_latents_blocks": sizes.face_every,
    }


def image_encoder_config(tower: Any) -> dict[str, Any]:
    """Arguments of `CLIPVisionConfig` for our image tower."""
    block = tower.transformer[0]
    return {
        "hidden_size": tower.dim,
        "intermediate_size": block.mlp[0].out_features,
        "num_hidden_layers": len(tower.transformer),
        "num_attention_heads": block.attn.num_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": tower.pre_norm.eps,
    }


def image_processor_config(tower: Any) -> dict[str, Any]:
    """Arguments of `CLIPImageProcessor`: the whole picture in the tower's square, as the models were trained."""
    square = {"height": tower.image_size, "width": tower.image_size}
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
