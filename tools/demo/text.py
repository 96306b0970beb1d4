"""The demo's tokenizer and text encoder: whole words, and a two-layer umT5 encoder."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan.modules.t5 import T5Encoder

from . import scenes

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    dim: int = 128
    dim_attn: int = 128
    dim_ffn: int = 256
    num_heads: int = 4
    num_layers: int = 2
    num_buckets: int = 32


def build_encoder(config: TextConfig, seed: int) -> T5Encoder:
    torch.manual_seed(seed)
    return T5Encoder(
        vocab=len(SPECIAL) + len(scenes.vocabulary()),
        dim=config.dim, dim_attn=config.dim_attn, dim_ffn=config.dim_ffn, num_heads=config.num_heads,
        num_layers=config.num_layers, num_buckets=config.num_buckets, shared_pos=False, dropout=0.0,
    )  # fmt: skip


class WordTokenizer:
    """Splits like the tokenizer.json that `write_tokenizer` writes, without its start-up time."""

    def __init__(self) -> None:
        self.ids = {word: index for index, word in enumerate((*SPECIAL, *scenes.vocabulary()))}

    def __call__(self, text: str, rng: random.Random | None = None) -> list[int]:
        """Token numbers ending in </s>. With `rng` some captions get words the model does not know, to be ignored."""
        ids = [self.ids.get(word, UNK) for word in re.findall(r"\w+|[^\w\s]+", text.lower())]
        if rng is not None and ids and rng.random() < 0.15:
            for _ in range(rng.randint(1, 3)):
                ids.insert(rng.randint(0, len(ids)), rng.choice((UNK, UNK, self.ids[","])))
        return [*ids, EOS]


def write_tokenizer(folder: Path) -> None:
    """Writes a Hugging Face fast-tokenizer folder: lower-cased words and punctuation, unknown words become <unk>."""
    vocab = WordTokenizer().ids
    added = [
        {"id": index, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for index, word in enumerate(SPECIAL)
    ]  # fmt: skip
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing", "single": sequence,
            "pair": [
                *sequence,
                {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "</s>", "type_id": 1}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "padding_side": "right",
              "clean_up_tokenization_spaces": False}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer", document), ("tokenizer_config", config), ("special_tokens_map", names)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def embed(encoder: T5Encoder, tokens: list[list[int]], text_len: int) -> Tensor:
    """Token lists -> [B, text_len, D], zero after each text's </s>, as the pipeline feeds the DiT."""
    longest = max(len(ids) for ids in tokens)
    if longest > text_len:
        raise ValueError(f"a caption of {longest} tokens does not fit text_len={text_len}")
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in tokens])
    mask = (torch.arange(longest) < torch.tensor([[len(row)] for row in tokens])).float()
    states = encoder(ids, mask) * mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, text_len - longest))
