"""Code written for the original package keeps working: import doors, names, argument order and defaults."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

REQUIRED = inspect.Parameter.empty

# Callable -> its positional arguments in upstream's order, with upstream's defaults where 2.1 and 2.2 agree.
SIGNATURES: dict[str, dict[str, Any]] = {
    "wan:WanT2V": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True, "convert_model_dtype": False,
    },
    "wan:WanT2V.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "size": (1280, 720), "frame_num": 81, "shift": 5.0,
        "sample_solver": "unipc", "sampling_steps": 50, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True,
    },
    "wan:WanI2V": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True, "convert_model_dtype": False,
    },
    "wan:WanI2V.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "img": REQUIRED, "max_area": 720 * 1280, "frame_num": 81,
        "shift": 5.0, "sample_solver": "unipc", "sampling_steps": 40, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True,
    },
    "wan:WanFLF2V": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True,
    },
    "wan:WanFLF2V.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "first_frame": REQUIRED, "last_frame": REQUIRED,
        "max_area": 720 * 1280, "frame_num": 81, "shift": 16, "sample_solver": "unipc", "sampling_steps": 50,
        "guide_scale": 5.5, "n_prompt": "", "seed": -1, "offload_model": True,
    },
    "wan.modules.clip:CLIPModel": {
        "dtype": REQUIRED, "device": REQUIRED, "checkpoint_path": REQUIRED, "tokenizer_path": None,
    },
    "wan.modules.clip:CLIPModel.visual": {"self": REQUIRED, "videos": REQUIRED},
    "wan:WanTI2V": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True, "convert_model_dtype": False,
    },
    "wan:WanTI2V.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "img": None, "size": (1280, 704), "max_area": 704 * 1280,
        "frame_num": 81, "shift": 5.0, "sample_solver": "unipc", "sampling_steps": 50, "guide_scale": 5.0,
        "n_prompt": "", "seed": -1, "offload_model": True,
    },
    "wan:WanTI2V.t2v": {
        "self": REQUIRED, "input_prompt": REQUIRED, "size": (1280, 704), "frame_num": 121, "shift": 5.0,
        "sample_solver": "unipc", "sampling_steps": 50, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True,
    },
    "wan:WanTI2V.i2v": {
        "self": REQUIRED, "input_prompt": REQUIRED, "img": REQUIRED, "max_area": 704 * 1280, "frame_num": 121,
        "shift": 5.0, "sample_solver": "unipc", "sampling_steps": 40, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True,
    },
    "wan:WanAnimate": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True, "convert_model_dtype": False,
        "use_relighting_lora": False,
    },
    "wan:WanAnimate.generate": {
        "self": REQUIRED, "src_root_path": REQUIRED, "replace_flag": False, "clip_len": 77, "refert_num": 1,
        "shift": 5.0, "sample_solver": "dpm++", "sampling_steps": 20, "guide_scale": 1, "input_prompt": "",
        "n_prompt": "", "seed": -1, "offload_model": True,
    },
    "wan.modules.animate:CLIPModel": {
        "dtype": REQUIRED, "device": REQUIRED, "checkpoint_path": REQUIRED, "tokenizer_path": None,
    },
    "wan.modules.animate:WanAnimateModel.forward": {
        "self": REQUIRED, "x": REQUIRED, "t": REQUIRED, "clip_fea": REQUIRED, "context": REQUIRED,
        "seq_len": REQUIRED, "y": None, "pose_latents": None, "face_pixel_values": None,
    },
    "wan:WanVace": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False,
    },
    "wan:WanVaceMP": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "use_usp": False, "ulysses_size": None, "ring_size": None,
    },
    "wan:WanVace.prepare_source": {
        "self": REQUIRED, "src_video": REQUIRED, "src_mask": REQUIRED, "src_ref_images": REQUIRED,
        "num_frames": REQUIRED, "image_size": REQUIRED, "device": REQUIRED,
    },
    "wan:WanVace.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "input_frames": REQUIRED, "input_masks": REQUIRED,
        "input_ref_images": REQUIRED, "size": (1280, 720), "frame_num": 81, "context_scale": 1.0, "shift": 5.0,
        "sample_solver": "unipc", "sampling_steps": 50, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True,
    },
    "wan.modules.vace_model:VaceWanModel": {
        "vace_layers": None, "vace_in_dim": None, "model_type": "vace", "patch_size": (1, 2, 2), "text_len": 512,
        "in_dim": 16, "dim": 2048, "ffn_dim": 8192, "freq_dim": 256, "text_dim": 4096, "out_dim": 16,
        "num_heads": 16, "num_layers": 32, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
        "eps": 1e-6,
    },
    "wan.modules.vace_model:VaceWanModel.forward": {
        "self": REQUIRED, "x": REQUIRED, "t": REQUIRED, "vace_context": REQUIRED, "context": REQUIRED,
        "seq_len": REQUIRED, "vace_context_scale": 1.0, "clip_fea": None, "y": None,
    },
    "wan.utils.vace_processor:VaceVideoProcessor": {
        "downsample": REQUIRED, "min_area": REQUIRED, "max_area": REQUIRED, "min_fps": REQUIRED, "max_fps": REQUIRED,
        "zero_start": REQUIRED, "seq_len": REQUIRED, "keep_last": REQUIRED,
    },
    "wan.utils.vace_processor:VaceVideoProcessor.load_video_pair": {
        "self": REQUIRED, "data_key": REQUIRED, "data_key2": REQUIRED, "crop_box": None, "seed": 2024,
    },
    "wan.utils.utils:best_output_size": {
        "w": REQUIRED, "h": REQUIRED, "dw": REQUIRED, "dh": REQUIRED, "expected_area": REQUIRED,
    },
    "wan.utils.utils:masks_like": {"tensor": REQUIRED, "zero": False, "generator": None, "p": 0.2},
    "wan:WanS2V": {
        "config": REQUIRED, "checkpoint_dir": REQUIRED, "device_id": 0, "rank": 0, "t5_fsdp": False,
        "dit_fsdp": False, "use_sp": False, "t5_cpu": False, "init_on_cpu": True, "convert_model_dtype": False,
    },
    "wan:WanS2V.generate": {
        "self": REQUIRED, "input_prompt": REQUIRED, "ref_image_path": REQUIRED, "audio_path": REQUIRED,
        "enable_tts": REQUIRED, "tts_prompt_audio": REQUIRED, "tts_prompt_text": REQUIRED, "tts_text": REQUIRED,
        "num_repeat": 1, "pose_video": None, "max_area": 720 * 1280, "infer_frames": 80, "shift": 5.0,
        "sample_solver": "unipc", "sampling_steps": 40, "guide_scale": 5.0, "n_prompt": "", "seed": -1,
        "offload_model": True, "init_first_frame": False,
    },
    "wan.modules.s2v:WanModel_S2V.forward": {
        "self": REQUIRED, "x": REQUIRED, "t": REQUIRED, "context": REQUIRED, "seq_len": REQUIRED,
        "ref_latents": REQUIRED, "motion_latents": REQUIRED, "cond_states": REQUIRED, "audio_input": None,
        "motion_frames": [17, 5], "add_last_motion": 2, "drop_motion_frames": False,
    },
    "wan.utils.utils:merge_video_audio": {"video_path": REQUIRED, "audio_path": REQUIRED},
    "wan.modules.model:WanModel": {
        "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 512, "in_dim": 16, "dim": 2048, "ffn_dim": 8192,
        "freq_dim": 256, "text_dim": 4096, "out_dim": 16, "num_heads": 16, "num_layers": 32,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
    },
    "wan.modules.model:WanModel.forward": {
        "self": REQUIRED, "x": REQUIRED, "t": REQUIRED, "context": REQUIRED, "seq_len": REQUIRED, "clip_fea": None,
        "y": None,
    },
    "wan.modules.vae:WanVAE": {"z_dim": 16, "vae_pth": "cache/vae_step_411000.pth"},
    "wan.modules.vae2_1:Wan2_1_VAE": {"z_dim": 16, "vae_pth": "cache/vae_step_411000.pth"},
    "wan.modules.vae2_2:Wan2_2_VAE": {
        "z_dim": 48, "c_dim": 160, "vae_pth": None, "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
    },
    "wan.modules.t5:T5EncoderModel": {"text_len": REQUIRED},
    "wan.modules.tokenizers:HuggingfaceTokenizer": {"name": REQUIRED, "seq_len": None, "clean": None},
    "wan.modules.attention:flash_attention": {
        "q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "q_lens": None, "k_lens": None, "dropout_p": 0.0,
        "softmax_scale": None, "q_scale": None, "causal": False, "window_size": (-1, -1), "deterministic": False,
    },
    "wan.utils.fm_solvers:FlowDPMSolverMultistepScheduler": {"num_train_timesteps": 1000, "solver_order": 2},
    "wan.utils.fm_solvers_unipc:FlowUniPCMultistepScheduler": {"num_train_timesteps": 1000, "solver_order": 2},
    "wan.utils.fm_solvers:get_sampling_sigmas": {"sampling_steps": REQUIRED, "shift": REQUIRED},
    "wan.utils.fm_solvers:retrieve_timesteps": {"scheduler": REQUIRED, "num_inference_steps": None, "device": None},
    "wan.utils.utils:save_video": {"tensor": REQUIRED, "save_file": None, "fps": 30, "suffix": ".mp4", "nrow": 8},
    "wan.utils.utils:save_image": {"tensor": REQUIRED, "save_file": REQUIRED, "nrow": 8},
    "wan.utils.utils:cache_video": {"tensor": REQUIRED, "save_file": None, "fps": 30, "suffix": ".mp4", "nrow": 8},
    "wan.utils.utils:cache_image": {"tensor": REQUIRED, "save_file": REQUIRED, "nrow": 8},
    "wan.utils.utils:str2bool": {"v": REQUIRED},
    "wan.utils.prompt_extend:DashScopePromptExpander": {
        "api_key": None, "model_name": None, "task": None, "max_image_size": 512 * 512, "retry_times": 4,
        "is_vl": False,
    },
    "wan.utils.prompt_extend:QwenPromptExpander": {"model_name": None, "task": None, "device": 0, "is_vl": False},
    "wan.utils.prompt_extend:PromptExpander.__call__": {
        "self": REQUIRED, "prompt": REQUIRED, "system_prompt": None, "tar_lang": "zh", "image": None, "seed": -1,
    },
    "wan.utils.prompt_extend:PromptOutput": {
        "status": REQUIRED, "prompt": REQUIRED, "seed": REQUIRED, "system_prompt": REQUIRED, "message": REQUIRED,
    },
}  # fmt: skip

DOORS = [
    "wan:configs", "wan:modules", "wan:distributed", "wan.configs:WAN_CONFIGS", "wan.configs:SIZE_CONFIGS",
    "wan.configs:MAX_AREA_CONFIGS", "wan.configs:SUPPORTED_SIZES", "wan.modules:WanModel", "wan.modules:T5Model",
    "wan.modules:T5Encoder", "wan.modules:T5Decoder", "wan.modules:T5EncoderModel", "wan.modules:HuggingfaceTokenizer",
    "wan.modules:flash_attention", "wan.modules.s2v:AudioEncoder", "wan.speech2video:WanS2V",
    "wan.modules:VaceWanModel", "wan.utils:VaceVideoProcessor",
    "wan.utils.vace_processor:VaceVideoProcessor", "wan.modules.vace_model:VaceWanModel",
    "wan.image2video:WanI2V", "wan.first_last_frame2video:WanFLF2V", "wan.modules.clip:CLIPModel",
    "wan.textimage2video:WanTI2V", "wan.vace:WanVace", "wan.animate:WanAnimate",
    "wan.modules:WanVAE", "wan.modules:Wan2_1_VAE", "wan.modules:Wan2_2_VAE",
    "wan.utils:get_sampling_sigmas", "wan.utils:retrieve_timesteps", "wan.utils:FlowDPMSolverMultistepScheduler",
    "wan.utils:FlowUniPCMultistepScheduler", "wan.text2video:WanT2V", "wan.text2video_optimized:WanT2VOptimized",
]  # fmt: skip


def resolve(door: str) -> Any:
    module, _, path = door.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("door", DOORS)
def test_upstreams_import_door_opens(door: str) -> None:
    assert resolve(door) is not None


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name: str) -> None:
    expected = SIGNATURES[name]
    parameters = list(inspect.signature(resolve(name)).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert [p.name for p in positional[: len(expected)]] == list(expected)
    # A tuple where upstream has a list: the same value that no caller can change for the next one.
    given = {p.name: p.default for p in positional[: len(expected)]}
    assert {name: list(v) if isinstance(expected[name], list) else v for name, v in given.items()} == expected


def test_both_names_of_sequence_parallelism_are_accepted() -> None:
    assert "use_usp" in inspect.signature(resolve("wan:WanT2V")).parameters


@pytest.mark.parametrize("name", ["T2V", "I2V", "FLF2V", "TI2V", "Vace", "S2V", "Animate"])
def test_optimized_class_is_the_plain_one_with_three_keywords(name: str) -> None:
    plain, optimized = resolve(f"wan:Wan{name}"), resolve(f"wan:Wan{name}Optimized")
    assert {"enable_compile", "enable_tf32", "compile_mode"} <= set(inspect.signature(optimized).parameters)
    assert issubclass(optimized, plain) and optimized.generate is plain.generate and optimized.kind == plain.kind
    parameters = inspect.signature(optimized.generate).parameters
    assert {"offload_model", "seed"} <= set(parameters)  # per-call options, as use_batched_cfg, come by **extras
    assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())
