"""A language model behind DashScope's HTTP interface: one request per try, nothing but the standard library.

Source: the request and answer bodies of DashScope's text-generation and multimodal-generation services.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from wan.engine.errors import BadRequest
from wan.prompting.answers import MAX_TOKENS, unended
from wan.prompting.pictures import data_url

if TYPE_CHECKING:
    from PIL import Image

ADDRESS = "https://dashscope.aliyuncs.com/api/v1"

_TEXT = "/services/aigc/text-generation/generation"
_PICTURES = "/services/aigc/multimodal-generation/generation"
_MAX_BYTES = 1 << 20
_LONGEST_WAIT_S = 10.0
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class _Stay(urllib.request.HTTPRedirectHandler):
    """The key is for this server alone: wherever an answer points, it is not sent there."""

    def redirect_request(self, *args: Any) -> None:
        return None


class _Again(Exception):
    """A failure that may be over soon; `wait_s` is what the server asks for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class Service:
    """One model of the service. `sees`: it takes pictures, which has an address of its own."""

    key: str = field(repr=False)
    model: str
    address: str = ADDRESS
    sees: bool = False
    tries: int = 4
    timeout_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")):
            raise BadRequest(f"DASH_API_URL {self.address!r} must begin with https://, as the key is sent there")
        if not self.key.isascii() or not self.key.isprintable():
            raise BadRequest("DASH_API_KEY holds characters that no key has: copy it again")

    def answer(self, system: str, text: str, pictures: Sequence[Image.Image], seed: int) -> str:
        """What the model writes. Raises BadRequest once all tries failed, or at once for what no try can change."""
        request = self._request(system, text, pictures, seed)
        for attempt in range(1, self.tries + 1):
            try:
                return _text_of(self._sent(request))
            except _Again as error:
                if attempt == self.tries:
                    raise BadRequest(f"{error} (tried {attempt} times)") from error
                self.sleep(min(max(error.wait_s, 2.0 ** (attempt - 1)), _LONGEST_WAIT_S))
        raise AssertionError("there is at least one try")

    def close(self) -> None:
        """Nothing is held between requests."""

    def _request(self, system: str, text: str, pictures: Sequence[Image.Image], seed: int) -> urllib.request.Request:
        said: Any = text
        if self.sees:
            said, system_said = [*({"image": data_url(each)} for each in pictures), {"text": text}], [{"text": system}]
        messages = [
            {"role": "system", "content": system_said if self.sees else system},
            {"role": "user", "content": said},
        ]
        # The service takes seeds of 31 bits.
        parameters = {"result_format": "message", "seed": seed % 2**31, "max_tokens": MAX_TOKENS}
        body = {"model": self.model, "input": {"messages": messages}, "parameters": parameters}
        return urllib.request.Request(
            self.address.rstrip("/") + (_PICTURES if self.sees else _TEXT),
            data=json.dumps(body, ensure_ascii=True).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
            method="POST",
        )

    def _sent(self, request: urllib.request.Request) -> bytes:
        """The body of the answer to one request."""
        end = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(_Stay()).open(request, timeout=self.timeout_s) as response:
                body = bytearray()
                while part := response.read1(65536):
                    body += part
                    if len(body) > _MAX_BYTES:
                        raise BadRequest(f"{self._host} sent more than {_MAX_BYTES >> 20} MiB, which is no answer")
                    if time.monotonic() > end:  # the socket's own limit is for one read, and these may be many
                        raise TimeoutError
                return bytes(body)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _Again(f"{self._host} did not answer within {self.timeout_s:g} s") from error
            raise _Again(f"{self._host} cannot be reached ({reason or type(reason).__name__})") from error

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise for an answer with an error status, in the service's own words where it has some."""
        with error:
            try:
                said = json.loads(error.read(_MAX_BYTES))
                words = f": {said['message']}" if isinstance(said, dict) and said.get("message") else ""
            except (OSError, ValueError, http.client.HTTPException):
                words = ""
        why = f"{self._host} answered HTTP {error.code}{words}"
        if error.code in (401, 403):
            raise BadRequest(f"{why}; check DASH_API_KEY") from error
        if error.code not in _TRY_AGAIN:
            raise BadRequest(why) from error
        raise _Again(why, _seconds(error.headers.get("Retry-After"))) from error

    @property
    def _host(self) -> str:
        return urlsplit(self.address).netloc.rpartition("@")[2]


def _text_of(body: bytes) -> str:
    """The text in an answer's body. A body that is not the service's (a proxy's page) may be another one next time."""
    try:
        choice = json.loads(body)["output"]["choices"][0]
        content = choice["message"]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
        if not isinstance(content, str):
            raise TypeError("no text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Again("the answer is not one of DashScope's") from error
    if choice.get("finish_reason") == "length":
        raise unended()
    return content


def _seconds(text: str | None) -> float:
    """The seconds of a Retry-After; 0 where it has none, or a date."""
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
