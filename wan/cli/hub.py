"""`--ckpt_dir owner/name`: the files of a Hugging Face repository that a task needs, in the hub's own cache.

The client lists the repository, caches and links; `wan.cli.transfer` moves the large files, so that an interrupted
download continues in the middle of a file. Names and sizes are compared before the first byte of a weight is asked for.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from wan.cli.transfer import RETRY_WAITS_S, Item, gb, of_gb, transfer, transport_errors
from wan.engine.errors import BadCheckpoint

# Enough to tell the task and the layout: a few kilobytes.
_DESCRIPTIONS = ("config.json", "*_noise_model/config.json", "model_index.json", "transformer*/config.json")

_WEIGHTS = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_DIT = "diffusion_pytorch_model"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")

# Smaller ones are left to the client: one is over before it could be worth continuing.
_LARGE_BYTES = 1 << 20
_SPARE_BYTES = 1 << 28

_LOG = logging.getLogger("wan.cli.hub")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository. `sha256` is known for the large ones only."""

    size: int
    sha256: str | None = None


def named(text: str | None, *, offline: bool = False) -> Repository | None:
    """The repository that `--ckpt_dir` names; None where it names a folder. A folder of that name wins."""
    part = r"[A-Za-z0-9_][\w.-]*"
    if text is None or re.fullmatch(f"{part}/{part}", text, flags=re.ASCII) is None or ".." in text:
        return None
    if Path(text).exists():
        _LOG.info("--ckpt_dir %s is the folder here, not the Hugging Face repository of that name", text)
        return None
    return Repository(name=text, offline=offline)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One model repository. The network is used at the first look at `folder`, and by `download`.

    `endpoint` and `cache` are the client's own (HF_ENDPOINT, HF_HOME) unless given.
    """

    name: str
    offline: bool = False
    endpoint: str | None = None
    cache: Path | None = None
    retry_waits_s: tuple[float, ...] = RETRY_WAITS_S

    @cached_property
    def folder(self) -> Path:
        """Where the client puts the files; those that tell the task are there. Raises BadCheckpoint."""
        from huggingface_hub import snapshot_download

        _quiet()
        try:
            return Path(
                snapshot_download(
                    self.name, allow_patterns=list(_DESCRIPTIONS), local_files_only=self.is_offline, **self._place
                )
            )
        except self._errors as error:
            raise self._absent() if self.is_offline else self._failed(error) from error

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """Name -> file, of the repository; where the hub cannot be asked, of the cache."""
        return self._listing[0]

    @cached_property
    def _listing(self) -> tuple[Mapping[str, RemoteFile], Exception | None]:
        """The files, and why the hub could not be asked for them."""
        folder, silence = self.folder, None
        if not self.is_offline:
            from huggingface_hub import HfApi

            try:
                info = HfApi(endpoint=self.endpoint).model_info(self.name, revision=folder.name, files_metadata=True)
                files = info.siblings or []
                return {f.rfilename: RemoteFile(size=f.size, sha256=f.lfs and f.lfs.sha256) for f in files}, None
            except self._errors as error:
                silence = error
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): RemoteFile(size=path.stat().st_size) for path in paths}, silence

    def check(self, task: str, config: Any) -> None:
        """Raise BadCheckpoint, naming what is missing, unless the repository (offline: the cache) can serve `task`."""
        lacking, silence = needed(self.files, config)[1], self._listing[1]
        if not lacking:
            if silence is not None:
                _LOG.info("%s: %s; the copy in the cache is used", self.name, _why(silence))
            return
        if self.is_offline:
            raise self._absent(f"not all that {task} needs (it lacks {', '.join(lacking)})")
        if silence is not None:
            raise self._failed(silence) from silence
        raise BadCheckpoint(
            f"the Hugging Face repository {self.name!r} lacks what {task} needs: {', '.join(lacking)}; "
            "pass the repository of that task, or the --task of this one"
        )

    def download(self, config: Any) -> None:
        """Complete `folder` for the task of `config`. Raises BadCheckpoint; keeps what came."""
        names = needed(self.files, config)[0]
        missing = [name for name in names if not (self.folder / name).exists()]
        if not missing or self.is_offline:
            return
        large = self._large(missing)
        total = sum(self.files[name].size for name in names)
        have = total - sum(self.files[name].size for name in missing) + sum(item.have for item in large)
        self._check_disk(total - have)
        _LOG.info("%s: %s to come into %s, %s are there", self.name, gb(total - have), self.cache_folder, gb(have))
        try:
            self._fetch(names, large)
        except self._errors as error:
            raise self._failed(error, self._kept(names, large, total)) from error
        except KeyboardInterrupt:
            _LOG.info("%s: %s", self.name, self._kept(names, large, total))
            raise

    @property
    def is_offline(self) -> bool:
        """By the flag, or by HF_HUB_OFFLINE."""
        from huggingface_hub import is_offline_mode

        return self.offline or is_offline_mode()

    @property
    def cache_folder(self) -> Path:
        from huggingface_hub import constants

        return Path(self.cache or constants.HF_HUB_CACHE).expanduser()

    @property
    def _place(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "cache_dir": self.cache}

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        return (*transport_errors(), EntryNotFoundError, HFValidationError)

    def _large(self, names: Iterable[str]) -> list[Item]:
        """The files worth continuing, as the cache stores them: by their hash, linked from the snapshot's folder."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import are_symlinks_supported

        self.cache_folder.mkdir(parents=True, exist_ok=True)
        if not are_symlinks_supported(self.cache_folder):
            return []  # the client would copy each from there: twice the disk
        items = {}
        for name in names:
            file = self.files[name]
            if file.sha256 is not None and file.size >= _LARGE_BYTES:
                url = hf_hub_url(self.name, name, revision=self.folder.name, endpoint=self.endpoint)
                target = self.folder.parents[1] / "blobs" / file.sha256
                items[file.sha256] = Item(url=url, size=file.size, sha256=file.sha256, target=target)
        return list(items.values())

    def _fetch(self, names: Sequence[str], large: Sequence[Item]) -> None:
        from filelock import FileLock, Timeout
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import build_hf_headers

        lock = FileLock(self.folder.parents[1] / "download.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _LOG.info("%s: another process is downloading it; waiting for that one", self.name)
            lock.acquire()
        try:
            transfer(large, self.name, build_hf_headers(), waits_s=self.retry_waits_s)
            patterns = [escape(name) for name in names]
            snapshot_download(self.name, revision=self.folder.name, allow_patterns=patterns, **self._place)
        finally:
            lock.release()

    def _check_disk(self, coming: int) -> None:
        free = shutil.disk_usage(self.cache_folder).free
        if free < coming + _SPARE_BYTES:
            raise BadCheckpoint(
                f"{self.name} needs {gb(coming)} more in {str(self.cache_folder)!r} and {gb(free)} are free: "
                "make room, or set HF_HOME to a folder on a larger disk"
            )

    def _kept(self, names: Iterable[str], large: Iterable[Item], total: int) -> str:
        have = {item.sha256: item.have for item in large}
        done = [f.size if (self.folder / n).exists() else have.get(f.sha256 or "", 0) for n, f in self._of(names)]
        return f"{of_gb(sum(done), total)} are kept in {str(self.cache_folder)!r}; the same command continues there"

    def _of(self, names: Iterable[str]) -> list[tuple[str, RemoteFile]]:
        return [(name, self.files[name]) for name in names]

    def _absent(self, what: str = "nothing") -> BadCheckpoint:
        switch = "--offline" if self.offline else "HF_HUB_OFFLINE=1"
        return BadCheckpoint(
            f"{switch}: the cache {str(self.cache_folder)!r} has {what} of {self.name!r}, and no folder has that "
            f"name: run this command once without {switch}, or: hf download {self.name}"
        )

    def _failed(self, error: Exception, kept: str = "") -> BadCheckpoint:
        return BadCheckpoint(f"--ckpt_dir {self.name}: {_why(error)}" + (f". {kept}" if kept else ""))


def needed(names: Iterable[str], config: Any) -> tuple[list[str], list[str]]:
    """Which of a repository's files the task of `config` needs, and what it needs and the repository lacks.

    In upstream's layout, or in diffusers' where a repository has its model_index.json and not all of upstream's.
    """
    present = sorted(names)
    original = _match(present, _original(config))
    if not original[1] or "model_index.json" not in present:
        return original
    return _match(present, _diffusers(config))


def _original(config: Any) -> dict[str, str]:
    """What to name if it is missing -> regular expression, in upstream's layout."""
    experts = [key for key in ("high_noise_checkpoint", "low_noise_checkpoint") if key in config]
    unused = {*experts, "clip_tokenizer"}  # CLIP's text tower is not used
    wanted = {}
    for folder in [f"{config[key]}/" for key in experts] or [""]:
        wanted[f"{folder}config.json"] = re.escape(f"{folder}config.json")
        wanted[f"{folder}{_DIT}.safetensors"] = re.escape(f"{folder}{_DIT}") + _WEIGHTS
    for key, value in config.items():
        if key.endswith(("_checkpoint", "_tokenizer", "wav2vec")) and key not in unused and isinstance(value, str):
            wanted[value] = re.escape(value) + "(/.+)?"
    return wanted


def _diffusers(config: Any) -> dict[str, str]:
    """The same in diffusers' layout."""
    wanted = {"model_index.json": r"model_index\.json"}
    for folder in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        if folder == "transformer_2" and "boundary" not in config:
            continue
        if folder == "image_encoder" and "clip_checkpoint" not in config:
            continue
        stem = f"{folder}/model" if folder.endswith("_encoder") else f"{folder}/{_DIT}"
        wanted[f"{folder}/config.json"] = re.escape(f"{folder}/config.json")
        wanted[f"{stem}.safetensors"] = re.escape(stem) + _WEIGHTS
    return {**wanted, "tokenizer": "tokenizer/.+"}


def _match(names: Sequence[str], wanted: Mapping[str, str]) -> tuple[list[str], list[str]]:
    files, lacking = [], []
    for label, pattern in wanted.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        files += found
        if not any(not name.endswith(".index.json") for name in found):
            lacking.append(label)
        lacking += _missing_shards(found)
    return files, lacking


def _missing_shards(found: Sequence[str]) -> list[str]:
    series = {(match[1], match[2]) for name in found if (match := _SHARD.fullmatch(name))}
    every = (f"{stem}-{i:05d}-of-{count}.safetensors" for stem, count in series for i in range(1, int(count) + 1))
    return sorted(set(every) - set(found))


def _quiet() -> None:
    """The client draws a bar for every small file and warns of every lost connection in several lines."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()


def _why(error: BaseException) -> str:
    """One clause for a failure of the client, with the remedy where there is one."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"the repository is gated: accept its terms on its page and {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"neither a folder nor a Hugging Face repository has that name; if it is a private one, {login}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        refused = f", so this account may not read it: {login}" if status in (401, 403) else ""
        return f"the hub answered HTTP {status}{refused}"
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            return _why(cause)
        name = f" ({type(cause).__name__})" if cause is not None else ""
        return f"no folder has that name, the hub cannot be reached{name}, and the cache has no copy"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or error}"
    return f"the connection was lost ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
