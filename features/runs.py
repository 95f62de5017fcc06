"""What runs leave in a store: what they have read so far, and a record of what they did."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pyarrow as pa

from features import samples
from features.files import Root, encode_json, stamp
from features.parquet import decode, encode


def keep(root: Root, source: str, rows: pa.Table) -> str:
    """Keep what a run has read so far, should it die; returns the file's name.

    Parameters
    ----------
    root : Root
    source : str
    rows : pyarrow.Table
        By `features.samples.READING`.
    """
    name = f"pending/{_key(source)}-{stamp()}-{secrets.token_hex(4)}.parquet"
    root.create(name, encode(rows, {"source": source}))
    return name


def kept(root: Root, source: str) -> tuple[pa.Table, list[str]]:
    """What runs over a source have read and not published.

    Returns
    -------
    rows : pyarrow.Table
        By `features.samples.READING`.
    names : list of str
        The files that say so.
    """
    names = [f"pending/{name}" for name in root.names("pending") if name.startswith(_key(source))]
    tables = [samples.READING.empty_table()]
    for name in names:
        # Another run may have published what this file says, and dropped it.
        with suppress(FileNotFoundError):
            tables.append(decode(root.read(name))[0])
    return pa.concat_tables(tables), names


def drop(root: Root, names: Iterable[str]) -> None:
    """Delete pending files that are needless."""
    for name in names:
        root.remove(name)


def record(root: Root, what: dict[str, Any]) -> None:
    """Keep what a run did."""
    root.create(f"runs/{stamp()}-{secrets.token_hex(4)}.json", encode_json(what))


def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
