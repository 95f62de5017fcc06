"""The errors a user can cause, each told in one line with its remedy, and their exit codes."""

from __future__ import annotations

import re

_USER = re.compile(r"\b((?!abfss?:)\w[\w+.-]*://)[^\s/@]+@")
_QUERY = re.compile(r"(\w[\w+.-]*://[^\s?'\"]*)\?[^\s'\"]*")


def redacted(text: str) -> str:
    """A URL, or a text with URLs in it, without user, password and query: those may be credentials."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if "://" in text else text


class PermafrostError(Exception):
    """A mistake in what was asked for: a path, an option, a column, a condition."""

    exit_code = 2


class SourceError(PermafrostError):
    """The source cannot be listed: it is missing, empty, or its table or template does not fit."""


class BackboneError(PermafrostError):
    """No such backbone, layer, precision or device, or its weights cannot be had."""


class DataError(PermafrostError):
    """The samples do not carry what training needs: a column, labels, enough members per class."""


class InputError(PermafrostError, ValueError):
    """What a scikit-learn estimator of ours was given: its type, its shape, or an image in it that cannot be used."""


class Refused(PermafrostError):
    """What lies on disk is not what it must be, and going on would mix or run what nobody asked for."""

    exit_code = 5


class StoreError(Refused):
    """The store has a newer format, is no store at all, or lies where it could not be kept safe."""


class ViewMismatch(Refused):
    """A view holds embeddings of another spec than the one asked for."""


class BundleError(Refused):
    """The bundle is incomplete, of a newer format, or holds a type that no bundle of ours holds."""


class TooManyFailures(PermafrostError):
    """More samples failed than `--max-failures` allows; the listing was published all the same."""

    exit_code = 3


class Shrunk(PermafrostError):
    """The listing lost more than half of what its source had, as it does when a disk is not mounted."""

    exit_code = 4


class NonFinite(PermafrostError):
    """The backbone gave a vector with NaN or infinity; nothing of that batch was stored."""

    exit_code = 6


class Drifted(PermafrostError):
    """Images are less like the training set than `--max-drift` allows; the predictions were written all the same."""

    exit_code = 8


class Interrupted(PermafrostError):
    """A run was asked to end early; what it had finished is kept, and nothing was published.

    Parameters
    ----------
    message : str
    exit_code : int
        130 after SIGINT, 143 after SIGTERM, 7 when time was up.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ImageError(Exception):
    """One image that cannot be used; it becomes a row of the listing and never stops a run.

    Parameters
    ----------
    code : str
        A stable reason, one of `features.images.REASONS`.
    detail : str
        What the decoder or the file system said.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
