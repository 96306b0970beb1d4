"""Where finished frames go: a video file, images, or a tensor; and the checks that keep a result from being lost.

Frames stream into ffmpeg as they are decoded, so memory does not grow with length. A file appears under its name only
when it is complete and was read back. Whatever can go wrong with the output is tried by `test_encode` before any
weight is read; what goes wrong later is an OutputError as soon as it shows, and `restart` leaves no remains.
"""

from __future__ import annotations

from wan.video.checks import open_sink, read_metadata, test_encode
from wan.video.encoder import VideoSink
from wan.video.ffmpeg import VideoInfo, verify_video
from wan.video.files import Output, Soundtrack, TensorSink, to_pixels
from wan.video.images import ImageSink, PngSink
from wan.video.names import default_file_name, safe_name
from wan.video.sound import merge_sound

__all__ = [
    "ImageSink",
    "Output",
    "PngSink",
    "Soundtrack",
    "TensorSink",
    "VideoInfo",
    "VideoSink",
    "default_file_name",
    "merge_sound",
    "open_sink",
    "read_metadata",
    "safe_name",
    "test_encode",
    "to_pixels",
    "verify_video",
]
