"""The errors a user can meet, in one tree, so that the command line can turn each into one line and an exit code.

The tree, with the exit code of each branch:

    WanError
    ├── BadRequest            what to make is impossible (size, frames, missing prompt ...)         exit 2
    ├── IncompatibleOptions   two options, or an option and this machine, do not go together        exit 2
    │   └── UnsupportedHardware
    ├── MissingPackage        an optional package is needed and absent; names the extra             exit 2
    ├── BadCheckpoint         a file is missing, truncated, of another model, or hostile            exit 2
    ├── OutputError           the video was made but could not be saved as asked                    exit 3
    └── GenerationFailed      sampling or decoding broke; the message says what was kept            exit 4
        └── NonFinite         NaN or infinity in the latents
"""

from __future__ import annotations


class WanError(ValueError):
    """Base of every error meant for a user; the message says what was given, what is allowed and what to do."""

    exit_code = 2


class BadRequest(WanError):
    """What was asked for cannot be made."""


class IncompatibleOptions(WanError):
    """Two options, or an option and this machine, do not go together."""


class UnsupportedHardware(IncompatibleOptions):
    """An option needs hardware this machine lacks."""


class MissingPackage(WanError):
    """An optional package is needed; the message names the extra that installs it."""


class BadCheckpoint(WanError):
    """A checkpoint file is missing, damaged, unsafe, or belongs to another model."""


class OutputError(WanError):
    """The result exists but could not be written as asked."""

    exit_code = 3


class GenerationFailed(WanError):
    """Sampling or decoding failed after work had begun."""

    exit_code = 4


class NonFinite(GenerationFailed):
    """The latents hold NaN or infinity."""
