"""Checkpoints by Hugging Face name, through the real client, against a hub on this machine that can lose connections.

No test leaves the machine: the only repository is one of a local server, its large files three megabytes of noise.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

from wan.cli import transfer
from wan.cli.generate import main
from wan.cli.hub import Repository, named, needed
from wan.configs import WAN_CONFIGS
from wan.engine.errors import BadCheckpoint

# The hub --------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The repository `name` with `files`; every attribute may be changed while it serves."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.name = name
        self.files = dict(files)
        self.url = ""
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, path within the repository or the api, Range header) of every request."""
        self.drop_after: dict[str, list[int]] = {}
        """File -> for each of the next downloads the number of bytes after which the connection is cut."""
        self.damaged: dict[str, int] = {}
        """File -> how many of the next downloads send other bytes."""
        self.refuse: dict[str, tuple[int, str]] = {}
        """Start of a path within the repository ('' for all) -> (status, X-Error-Code)."""

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {path for method, path, _ in self.requests if method == "GET" and path in self.files}

    def ranges(self, name: str) -> list[str | None]:
        return [asked for method, path, asked in self.requests if method == "GET" and path == name]

    def rows(self) -> list[dict[str, Any]]:
        """The files as the hub's JSON describes them; above 64 kB they are kept by their SHA-256."""
        rows = []
        for path, content in self.files.items():
            row = {"type": "file", "path": path, "rfilename": path, "size": len(content)}
            row |= {"oid": git_id(content), "blobId": git_id(content)}
            if is_large(content):
                sha256 = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
            rows.append(row)
        return rows


def is_large(content: bytes) -> bool:
    return len(content) > 65536


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port; `hub.url` is the endpoint."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Tests read `requests` instead."""

    def do_HEAD(self) -> None:  # noqa: N802 (the name the base class calls)
        self._answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.state
        url = urlsplit(self.path)
        path = (
            unquote(url.path).removeprefix(f"/{hub.name}/resolve/{COMMIT}/").removeprefix(f"/{hub.name}/resolve/main/")
        )
        hub.requests.append((self.command, path, self.headers.get("Range")))
        for start, (status, code) in hub.refuse.items():
            if path.startswith(start):
                return self._json({}, status, {"X-Error-Code": code} if code else {})
        if path in hub.files:
            return self._file(path, body)
        if re.fullmatch(rf"/api/models/{hub.name}(/revision/\w+)?", path):
            whole = {"id": hub.name, "sha": COMMIT, "siblings": hub.rows()}
            names = {**whole, "siblings": [{"rfilename": name} for name in hub.files]}
            return self._json(whole if "blobs" in parse_qs(url.query) else names)
        if path == f"/api/models/{hub.name}/tree/{COMMIT}":
            return self._json(hub.rows())
        return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(text)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(text)

    def _file(self, name: str, body: bool) -> None:
        hub, content = self.state, self.state.files[name]
        sha256 = hashlib.sha256(content).hexdigest() if is_large(content) else git_id(content)
        headers = {"ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if asked := self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if asked else 200, {**headers, "Content-Length": str(len(content) - start)})
        if not body:
            return
        if hub.damaged.get(name, 0):
            hub.damaged[name] -= 1
            content = bytes(len(content))
        drops = hub.drop_after.get(name, [])
        if drops:
            self.wfile.write(content[start : start + drops.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(content[start:])

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


# A repository ---------------------------------------------------------------------------------------------------------

NAME = "Wan-AI/Wan2.2-T2V-A14B"
CONFIG = WAN_CONFIGS["t2v-A14B"]
TWO = ("high_noise_model", "low_noise_model")
DIT = "diffusion_pytorch_model"
BIG = f"{TWO[0]}/{DIT}-00002-of-00002.safetensors"


def noise(seed: str, size: int = 3 << 20) -> bytes:
    return random.Random(seed).randbytes(size)


def published() -> dict[str, bytes]:
    """A repository as published: what the task needs in small, and what it does not need; no two files are equal."""
    files = {"README.md": b"#", "assets/demo.mp4": noise("demo", 100), "nohup.out": b"x"}
    for folder in TWO:
        files[f"{folder}/config.json"] = json.dumps({"model_type": "t2v", "dim": 5120, "of": folder}).encode()
        shards = [f"{DIT}-{i:05d}-of-00002.safetensors" for i in (1, 2)]
        files |= {f"{folder}/{shard}": noise(folder + shard, 1000) for shard in shards}
        index = {"weight_map": dict(zip("ab", shards, strict=True)), "of": folder}
        files[f"{folder}/{DIT}.safetensors.index.json"] = json.dumps(index).encode()
        files[f"{folder}/{DIT}.fp16.safetensors"] = b"another variant"
    files[BIG] = noise("big")
    files |= {"models_t5_umt5-xxl-enc-bf16.pth": noise("t5"), "Wan2.1_VAE.pth": noise("vae", 1000)}
    return files | {f"google/umt5-xxl/{name}": name.encode() for name in ("tokenizer.json", "tokenizer_config.json")}


UNNEEDED = {"README.md", "assets/demo.mp4", "nohup.out", *(f"{folder}/{DIT}.fp16.safetensors" for folder in TWO)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, and a client that neither waits nor is offline and keeps its cache in this test's folder."""
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving(Hub(NAME, published())) as state:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
        template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield state
        huggingface_hub.close_session()


def repository(hub: Hub, **changes: Any) -> Repository:
    waits = {"retry_waits_s": (0.0, 0.0)}
    return Repository(**{"name": hub.name, "endpoint": hub.url, **waits, **changes})


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.part"))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Wan-AI/Wan2.2-T2V-A14B", "a/b", "Some_One/model.v2"])
def test_owner_and_name_are_a_repository(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = named(text)
    assert found is not None and found.name == text


@pytest.mark.parametrize(
    "text", [None, "", "folder", "./a/b", "../a", "a/b/c", "/a/b", "a/../b", "~/models", "a b/c", "a\\b", "é/b", "a/"]
)
def test_everything_else_is_a_folder(text: str | None) -> None:
    assert named(text) is None


def test_a_folder_of_that_name_wins_and_the_log_says_so(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    Path(NAME).mkdir(parents=True)
    with caplog.at_level(logging.INFO, "wan"):
        assert main(["--ckpt_dir", NAME, "--task", "t2v-A14B"]) == 2
    assert hub.requests == [] and "is the folder here, not the Hugging Face repository" in caplog.text


# What is fetched ------------------------------------------------------------------------------------------------------


def test_only_what_the_task_needs_is_asked_for(hub: Hub) -> None:
    wanted = repository(hub)
    wanted.check("t2v-A14B", CONFIG)
    assert hub.fetched() == {f"{folder}/config.json" for folder in TWO}, "before the download only what tells the task"
    wanted.download(CONFIG)
    assert hub.fetched() == set(hub.files) - UNNEEDED
    assert held(wanted.folder) == {name: hub.files[name] for name in set(hub.files) - UNNEEDED}


def test_a_second_download_asks_for_no_file(hub: Hub) -> None:
    repository(hub).download(CONFIG)
    hub.requests.clear()
    again = repository(hub)
    again.check("t2v-A14B", CONFIG)
    again.download(CONFIG)
    assert hub.fetched() == set()


def test_diffusers_layout_is_chosen_where_there_is_no_other() -> None:
    wanted = ["model_index.json", "tokenizer/tokenizer.json", "vae/config.json", f"vae/{DIT}.safetensors"]
    wanted += ["text_encoder/config.json", "text_encoder/model.safetensors.index.json"]
    wanted += [f"text_encoder/model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for folder in ("transformer", "transformer_2"):
        wanted += [f"{folder}/config.json", f"{folder}/{DIT}.safetensors"]
    others = ["README.md", "scheduler/scheduler_config.json", "assets/a.png", "vae/diffusion_pytorch_model.bin"]
    assert needed([*wanted, *others], CONFIG) == (sorted_as(wanted, needed(wanted, CONFIG)[0]), [])
    assert needed(set(wanted) - {"text_encoder/model-00002-of-00003.safetensors"}, CONFIG)[1] == [
        "text_encoder/model-00002-of-00003.safetensors"
    ]
    one = needed(wanted, WAN_CONFIGS["t2v-1.3B"])
    assert one[1] == [] and not [name for name in one[0] if name.startswith("transformer_2")]


def test_clip_is_fetched_for_tasks_that_look_through_it_and_its_text_tower_is_not() -> None:
    clip = WAN_CONFIGS["i2v-14B"].clip_checkpoint
    names = ["config.json", f"{DIT}.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", clip]
    names += ["google/umt5-xxl/tokenizer.json", "xlm-roberta-large/tokenizer.json"]
    files, lacking = needed(names, WAN_CONFIGS["i2v-14B"])
    assert lacking == [] and set(names) - set(files) == {"xlm-roberta-large/tokenizer.json"}
    assert needed(set(names) - {clip}, WAN_CONFIGS["flf2v-14B"])[1] == [clip]
    assert clip not in needed(names, WAN_CONFIGS["t2v-14B"])[0]
    library = ["model_index.json", "tokenizer/tokenizer.json", "image_encoder/config.json"]
    library += ["image_encoder/model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"]
    library += [
        f"{folder}/{name}" for folder in ("transformer", "vae") for name in ("config.json", f"{DIT}.safetensors")
    ]
    assert needed(library, WAN_CONFIGS["i2v-14B"]) == (
        sorted_as(library, needed(library, WAN_CONFIGS["i2v-14B"])[0]),
        [],
    )
    assert "image_encoder/model.safetensors" not in needed(library, WAN_CONFIGS["t2v-14B"])[0]


def sorted_as(names: list[str], order: list[str]) -> list[str]:
    return sorted(names, key=order.index)


@pytest.mark.parametrize("missing", ["Wan2.1_VAE.pth", f"{TWO[1]}/config.json", BIG, "google/umt5-xxl/"])
def test_a_repository_that_lacks_something_is_refused_before_any_weight(hub: Hub, missing: str) -> None:
    hub.files = {name: content for name, content in hub.files.items() if not name.startswith(missing)}
    with pytest.raises(BadCheckpoint, match=f"lacks what t2v-A14B needs: {re.escape(missing.rstrip('/'))}"):
        repository(hub).check("t2v-A14B", CONFIG)
    assert all(name.endswith("config.json") for name in hub.fetched())


def test_too_little_disk_is_said_before_the_first_weight(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(
        BadCheckpoint, match=r"needs 6\.3 MB more in .* and 1\.0 MB are free: make room, or set HF_HOME"
    ):
        repository(hub).download(CONFIG)
    assert all(name.endswith("config.json") for name in hub.fetched())


# Lost connections -----------------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_a_connection_lost_in_the_middle_of_a_file_is_resumed_there(hub: Hub) -> None:
    hub.drop_after[BIG] = [MIB + 5000, MIB + 7]
    wanted = repository(hub)
    wanted.download(CONFIG)
    assert hub.ranges(BIG) == [None, f"bytes={MIB}-", f"bytes={2 * MIB}-"]
    assert held(wanted.folder)[BIG] == hub.files[BIG]


def test_a_lost_download_says_what_is_kept_and_the_same_call_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.drop_after[BIG] = [2 * MIB + 1, *[0] * 40]
    with pytest.raises(BadCheckpoint) as lost:
        repository(hub).download(CONFIG)
    said = str(lost.value)
    assert re.search(rf"--ckpt_dir {NAME}: the connection was lost .*\. \d\.\d of 6\.3 MB are kept in '", said), said
    assert said.endswith("the same command continues there") and "\n" not in said
    [part] = parts(tmp_path)
    assert part.read_bytes() == hub.files[BIG][: 2 * MIB]
    hub.drop_after.clear()
    hub.requests.clear()
    wanted = repository(hub)
    wanted.download(CONFIG)
    assert hub.ranges(BIG) == [f"bytes={2 * MIB}-"] and hub.ranges("Wan2.1_VAE.pth") == [None]
    assert held(wanted.folder)[BIG] == hub.files[BIG] and parts(tmp_path) == []


def test_what_arrives_damaged_is_fetched_anew_and_never_kept(hub: Hub, tmp_path: Path) -> None:
    hub.damaged[BIG] = 1
    wanted = repository(hub)
    wanted.download(CONFIG)
    assert held(wanted.folder)[BIG] == hub.files[BIG] and hub.ranges(BIG) == [None, None]
    other = repository(hub, cache=tmp_path / "cache" / "other")
    hub.damaged[BIG] = 99
    with pytest.raises(BadCheckpoint, match="arrived damaged"):
        other.download(CONFIG)
    assert not (other.folder / BIG).exists() and parts(tmp_path) == []


def test_ctrl_c_keeps_what_came(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.drop_after[BIG] = [2 * MIB, *[0] * 40]
    interrupted = repository(hub, retry_waits_s=(30.0,) * 9)
    part = interrupted.folder.parents[1] / "blobs" / f"{hashlib.sha256(hub.files[BIG]).hexdigest()}.part"

    def interrupt(self: transfer.Meter) -> None:
        if part.exists() and part.stat().st_size >= 2 * MIB:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer.Meter, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted.download(CONFIG)
    assert part.read_bytes() == hub.files[BIG][: 2 * MIB]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "RepoNotFound", r"neither a folder nor a Hugging Face repository.*`hf auth login`"),
        (401, "", r"HTTP 401, so this account may not read it: log in"),
        (404, "RepoNotFound", r"neither a folder nor a Hugging Face repository has that name"),
        (403, "GatedRepo", r"is gated: accept its terms on its page and log in with `hf auth login`"),
        (403, "", r"HTTP 403, so this account may not read it: log in"),
        (500, "", r"the hub answered HTTP 500"),
    ],
)
def test_a_refusal_is_one_line_with_status_2(hub: Hub, status: int, code: str, says: str, capsys: Any) -> None:
    hub.refuse[""] = (status, code)
    assert main(["--ckpt_dir", NAME]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: --ckpt_dir {NAME}: [^\n]*\n", err) and re.search(says, err), err


@pytest.mark.parametrize(("status", "code"), [(403, "GatedRepo"), (404, "EntryNotFound"), (503, "")])
def test_a_refused_file_keeps_what_came_of_the_others(hub: Hub, tmp_path: Path, status: int, code: str) -> None:
    hub.refuse[BIG] = (status, code)
    with pytest.raises(BadCheckpoint, match="are kept in .*; the same command continues there"):
        repository(hub).download(CONFIG)
    t5 = "models_t5_umt5-xxl-enc-bf16.pth"
    blob = f"blobs/{hashlib.sha256(hub.files[t5]).hexdigest()}"
    whole = list((tmp_path / "cache").glob(f"*/{blob}"))
    part = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"*/{blob}.part"))
    hub.refuse.clear()
    hub.requests.clear()
    wanted = repository(hub)
    wanted.download(CONFIG)
    assert hub.ranges(BIG) == [None] and held(wanted.folder)[t5] == hub.files[t5]
    asked = [f"bytes={part}-"] if 0 < part < len(hub.files[t5]) else [] if part else [None]
    assert hub.ranges(t5) == ([] if whole else asked)


def test_a_bad_request_downloads_nothing(hub: Hub, capsys: Any) -> None:
    bad: list[list[str]] = [["--size", "1000x600"], ["--save_file", "a.avi"], ["--preset", "none.toml"]]
    for flags in bad:
        hub.requests.clear()
        assert main(["--ckpt_dir", NAME, *flags]) == 2
        assert hub.fetched() <= {f"{folder}/config.json" for folder in TWO}
    assert main(["--ckpt_dir", NAME, "--print_plan", "--device", "cpu"]) == 0
    assert f"t2v-A14B (read from --ckpt_dir) from {NAME}" in capsys.readouterr().err
    assert hub.fetched() <= {f"{folder}/config.json" for folder in TWO}


# Offline --------------------------------------------------------------------------------------------------------------


def test_offline_uses_the_cache_and_asks_nobody(hub: Hub) -> None:
    online = repository(hub)
    online.download(CONFIG)
    hub.requests.clear()
    alone = repository(hub, offline=True)
    alone.check("t2v-A14B", CONFIG)
    alone.download(CONFIG)
    assert alone.folder == online.folder and hub.requests == []


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_offline_without_a_copy_says_which_command_to_run(
    by: str, hub: Hub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", by == "variable")
    switch = "--offline" if by == "flag" else "HF_HUB_OFFLINE=1"
    argv = ["--ckpt_dir", NAME, *(["--offline"] if by == "flag" else [])]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: {switch}: the cache '.*' has nothing of '{NAME}'.*run.*: hf download {NAME}\n", err
    ), err
    assert hub.requests == []


def test_offline_with_half_a_copy_names_what_is_missing(hub: Hub) -> None:
    hub.refuse["Wan2.1_VAE.pth"] = (404, "EntryNotFound")
    with pytest.raises(BadCheckpoint):
        repository(hub).download(CONFIG)
    with pytest.raises(BadCheckpoint, match=r"has not all that t2v-A14B needs \(it lacks .*Wan2\.1_VAE\.pth"):
        repository(hub, offline=True).check("t2v-A14B", CONFIG)


def test_a_hub_that_is_away_is_replaced_by_a_complete_copy(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    repository(hub).download(CONFIG)
    hub.refuse[""] = (503, "")
    again = repository(hub)
    with caplog.at_level(logging.INFO, "wan"):
        again.check("t2v-A14B", CONFIG)
        again.download(CONFIG)
    assert "the hub answered HTTP 503; the copy in the cache is used" in caplog.text


# The whole program ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_video_from_a_repository_by_name_in_a_process_of_its_own(hub: Hub, root: Path, tmp_path: Path) -> None:
    demo = root / "demo"
    if not (demo / "high_noise_model" / "config.json").is_file():
        pytest.skip("the demo model is not there yet")
    hub.files = {"README.md": b"#"} | {
        path.relative_to(demo).as_posix(): path.read_bytes()
        for path in demo.rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    expert = f"{TWO[1]}/{DIT}.safetensors"
    hub.drop_after[expert] = [2 * MIB]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, str(root / "generate.py"), "--ckpt_dir", NAME, "--device", "cpu", "--seed", "3"]
    argv += ["--sample_steps", "1", "--frame_num", "1", "--save_file", "a.png"]
    run = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"t2v-demo (read from --ckpt_dir) from {NAME}" in run.stderr and run.stdout == "a.png\n"
    assert len(hub.ranges(expert)) == 2 and "README.md" not in hub.fetched()


def test_progress_tells_how_much_how_fast_how_long(caplog: pytest.LogCaptureFixture) -> None:
    have, now = [0], [0.0]
    meter = transfer.Meter("x/y", lambda: have[0], 20 * 10**9, io.StringIO(), clock=lambda: now[0])
    with caplog.at_level(logging.INFO, "wan"):
        for gigabytes in (1, 2, 3, 4, 20):
            have[0], now[0] = gigabytes * 10**9, gigabytes * 10.0
            meter.show()
    assert [record.message for record in caplog.records] == [
        "x/y: 2.0 of 20.0 GB (10 %), 100.0 MB/s, 3:00 left",
        "x/y: 4.0 of 20.0 GB (20 %), 100.0 MB/s, 2:40 left",
        "x/y: 20.0 of 20.0 GB (100 %), 100.0 MB/s",
    ]
