"""Text cleaning and the tokenizer wrapper of the text encoder, under upstream's name.

Cleaning decides which tokens a prompt becomes, so it follows upstream to the character: mojibake repair by ftfy,
HTML entities unescaped twice, runs of white space collapsed.
"""

from __future__ import annotations

import html
import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wan.engine.errors import BadCheckpoint, BadRequest
from wan.modules.spiece import spiece_tokenizer

__all__ = ["HuggingfaceTokenizer", "basic_clean", "canonicalize", "whitespace_clean"]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def basic_clean(text: str) -> str:
    """`text` with broken Unicode repaired, HTML entities resolved (twice: `&amp;lt;` occurs) and ends stripped."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """`text` with every run of white space replaced by one space."""
    return re.sub(r"\s+", " ", text).strip()


def canonicalize(text: str, keep_punctuation_exact_string: str | None = None) -> str:
    """`text` in lower case, without ASCII punctuation (but for the one string to keep), `_` read as a space."""
    text = text.replace("_", " ")
    pieces = [text] if keep_punctuation_exact_string is None else text.split(keep_punctuation_exact_string)
    stripped = [piece.translate(_NO_PUNCTUATION) for piece in pieces]
    return whitespace_clean((keep_punctuation_exact_string or "").join(stripped).lower())


_CLEANERS = {
    None: lambda text: text,
    "whitespace": lambda text: whitespace_clean(basic_clean(text)),
    "lower": lambda text: whitespace_clean(basic_clean(text)).lower(),
    "canonicalize": lambda text: canonicalize(basic_clean(text)),
}


class HuggingfaceTokenizer:
    """A Hugging Face tokenizer that cleans its input and pads to `seq_len`.

    `name` is a tokenizer folder, a tokenizer.json, a spiece.model, the content of one, or a repository name on the
    hub; further keywords go to `AutoTokenizer.from_pretrained`. Raises BadCheckpoint when there is no tokenizer.
    """

    def __init__(
        self, name: str | os.PathLike[str] | bytes, seq_len: int | None = None, clean: str | None = None, **kwargs: Any
    ) -> None:
        if clean not in _CLEANERS:
            raise BadRequest(f"clean={clean!r} is unknown; use None, 'whitespace', 'lower' or 'canonicalize'.")
        self.name = "spiece_model" if isinstance(name, bytes) else os.fspath(name)
        self.seq_len = seq_len
        self.clean = clean
        self.tokenizer = spiece_tokenizer(name, self.name) if isinstance(name, bytes) else _load(self.name, **kwargs)
        self.vocab_size: int = self.tokenizer.vocab_size

    def __call__(
        self, sequence: str | Sequence[str], **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token numbers [B, S] int64, and with `return_mask=True` also the mask [B, S] (1 = token, 0 = padding).

        S is `seq_len` (longer text is cut), or the length of the one text when `seq_len` is None.
        """
        return_mask = kwargs.pop("return_mask", False)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.seq_len is not None:
            options.update(padding="max_length", truncation=True, max_length=self.seq_len)
        options.update(kwargs)
        texts = [sequence] if isinstance(sequence, str) else list(sequence)
        encoded = self.tokenizer([self._clean(text) for text in texts], **options)
        return (encoded.input_ids, encoded.attention_mask) if return_mask else encoded.input_ids

    def _clean(self, text: str) -> str:
        return _CLEANERS[self.clean](text)


def _load(name: str, **kwargs: Any) -> Any:
    if os.path.isfile(name):
        return _from_file(Path(name))
    # A path is never looked up on the hub: a mistyped folder must fail here at once, not after network timeouts.
    is_folder = os.path.isdir(name)
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise BadCheckpoint(
            f"tokenizer folder {name!r} does not exist; "
            "it is the google/umt5-xxl folder of a Wan checkpoint: download it whole or correct the path."
        )
    from transformers import AutoTokenizer

    spiece = os.path.join(name, "spiece.model")
    if is_folder and os.path.isfile(spiece) and not os.path.isfile(os.path.join(name, "tokenizer.json")):
        return _from_file(Path(spiece))
    if is_folder:
        kwargs.setdefault("local_files_only", True)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadCheckpoint(
            f"no tokenizer can be read from {name!r} ({reason}); it needs tokenizer.json or spiece.model and "
            "tokenizer_config.json, as in the google/umt5-xxl folder of a Wan checkpoint."
        ) from error


def _from_file(path: Path) -> Any:
    """A tokenizer.json or a sentencepiece model, without the files that usually lie beside it."""
    content = path.read_bytes()
    if not content.lstrip().startswith(b"{"):
        return spiece_tokenizer(content, str(path))
    from transformers import PreTrainedTokenizerFast

    try:
        fields = json.loads(content)
    except ValueError as error:
        raise BadCheckpoint(f"{str(path)!r} cannot be read as JSON ({error}); download it again") from error
    if "model" not in fields:
        raise BadCheckpoint(f"{str(path)!r} is no tokenizer: it has no 'model'; pass umt5's tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
