"""A path or an fsspec URL: which version lies there, its bytes, and how it may be shown."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote_to_bytes

import fsspec
import pyarrow as pa

from features.errors import ImageError, SourceError, redacted

MAX_BYTES = 2**28
"""Of one image file; what never ends is cut off there."""
CHUNK = 2**20
CONNECTIONS = 32
SECONDS_TO_ASK = 30.0
"""For the version of one file; whoever takes longer has none."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""What each protocol needs beyond the package itself."""

_MEMBER = re.compile(r"(.+)#bytes=(\d+)-(-?\d+)", re.DOTALL)


# How it may be shown


def as_text(name: str) -> str:
    """A file name as Unicode; each byte in it that is not UTF-8 becomes U+FFFD and its hexadecimal digits."""
    if name.isascii():
        return name
    return re.sub("[\udc80-\udcff]", lambda byte: f"\N{REPLACEMENT CHARACTER}{ord(byte[0]) - 0xDC00:02x}", name)


def as_uri(path: str) -> str:
    """A local path as it is, or, where it is not Unicode, as a file URL."""
    return path if path.isascii() or as_text(path) == path else Path(path).absolute().as_uri()


# What is there


def local_path(location: str) -> str | None:
    """Path of what is on this machine's filesystem, else None."""
    if location.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(location.removeprefix("file://")))
    return None if "://" in location else location


def kind(location: str) -> Literal["file", "folder"] | None:
    """Whether there is a file or a folder; of a URL its suffix tells, and nothing is asked."""
    path = local_path(location)
    if path is None:
        return "file" if re.search(r"\.(csv|parquet|pq|jsonl|ndjson|tar)$", redacted(location), re.I) else "folder"
    return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else None


def find(url: str) -> Iterator[tuple[str, str, str | None]]:
    """Every file below a URL: name relative to it, URL, version.

    Raises
    ------
    SourceError
        If it cannot be listed.
    """
    with _told_as_source_error(url):
        fs, base = filesystem(url)
        fs.invalidate_cache()
        found = fs.find(base, detail=True)
    prefix = len(base.rstrip("/")) + 1
    for path in sorted(found):
        yield path[prefix:], fs.unstrip_protocol(path), _version(found[path])


def versions(uris: list[str]) -> list[str | None]:
    """What tells that a file has changed: size and mtime, or an ETag; None where that is not known."""
    local = [local_path(uri) for uri in uris]
    versions = [path and version_of_file(path) for path in local]
    remote = [place for place, path in enumerate(local) if path is None]
    for url in {uris[place].partition("://")[0]: uris[place] for place in remote}.values():
        with suppress(ValueError):  # A protocol that nobody knows: reading will tell.
            filesystem(url)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for place, version in zip(remote, pool.map(_version_of_url, (uris[place] for place in remote)), strict=True):
            versions[place] = version
    return [version or None for version in versions]


def version_of_file(file: os.DirEntry[str] | str) -> str | None:
    """Size and mtime of a local file, or None."""
    try:
        status = os.stat(file) if isinstance(file, str) else file.stat()
    except (OSError, ValueError):
        return None
    return f"{status.st_size}-{status.st_mtime_ns}"


def _version_of_url(url: str) -> str | None:
    try:
        fs, path = filesystem(url)
        return _version(fs.info(path, **({"timeout": SECONDS_TO_ASK} if fs.async_impl else {})))
    # Whatever went wrong, reading will tell.
    except Exception:
        return None


def _version(info: dict[str, Any]) -> str | None:
    if etag := info.get("ETag") or info.get("etag"):
        return str(etag).strip('"')
    changed = next(
        (info[key] for key in ("LastModified", "Last-Modified", "mtime", "updated", "created") if key in info), None
    )
    return None if changed is None or info.get("size") is None else f"{info['size']}-{changed}"


# What it holds


@contextmanager
def opened(location: str) -> Iterator[BinaryIO]:
    """A file to seek in; behind a URL, only what is read is fetched.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    path = local_path(location)
    with _told_as_source_error(location):
        if path is not None:
            with Path(path).open("rb") as local:
                yield local
        else:
            fs, path = filesystem(location)
            with fs.open(path, "rb", block_size=2**16) as remote:
                yield remote


@contextmanager
def opened_native(location: str) -> Iterator[pa.NativeFile]:
    """A whole file as Arrow reads it without Python; see `features.files.Root.open_native`.

    Raises
    ------
    SourceError
        If it cannot be read.
    """
    path = local_path(location)
    with _told_as_source_error(location):
        if path is not None:
            file = pa.OSFile(path, "rb")
        else:
            fs, path = filesystem(location)
            file = pa.BufferReader(fs.cat_file(path))
    with file:
        yield file


def read(uri: str) -> bytes:
    """Read one image file, or the bytes ``#bytes=<first>-<last>`` of a tar shard.

    Raises
    ------
    ImageError
        With ``missing``, ``unreadable``, ``unreachable`` or ``too_large``.
    """
    member = _MEMBER.fullmatch(uri)
    path = local_path(member[1] if member else uri)
    first, end = (int(member[2]), int(member[3]) + 1) if member else (0, None)
    if end is not None and end - first > MAX_BYTES:
        raise _too_large()
    try:
        if path is not None:
            return _read_file(path, first, end)
        return _read_url(member[1] if member else uri, first, end)
    except ImageError:
        raise
    except Exception as error:
        raise _image_error(error) from None


def _image_error(error: Exception) -> ImageError:
    """What a reader's error means for the image; its message is not told, since it may hold a whole URL."""
    status = getattr(error, "status", None)  # Of an HTTP answer.
    number = getattr(error, "errno", None)
    told = f"HTTP {status}" if status else os.strerror(number) if number else type(error).__name__
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return ImageError("missing", "no such file")
    if isinstance(error, ValueError):  # A NUL byte in the path, or a protocol that nobody knows.
        return ImageError("missing", "no such place")
    forbidden = isinstance(error, PermissionError | IsADirectoryError) or number in (errno.ELOOP, errno.ENAMETOOLONG)
    lasting = status is not None and status < 500 and status not in (408, 425, 429)
    return ImageError("unreadable" if forbidden or lasting else "unreachable", told)


def _read_file(path: str, first: int, end: int | None) -> bytes:
    # Opening a pipe or a device could wait for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError("unreadable", "not a regular file")
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES and end is None:
            raise _too_large()
        file.seek(first)
        return _bounded(file.read(MAX_BYTES + 1 if end is None else end - first))


def _read_url(url: str, first: int, end: int | None) -> bytes:
    fs, path = filesystem(url)
    if first == end:
        return b""
    if url.startswith("http") and end is None:
        return _read_stream(fs, path)
    try:
        return _bounded(fs.cat_file(path, start=first, end=MAX_BYTES + 1 if end is None else end))
    except (FileNotFoundError, ImageError):
        raise
    except Exception:
        # An object store finds no range in an empty object.
        if end is None and fs.size(path) == 0:
            return b""
        raise


def _read_stream(fs: Any, path: str) -> bytes:
    """Read a body that may be endless, or of another size than announced; it is asked for once."""
    pieces, size = [], 0
    # Told any size, the library does not ask for it first; and that question would hide what the server answers.
    with fs.open(path, "rb", block_size=0, size=1) as file:
        while size <= MAX_BYTES and (piece := file.read(CHUNK)):
            pieces.append(piece)
            size += len(piece)
    return _bounded(b"".join(pieces))


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise _too_large()
    return content


def _too_large() -> ImageError:
    return ImageError("too_large", f"the file has more than {MAX_BYTES >> 20} MiB")


def filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path on it.

    Raises
    ------
    SourceError
        If a library is lacking.
    ValueError
        If no library knows the protocol.
    """
    try:
        return fsspec.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError:
        protocol = url.partition("://")[0]
        extra = EXTRAS.get(protocol)
        remedy = (
            f"pip install '.[{extra}]' from the repository" if extra else f"install what fsspec needs for {protocol}"
        )
        raise SourceError(f"{protocol}:// needs a library that is not installed; {remedy}") from None


@contextmanager
def _told_as_source_error(location: str) -> Iterator[None]:
    shown = redacted(location)
    try:
        yield
    except FileNotFoundError:
        raise SourceError(f"source {shown} is not there") from None
    except SourceError:
        raise
    except Exception as error:
        told = " ".join(redacted(str(error)).split()) or type(error).__name__
        raise SourceError(f"source {shown} cannot be read: {told}") from None
