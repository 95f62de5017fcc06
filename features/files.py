"""Whole files or none: how a store's files come to be, on a local disk and on an object store.

A local file is written aside, flushed to the disk, and then renamed or linked, which is atomic. An object store
shows an object only when it is complete, and creates it conditionally.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from features.errors import StoreError

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
            fs, path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"store {url} cannot be reached: {error}") from None
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        if not set(protocols) & set(PROTOCOLS):
            raise StoreError(
                f"store {url} lies on {protocols[0]}, which cannot create a file exclusively; "
                "use a local directory, s3://, gs:// or memory://"
            )
        return cls(fs, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the directory is on this machine's filesystem."""
        return "file" in self.fs.protocol

    def at(self, name: str) -> str:
        """Path of one file, as `fs` spells it."""
        return f"{self.path}/{name}"

    def names(self, directory: str) -> list[str]:
        """Sorted names in a directory; none if it is not there."""
        path = self.at(directory)
        self.fs.invalidate_cache(path)
        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self.fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        content: bytes = self.fs.cat_file(self.at(name))
        return content

    def open_native(self, name: str) -> pa.NativeFile:
        """A file as Arrow reads it without Python.

        Arrow's threads may outlive a read; if they hold a Python file, the process aborts or hangs as it exits
        (apache/arrow issues 34314 and 50482).
        """
        return pa.OSFile(self.at(name), "rb") if self.is_local else pa.BufferReader(self.read(name))

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
            try:
                self.fs.pipe_file(self.at(name), content, mode="create")
            except FileExistsError:
                return False
            return True
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
