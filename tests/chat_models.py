"""Chat models of a few kilobytes with random weights: they babble, through the code of those that make sense."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<|end|>", "<|pad|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %} <|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %} <|end|> {% endfor %}assistant "
)


def save_chat_model(folder: Path, *, sees: bool = False, template: bool = True, ends: bool = True) -> Path:
    """A Qwen2, or with `sees` a Qwen2.5-VL, that writes letters. Without `ends` it never stops of itself."""
    from transformers import GenerationConfig

    tokenizer = _tokenizer(template)
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in string.ascii_lowercase}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (_seeing if sees else _blind)(len(tokenizer))
    stops: dict[str, Any] = {"eos_token_id": 0, "min_new_tokens": 5} if ends else {"eos_token_id": 10_000}
    silent = [token for token in range(len(tokenizer)) if token not in letters and (token or not ends)]
    model.generation_config = GenerationConfig(do_sample=True, pad_token_id=1, suppress_tokens=silent, **stops)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if sees:
        from transformers import Qwen2VLImageProcessorPil

        Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


def _tokenizer(template: bool) -> Any:
    """Every byte is a token, as in Qwen's own before their merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    letters = Tokenizer(models.BPE(ids, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=list(SPECIAL[2:])
    )
    tokenizer.chat_template = _TEMPLATE if template else None
    return tokenizer


_TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 8192, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def _blind(tokens: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_TEXT, vocab_size=tokens))


def _seeing(tokens: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0], "window_size": 56, "initializer_range": 0.2,
    }  # fmt: skip
    text = {**_TEXT, "vocab_size": tokens, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    ids = {f"{name}_token_id": SPECIAL.index(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{name}_token_id": SPECIAL.index(f"<|vision_{name}|>") for name in ("start", "end")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
