"""What must survive when a run of `generate.py` is hit: a row per stage and fault. Tests and the manual read it."""

from __future__ import annotations

from dataclasses import dataclass

CHECK, LOAD, TEXT, HIGH, SWITCH = "check", "load", "encode text", "denoise, high noise", "expert switch"
LOW, LATENTS, DECODE, ENCODE = "denoise, low noise", "latents kept", "decode", "encode video"
VERIFY, RENAME, SIDECAR, CLEANUP = "verify", "rename", "sidecar", "clean up"
STAGES = (CHECK, LOAD, TEXT, HIGH, SWITCH, LOW, LATENTS, DECODE, ENCODE, VERIFY, RENAME, SIDECAR, CLEANUP)

NOTHING, RECORD, STATE, KEPT = "nothing", "settings", "state", "latents"
FRAMES, WHOLE, ASIDE = "latents, frames as PNG", "latents, the video as .part", "state, latents in the temporary folder"
VIDEO, VIDEO_AND_KEPT, VIDEO_AND_LATENTS = "the video", "the video, latents", "the video, its latents beside it"
UNTOLD, UNTOLD_AND_KEPT = "the video without sidecar", "the video without sidecar, latents"
VIDEO_AND_RUN = "the video, its latents in the run's folder"

RESUME, DECODES, AGAIN, DONE = "--resume", "--decode", "the same command", ""


@dataclass(frozen=True)
class Row:
    """A fault (`inject`, `ffmpeg`, `damage`: see faults.py and test_faults.py) and what must come of it.

    `status` is the exit status, negative for a signal nobody can answer. `go_on` is how the same video comes of it;
    `says` stands in the last line on standard error. A row makes one image where it needs no video.
    """

    stage: str
    fault: str
    inject: str
    status: int
    kept: str
    go_on: str
    says: str = ""
    flags: str = ""
    ffmpeg: str = ""
    damage: str = ""
    video: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}: {self.fault}".replace(" ", "-")


KILLED, TERM, HUP, INT = -9, 143, 129, 130
_INT, _TERM, _HUP = "interrupted$", "stopped by SIGTERM$", "stopped by SIGHUP$"
_ON = "continue with --resume 'clip"
_OOM = r"out of memory during '{}': try .*fewer --frame_num"


def _ended(stage: str, place: str, kept: str, go_on: str, *, killed: str = RECORD, video: bool = False) -> list[Row]:
    """The three ways to end a process, at one place. `killed` is what `kill -9` leaves."""
    return [
        Row(stage, "kill -9", f"{place} kill", KILLED, killed, RESUME, video=video),
        Row(stage, "Ctrl-C", f"{place} ctrl-c", INT, kept, go_on, _INT, video=video),
        Row(stage, "SIGTERM", f"{place} term", TERM, kept, go_on, _TERM, video=video),
    ]


# fmt: off
ROWS = (
    # Nothing has been read but headers: one line, and nothing is left.
    Row(CHECK, "unknown flag", "", 2, NOTHING, AGAIN, "unknown flag --sieze", "--sieze 1"),
    Row(CHECK, "value out of range", "", 2, NOTHING, AGAIN, "--timeout_s 0", "--timeout_s 0"),
    Row(CHECK, "read-only folder", "mkdir:out read-only", 2, NOTHING, AGAIN,
        "--save_file: .*Read-only file system", "--save_file out/clip.png"),
    Row(CHECK, "read-only file system", "open:1:clip.png.part read-only", 2, NOTHING, AGAIN,
        "--save_file: .*Read-only file system"),
    Row(CHECK, "read-only run folder", "write:run.json read-only", 2, NOTHING, AGAIN,
        "--save_file: cannot write 'clip.*Read-only file system"),
    Row(CHECK, "full disk", "disk: full", 2, NOTHING, AGAIN, "--save_file: .* 0 MiB free"),
    Row(CHECK, "no ffmpeg", "", 2, NOTHING, AGAIN, "ffmpeg", ffmpeg="missing", video=True),
    Row(CHECK, "ffmpeg crashes", "", 2, NOTHING, AGAIN, "--save_file: .*Conversion failed", ffmpeg="broken",
        video=True),
    Row(CHECK, "truncated VAE", "", 2, NOTHING, AGAIN, "Wan2.1_VAE.pth", damage="truncated Wan2.1_VAE.pth"),
    Row(CHECK, "truncated transformer", "", 2, NOTHING, AGAIN, "low_noise_model",
        damage="truncated low_noise_model/diffusion_pytorch_model.safetensors"),
    Row(CHECK, "missing transformer", "", 2, NOTHING, AGAIN, "low_noise_model",
        damage="removed low_noise_model/diffusion_pytorch_model.safetensors"),
    Row(CHECK, "kill -9", "verify:1 kill", KILLED, NOTHING, AGAIN, video=True),
    Row(CHECK, "Ctrl-C", "verify:1 ctrl-c", INT, NOTHING, AGAIN, _INT, video=True),
    Row(CHECK, "SIGTERM", "verify:1 term", TERM, NOTHING, AGAIN, _TERM, video=True),

    *_ended(LOAD, "stage:load-high", NOTHING, AGAIN),
    Row(LOAD, "out of GPU memory", "stage:load-high oom", 4, NOTHING, AGAIN, _OOM.format("load high")),
    Row(LOAD, "out of RAM", "stage:load-high ram", 4, NOTHING, AGAIN, _OOM.format("load high")),
    Row(LOAD, "NaN in the weights", "", 4, NOTHING, AGAIN,
        "NaN or infinity after step 1 of 8.*damaged or wrong checkpoint",
        damage="nan high_noise_model/diffusion_pytorch_model.safetensors"),

    *_ended(TEXT, "stage:encode-with-text_encoder", NOTHING, AGAIN),
    Row(TEXT, "out of memory", "stage:encode-with-text_encoder oom", 4, NOTHING, AGAIN,
        _OOM.format("encode with text_encoder")),

    *_ended(HIGH, "step:3", STATE, RESUME, killed=STATE),
    Row(HIGH, "kill -9 before state was kept", "step:1 kill", KILLED, RECORD, RESUME),
    Row(HIGH, "Ctrl-C in the first steps", "step:1 ctrl-c", INT, STATE, RESUME, _INT),
    Row(HIGH, "Ctrl-C twice", "step:3 ctrl-c; restart ctrl-c", INT, STATE, RESUME, _INT),
    Row(HIGH, "terminal closed", "step:3 hangup", HUP, STATE, RESUME, _HUP),
    Row(HIGH, "out of GPU memory", "network:4 oom", 4, STATE, RESUME, _OOM.format("denoise") + ".*" + _ON),
    Row(HIGH, "out of GPU memory, blocks swapped", "network:4 oom", 4, STATE, RESUME,
        _OOM.format("denoise") + ".*" + _ON, "--block_swap 2"),
    Row(HIGH, "out of RAM", "network:4 ram", 4, STATE, RESUME, _OOM.format("denoise") + ".*" + _ON),
    Row(HIGH, "NaN", "network:4 nan", 4, STATE, RESUME, "NaN or infinity after step 4 of 8.*" + _ON),
    Row(HIGH, "timeout", "step:3 late", 4, STATE, RESUME, "the time was up at step 3 of 8; " + _ON,
        "--timeout_s 3000"),
    Row(HIGH, "log on a full disk", "log: full always", 0, VIDEO, DONE),
    Row(HIGH, "full disk", "write:state.safetensors full always", 0, VIDEO, DONE),
    Row(HIGH, "run folder read-only", "write:state.safetensors read-only always; step:5 ctrl-c", INT, NOTHING,
        AGAIN, _INT),
    Row(HIGH, "kill -9 while state is written", "write:state.safetensors kill", KILLED, RECORD, RESUME),
    Row(HIGH, "Ctrl-C while state is written", "write:state.safetensors ctrl-c", INT, STATE, RESUME, _INT),
    Row(HIGH, "state truncated", "step:3 kill", 2, STATE, RESUME, "cannot be read",
        damage="truncated clip.png.run/state.safetensors"),
    Row(HIGH, "a bit of the state flipped", "step:3 kill", 2, STATE, RESUME, "its checksum is another",
        damage="flipped clip.png.run/state.safetensors"),
    Row(HIGH, "settings truncated", "step:3 kill", 0, VIDEO, DONE,
        damage="truncated clip.png.run/run.json"),

    *_ended(SWITCH, "stage:load-low", STATE, RESUME, killed=STATE),
    Row(SWITCH, "out of memory", "stage:load-low oom", 4, STATE, RESUME, _OOM.format("load low") + ".*" + _ON),
    Row(SWITCH, "full disk", "write:switch-0.safetensors full", 0, VIDEO_AND_LATENTS, DONE, "", "--keep_latents"),

    *_ended(LOW, "step:7", STATE, RESUME, killed=STATE),
    Row(LOW, "out of memory", "network:8 oom", 4, STATE, RESUME, _OOM.format("denoise") + ".*" + _ON),
    Row(LOW, "NaN", "network:8 nan", 4, STATE, RESUME, "NaN or infinity after step 8 of 8.*" + _ON),
    Row(LOW, "forwards missing", "uncounted:8 bug", 4, KEPT, RESUME,
        "1 forwards of expert 'low' for branch .* plan has 2.*" + _ON),
    Row(LOW, "timeout", "step:7 late", 4, STATE, RESUME, "the time was up at step 7 of 8; " + _ON,
        "--timeout_s 3000"),

    Row(LATENTS, "kill -9 while they are written", "write:latents-0.safetensors kill", KILLED, STATE, RESUME),
    Row(LATENTS, "Ctrl-C while they are written", "write:latents-0.safetensors ctrl-c", INT, STATE, RESUME, _INT),
    Row(LATENTS, "full disk", "write:latents-0.safetensors full", 0, VIDEO, DONE),
    Row(LATENTS, "full disk, then Ctrl-C", "write:latents-0.safetensors full; stage:decode ctrl-c", INT, ASIDE,
        DECODES, _INT),
    Row(LATENTS, "full disk, then no encoder", "write:latents-0.safetensors full; disk:decode full", 3, ASIDE,
        DECODES, "the disk is full.*nor its frames as PNG.*with --decode", video=True),
    Row(LATENTS, "truncated", "stage:decode kill", 2, KEPT, RESUME, "cannot be read",
        damage="truncated clip.png.run/latents-0.safetensors"),
    Row(LATENTS, "a bit flipped", "stage:decode kill", 2, KEPT, RESUME, "its checksum is another",
        damage="flipped clip.png.run/latents-0.safetensors"),

    *_ended(DECODE, "chunk:2", KEPT, RESUME, killed=KEPT, video=True),
    Row(DECODE, "Ctrl-C while the VAE is loaded", "stage:load-vae ctrl-c", INT, KEPT, RESUME, _INT),
    Row(DECODE, "out of memory once", "chunk:1 oom", 0, VIDEO, DONE),
    Row(DECODE, "out of memory whatever is tried", "chunk:1 oom always", 4, KEPT, RESUME,
        _OOM.format("decode") + ".*" + _ON),
    Row(DECODE, "out of memory while the VAE is loaded", "stage:load-vae oom always", 4, KEPT, RESUME,
        _OOM.format("load vae") + ".*" + _ON),
    Row(DECODE, "NaN in the frames", "chunk:1 nan", 4, KEPT, RESUME, "frames from 1 on hold NaN.*" + _ON),
    Row(DECODE, "timeout", "chunk:2 late", 4, KEPT, RESUME, "the time was up at decoding; " + _ON, "--timeout_s 3000",
        video=True),

    Row(ENCODE, "ffmpeg crashes at its start", "", 3, FRAMES, DECODES, "Conversion failed.*All frames are in",
        ffmpeg="dies", video=True),
    Row(ENCODE, "ffmpeg crashes on the way", "", 3, FRAMES, DECODES, "Conversion failed.*All frames are in",
        ffmpeg="dies later", video=True),
    Row(ENCODE, "ffmpeg is killed", "", 3, FRAMES, DECODES, "signal 9.*All frames are in", ffmpeg="killed",
        video=True),
    Row(ENCODE, "ffmpeg has gone", "", 3, FRAMES, DECODES, "ffmpeg does not start.*All frames are in",
        ffmpeg="vanishes", video=True),
    Row(ENCODE, "ffmpeg writes garbage", "", 3, FRAMES, DECODES, "cannot be played.*All frames are in",
        ffmpeg="garbage", video=True),
    Row(ENCODE, "ffmpeg drops frames", "", 3, FRAMES, DECODES, "holds 2 frames.*instead of 5.*All frames are in",
        ffmpeg="drops", video=True),
    Row(ENCODE, "full disk", "disk:decode full", 3, KEPT, DECODES, "the disk is full.*nor its frames as PNG",
        video=True),
    Row(ENCODE, "full disk under an image", "open:2:clip.png.part full", 3, FRAMES, DECODES,
        "the disk is full.*All frames are in"),
    *_ended(ENCODE, "frames:2", KEPT, RESUME, killed=KEPT, video=True),
    Row(ENCODE, "Ctrl-C while the frames are rescued", "mkdir:clip_frames.part ctrl-c", 3, KEPT, DECODES,
        "Conversion failed.*interrupted.*with --decode", ffmpeg="dies", video=True),

    *_ended(VERIFY, "verify:2", KEPT, RESUME, killed=KEPT, video=True),
    Row(VERIFY, "the file cannot be read back", "", 3, FRAMES, DECODES, "cannot be played.*All frames are in",
        ffmpeg="unreadable", video=True),

    Row(RENAME, "kill -9", "rename:clip.png kill", KILLED, KEPT, RESUME),
    Row(RENAME, "Ctrl-C", "rename:clip.png ctrl-c", INT, VIDEO, DONE, _INT),
    Row(RENAME, "SIGTERM", "rename:clip.png term", TERM, VIDEO, DONE, _TERM),
    Row(RENAME, "the old file is in use", "rename:clip.png in-use", 3, WHOLE, RESUME,
        "the finished video stays under the first name.*" + _ON),

    Row(SIDECAR, "kill -9", "write:clip.png.json kill", KILLED, UNTOLD_AND_KEPT, RESUME),
    Row(SIDECAR, "Ctrl-C", "write:clip.png.json ctrl-c", INT, VIDEO, DONE, _INT),
    Row(SIDECAR, "full disk", "write:clip.png.json full", 0, UNTOLD, DONE),
    Row(SIDECAR, "read-only", "write:clip.png.json read-only", 0, UNTOLD, DONE),

    Row(CLEANUP, "kill -9", "rmtree kill", KILLED, VIDEO_AND_KEPT, RESUME),
    Row(CLEANUP, "Ctrl-C", "rmtree ctrl-c", INT, VIDEO, DONE, _INT),
    Row(CLEANUP, "kept latents cannot be moved", "rename:clip.latents.safetensors in-use", 0, VIDEO_AND_RUN, DONE, "",
        "--keep_latents"),
)
# fmt: on


def matrix() -> list[tuple[str, str, str, str, str]]:
    """(stage, fault, status, what is kept, how to go on) for readers."""
    rows = []
    for row in ROWS:
        go_on = f"`{row.go_on}`" if row.go_on.startswith("-") else row.go_on or "-"
        if row.status == 2 and ".run" in row.damage:
            go_on += ", without that file"
        rows.append((row.stage, row.fault, str(row.status) if row.status >= 0 else "-", row.kept, go_on))
    return rows
