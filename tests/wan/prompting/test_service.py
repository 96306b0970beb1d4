"""DashScope over HTTP, against a server of our own: what is sent, what is tried again, and what becomes of the key."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from wan.engine.errors import BadRequest
from wan.prompting.service import Service
from wan.utils.prompt_extend import DashScopePromptExpander

KEY = "sk-secret-of-the-user"

Reply = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers by `replies`, the last one again and again, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802 - http.server looks it up by this name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        reply = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
        try:
            reply(self)
        except OSError:  # the client has gone, as some tests want it to
            self.close_connection = True

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


def send(status: int, body: bytes | dict[str, Any], **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def said(content: Any, reason: str = "stop") -> Reply:
    message = {"role": "assistant", "content": content}
    return send(200, {"output": {"choices": [{"finish_reason": reason, "message": message}]}, "request_id": "1"})


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def service(server: Server) -> Callable[..., tuple[Service, list[float]]]:
    """A service at that server, and the pauses it makes, which take no time."""

    def build(*replies: Reply, **options: Any) -> tuple[Service, list[float]]:
        server.replies[:] = replies
        pauses: list[float] = []
        options = {"key": KEY, "model": "qwen-plus", "address": server.address, "sleep": pauses.append, **options}
        return Service(**options), pauses

    return build


def test_a_text_is_asked_for_with_key_model_instruction_and_seed(server: Server, service: Any) -> None:
    asked, pauses = service(said("A red fox."))
    assert asked.answer("Write.", "狐狸", [], 2**40 + 7) == "A red fox."
    ((path, headers, body),) = server.requests
    assert path == "/api/v1/services/aigc/text-generation/generation"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert body["model"] == "qwen-plus"
    assert body["input"]["messages"] == [
        {"role": "system", "content": "Write."}, {"role": "user", "content": "狐狸"}
    ]  # fmt: skip
    assert body["parameters"] == {"result_format": "message", "seed": 7, "max_tokens": 512}
    assert pauses == []


def test_pictures_go_with_the_words_to_the_other_address(server: Server, service: Any) -> None:
    asked, _ = service(said([{"text": "A red "}, {"text": "fox."}]), sees=True)
    pictures = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    assert asked.answer("Write.", "a fox", pictures, 1) == "A red fox."
    ((path, _, body),) = server.requests
    assert path == "/api/v1/services/aigc/multimodal-generation/generation"
    system, user = body["input"]["messages"]
    assert system == {"role": "system", "content": [{"text": "Write."}]}
    first, second, words = user["content"]
    assert words == {"text": "a fox"}
    shown = [Image.open(io.BytesIO(base64.b64decode(each["image"].partition(",")[2]))) for each in (first, second)]
    assert [picture.getpixel((0, 0)) for picture in shown] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (send(401, {"code": "Key", "message": "Invalid API-key."}), r"HTTP 401: Invalid API-key\.; check DASH_API_KEY"),
        (send(403, b""), r"HTTP 403; check DASH_API_KEY"),
        (send(400, {"code": "Content", "message": "inappropriate"}), r"HTTP 400: inappropriate$"),
        (send(404, b"<html>"), r"HTTP 404$"),
        (send(302, b"", Location="http://127.0.0.1:9/elsewhere"), r"HTTP 302$"),
        (said("A fox that", "length"), r"did not come to its end within 512 tokens"),
        (send(200, b" " * (2 << 20)), r"sent more than 1 MiB, which is no answer"),
    ],
    ids=["key", "forbidden", "refused", "absent", "elsewhere", "cut off", "endless"],
)  # fmt: skip
def test_what_no_other_try_would_change_is_tried_once(server: Server, service: Any, reply: Reply, says: str) -> None:
    asked, pauses = service(reply)
    with pytest.raises(BadRequest, match=says) as caught:
        asked.answer("Write.", "a fox", [], 1)
    assert len(server.requests) == 1 and pauses == []
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (send(500, {"message": "internal"}), r"HTTP 500: internal \(tried 4 times\)"),
        (send(429, {"message": "Requests throttled"}), r"HTTP 429: Requests throttled \(tried 4 times\)"),
        (send(200, b"<html>a proxy's page</html>"), r"not one of DashScope's \(tried 4 times\)"),
        (send(200, {"output": {"choices": []}}), r"not one of DashScope's"),
        (send(200, {"output": {"choices": [{"message": {"content": None}}]}}), r"not one of DashScope's"),
        (send(200, b"[" * 100_000), r"not one of DashScope's"),
        (send(200, b"\xff\xfe{"), r"not one of DashScope's"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), r"cannot be reached"),
        (lambda handler: handler.connection.close(), r"cannot be reached"),
    ],
    ids=["500", "429", "html", "empty", "null", "deep", "no utf-8", "no http", "closed"],
)
def test_what_may_be_over_soon_is_tried_four_times_with_pauses(
    server: Server, service: Any, reply: Reply, says: str
) -> None:
    asked, pauses = service(reply)
    with pytest.raises(BadRequest, match=says):
        asked.answer("Write.", "a fox", [], 1)
    assert len(server.requests) == 4 and pauses == [1, 2, 4]
    server.requests.clear()
    asked, pauses = service(reply, reply, said("A red fox."))
    assert asked.answer("Write.", "a fox", [], 1) == "A red fox."
    assert pauses == [1, 2]


@pytest.mark.parametrize(("header", "pause"), [("3", 3), ("86400", 10), ("nan", 1), ("-5", 1), ("Wed, 21 Oct", 1)])
def test_the_server_may_ask_for_a_longer_pause_up_to_ten_seconds(service: Any, header: str, pause: float) -> None:
    asked, pauses = service(send(503, b"", Retry_After=header), said("A red fox."))
    assert asked.answer("Write.", "a fox", [], 1) == "A red fox."
    assert pauses == [pause]


@pytest.mark.parametrize("reply", [hang, drip])
def test_a_server_that_does_not_come_to_an_end_is_left(service: Any, reply: Reply) -> None:
    asked, pauses = service(reply, timeout_s=0.2, tries=2)
    since = time.monotonic()
    with pytest.raises(BadRequest, match=r"127\.0\.0\.1:\d+ did not answer within 0\.2 s \(tried 2 times\)"):
        asked.answer("Write.", "a fox", [], 1)
    assert time.monotonic() - since < 1.5 and pauses == [1]


def test_nobody_at_the_address_is_a_reason(service: Any, server: Server) -> None:
    server.server_close()
    asked, pauses = service(said(""), tries=1)
    with pytest.raises(BadRequest, match="cannot be reached"):
        asked.answer("Write.", "a fox", [], 1)


@pytest.mark.parametrize("address", ["http://example.com/api", "file:///etc/passwd", "ftp://x", "dashscope", ""])
def test_the_key_goes_nowhere_unencrypted(address: str) -> None:
    with pytest.raises(BadRequest, match="must begin with https://"):
        Service(key=KEY, model="m", address=address)


@pytest.mark.parametrize("key", ["sk-1\r\nX-Other: 1", "sk-Ключ"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(BadRequest, match="DASH_API_KEY holds characters that no key has") as caught:
        Service(key=key, model="m")
    assert key not in str(caught.value)
    assert KEY not in repr(Service(key=KEY, model="m"))


# Upstream's class ----------------------------------------------------------------------------------------------------


def test_the_expander_reads_upstreams_variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("DASH_API_URL", server.address + "/")
    server.replies[:] = [said('"A red fox."')]
    output = DashScopePromptExpander(task="t2v-14B")("a fox", tar_lang="en", seed=5)
    assert (output.status, output.prompt, output.seed, output.message) == (True, "A red fox.", 5, '"A red fox."')
    path, headers, body = server.requests[0]
    assert path.startswith("/api/v1/services/aigc/text") and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "qwen-plus" and body["input"]["messages"][0]["content"] == output.system_prompt


def test_the_expander_shrinks_pictures_and_keeps_the_prompt_when_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASH_API_URL", server.address)
    server.replies[:] = [said([{"text": "A red fox."}]), send(400, {"message": "no"})]
    extend = DashScopePromptExpander(KEY, task="i2v-14B", is_vl=True)
    assert extend("", image=Image.new("RGB", (2000, 1000)), seed=5).prompt == "A red fox."
    _, _, body = server.requests[0]
    assert body["model"] == "qwen-vl-max"
    shown = body["input"]["messages"][1]["content"][0]["image"].partition(",")[2]
    picture = Image.open(io.BytesIO(base64.b64decode(shown)))
    assert 500_000 / 2 < picture.width * picture.height <= 512 * 512
    output = extend("a fox", seed=5)
    assert not output.status and output.prompt == "a fox" and output.message.endswith("answered HTTP 400: no")


def test_without_a_key_there_is_no_expander(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set the environment variable DASH_API_KEY"):
        DashScopePromptExpander()
