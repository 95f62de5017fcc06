"""Whole files or none: how a store's files come to be, on a local disk and on an object store.

A local file is written aside, flushed to the disk, and then renamed or linked, which is atomic. An object store
shows an object only when it is complete, and creates it conditionally.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import StoreError, redacted

CONFLICTS = 8
"""How often an object store may say that somebody else is just writing the same object."""
_TAIL = 2**16
PROTOCOLS = ("file", "local", "memory", "s3", "s3a", "gs", "gcs")


@dataclass(frozen=True)
class Root:
    """A directory on some filesystem, all paths being relative to it.

    Attributes
    ----------
    fs : fsspec.AbstractFileSystem
    path : str
        As `fs` spells it.
    """

    fs: Any
    path: str

    @classmethod
    def of(cls, url: str) -> Root:
        """Resolve a local path or an fsspec URL.

        Raises
        ------
        StoreError
            For a filesystem that cannot create a file exclusively, or that no library here can reach.
        """
        try:
            # Other processes write to the same directories, so no listing may be remembered.
            fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {redacted(url)} cannot be reached: {redacted(str(error))}") from None
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        if not set(protocols) & set(PROTOCOLS):
            raise StoreError(
                f"store {redacted(url)} lies on {protocols[0]}, which cannot create a file exclusively; "
                "use a local directory, s3://, gs:// or memory://"
            )
        return cls(fs, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the directory is on this machine's filesystem."""
        return "file" in self.fs.protocol

    @property
    def url(self) -> str:
        """The directory, as a user may name it anywhere on this machine; without credentials."""
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        """Path of one file, as `fs` spells it."""
        return f"{self.path}/{name}"

    def names(self, directory: str) -> list[str]:
        """Sorted names in a directory; none if it is not there."""
        path = self.at(directory)
        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self.fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        # With one connection, an object store sends the object as it is now, and in one answer.
        content: bytes = self.fs.cat_file(self.at(name), **({"max_concurrency": 1} if self._is_s3 else {}))
        return content

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self.fs.size(self.at(name)))

    def open_native(self, name: str, columns: list[str] | None = None) -> pa.NativeFile:
        """A file as Arrow reads it without Python.

        Arrow's threads may outlive a read; if they hold a Python file, the process aborts or hangs as it exits
        (apache/arrow issues 34314 and 50482).

        Parameters
        ----------
        name : str
        columns : list of str, optional
            Fetch only these columns of a Parquet file on an object store; the others' bytes are zeros.
        """
        if self.is_local:
            return pa.OSFile(self.at(name), "rb")
        return pa.BufferReader(self.read(name) if columns is None else self._sparse(name, columns))

    def _sparse(self, name: str, columns: list[str]) -> pa.Buffer:
        path, size = self.at(name), self.size(name)
        # Memory that is never touched takes no room.
        content = mmap.mmap(-1, max(size, 1))

        def fetch(start: int, end: int) -> None:
            content[start:end] = self.fs.cat_file(path, start=start, end=end)

        tail = max(0, size - _TAIL)
        fetch(tail, size)
        tail = min(tail, size - 8 - int.from_bytes(content[size - 8 : size - 4], "little"))
        fetch(max(tail, 0), size)
        meta = pq.read_metadata(pa.BufferReader(content))
        for group in range(meta.num_row_groups):
            for chunk in (meta.row_group(group).column(place) for place in range(meta.num_columns)):
                if chunk.path_in_schema in columns:
                    fetch(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)
        return pa.py_buffer(content)

    @property
    def _is_s3(self) -> bool:
        return "s3" in self.fs.protocol

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file's content, an object.

        Raises
        ------
        StoreError
            If it is not there, or not JSON.
        """
        try:
            content = json.loads(self.read(name))
            if isinstance(content, dict):
                return content
            raise ValueError("no object")
        except (FileNotFoundError, ValueError) as error:
            raise StoreError(f"{self.at(name)} is missing or damaged ({type(error).__name__})") from None

    def create(self, name: str, content: bytes) -> bool:
        """Create a file that must not be there yet; of several who try at once, one succeeds.

        Returns
        -------
        bool
            False if the file was there already.
        """
        if not self.is_local:
            return self._create_object(self.at(name), content)
        aside = self._write_aside(content)
        target = Path(self.at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(aside, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise StoreError(
                f"{self.path} lies on a filesystem without hard links ({error.strerror}); put the store elsewhere"
            ) from None
        finally:
            aside.unlink()
        _flush(target.parent)
        return True

    def _create_object(self, path: str, content: bytes) -> bool:
        for attempt in range(CONFLICTS):
            try:
                # In one piece, since not every server heeds the condition when an upload in pieces ends.
                self.fs.pipe_file(path, content, mode="create", **({"chunksize": 5 * 2**30} if self._is_s3 else {}))
                return True
            except OSError as error:
                code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                if isinstance(error, FileExistsError) or code == "PreconditionFailed":
                    # A client that got no answer tries again by itself, and then meets its own object.
                    return bool(self.fs.cat_file(path) == content)
                if code not in ("ConditionalRequestConflict", "OperationAborted"):
                    raise
            time.sleep(0.1 * 2**attempt)
        raise StoreError(f"{path} could not be created, since others kept writing it; run again")

    def replace(self, name: str, content: bytes) -> None:
        """Put a file in the place of what may be there."""
        if not self.is_local:
            self.fs.pipe_file(self.at(name), content)
            return
        target = Path(self.at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._write_aside(content).replace(target)
        _flush(target.parent)

    def remove(self, name: str) -> None:
        """Delete a file; not an error if another did."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))

    def _write_aside(self, content: bytes) -> Path:
        aside = Path(self.at("tmp"), uuid.uuid4().hex)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return aside


def _flush(directory: Path) -> None:
    """Make a rename or link in a directory outlast a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(value: Any) -> bytes:
    """JSON as the store's files have it."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def now() -> datetime:
    """The time now, in UTC."""
    return datetime.now(UTC)


def stamp() -> str:
    """The time now as file names have it; sorts by time."""
    return now().strftime("%Y%m%dT%H%M%S%fZ")
