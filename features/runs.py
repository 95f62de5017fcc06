"""What runs leave in a store: what they have read so far, and a record of what they did."""

from __future__ import annotations

import hashlib
import resource
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from features.errors import redacted
from features.files import Root, encode_json, now, stamp
from features.parquet import decode, encode
from features.reading import THREADS

STAGES = ("list", "read", "decode", "model", "write")
LIBRARIES = ("torch", "torchvision", "pillow", "numpy", "pyarrow")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


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


def kept(root: Root, source: str) -> dict[str, pa.Table]:
    """What runs over a source have read and not published: rows by `features.samples.READING`, by the file's name."""
    names = [f"pending/{name}" for name in root.names("pending") if name.startswith(_key(source))]
    tables = {}
    for name in names:
        # Another run may have published what this file says, and dropped it.
        with suppress(FileNotFoundError):
            tables[name] = decode(root.read(name))[0]
    return tables


def drop(root: Root, names: Iterable[str]) -> None:
    """Delete pending files that are needless."""
    for name in names:
        root.remove(name)


@contextmanager
def recorded(root: Root, command: str) -> Iterator[dict[str, Any]]:
    """Keep a record of what a run did and how it ended, once there is a store to keep it in.

    Yields
    ------
    dict
        To be filled; ``started``, ``command``, ``exit_code``, ``error``, ``total_seconds``, ``peak_memory_bytes`` and
        ``versions`` are added.
    """
    begun, record = time.perf_counter(), dict[str, Any](command=command, started=now().isoformat())
    error: BaseException | None = None
    try:
        yield record
    except BaseException as raised:
        error = raised
        raise
    finally:
        # Of a run that fails by an error of ours, the interpreter says 1.
        code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        record |= {"exit_code": code, "error": None if error is None else redacted(str(error))}
        record["total_seconds"] = round(time.perf_counter() - begun, 3)
        record["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        record["versions"] = {library: version(library) for library in ("permafrost", *LIBRARIES)}
        # A run that fails because the disk is full cannot tell so there.
        with suppress(OSError) if error else nullcontext():
            if "store.json" in root.names(""):
                root.create(f"runs/{stamp()}-{secrets.token_hex(4)}.json", encode_json(record))


def speed(counts: dict[str, int], seconds: dict[str, float]) -> dict[str, Any]:
    """Seconds and images/s by stage, and the stage that held the run up; threads share reading and decoding."""
    spent = {stage: seconds[stage] / (THREADS if stage in ("read", "decode") else 1) for stage in STAGES}
    done = {stage: counts["listed" if stage == "list" else "opened"] for stage in STAGES}
    return {
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "images_per_second": {stage: round(done[stage] / spent[stage], 1) for stage in STAGES if spent[stage] > 0},
        "bottleneck": max(spent, key=lambda stage: spent[stage]) if counts["opened"] else None,
    }


def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
