"""Names of files that every system accepts."""

from __future__ import annotations

import re
import time
import unicodedata

_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_WINDOWS_DEVICES |= {f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"}


def safe_name(text: str, max_bytes: int = 200) -> str:
    """`text` as a file name that Windows, macOS and Linux accept, at most `max_bytes` long in UTF-8."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    # Characters nobody sees (marks that turn the direction of text, joiners) only make two names look alike.
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Co"))
    text = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029]', "_", text)
    text = text.encode("utf-8")[:max_bytes].decode("utf-8", "ignore").strip(" .")
    if text.split(".")[0].strip().upper() in _WINDOWS_DEVICES:
        text = f"_{text}"
    return text or "_"


def default_file_name(
    task: str,
    size: str,
    ulysses_size: int,
    prompt: str,
    *,
    suffix: str = ".mp4",
    ring_size: int | None = None,
    when: time.struct_time | None = None,
) -> str:
    """Upstream's name for a video without --save_file (2.1's form where `ring_size` is given), safe on every system."""
    words = prompt.replace(" ", "_").replace("/", "_")[:50]
    degrees = [str(degree) for degree in (ulysses_size, ring_size) if degree is not None]
    stamp = time.strftime("%Y%m%d_%H%M%S", when or time.localtime())
    return safe_name("_".join([task, size.replace("*", "x"), *degrees, words, stamp]), max_bytes=240) + suffix
