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


def busy(seconds: dict[str, float], readers: int) -> dict[str, float]:
    """Share of the time that each stage was at it: `readers` at once read, and all cores decode."""
    elapsed = max(seconds["elapsed"], 1e-9)
    return {stage: min(1.0, spent / elapsed) for stage, spent in _spent(seconds, readers).items() if stage != "list"}


def _spent(seconds: dict[str, float], readers: int) -> dict[str, float]:
    at_once = {"read": readers, "decode": THREADS}
    return {stage: seconds.get(stage, 0.0) / at_once.get(stage, 1) for stage in STAGES}


def busy_line(seconds: dict[str, float], readers: int) -> str:
    """What is worth knowing of `busy` while a run goes on."""
    return ", ".join(f"{stage} {share:.0%}" for stage, share in busy(seconds, readers).items() if share >= 0.05)


def speed(counts: dict[str, int], seconds: dict[str, float], readers: int, device: str | None) -> dict[str, Any]:
    """Seconds, images/s and busy share by stage, the stage that held the run up, and what would help."""
    spent = _spent(seconds, readers)
    done = {stage: counts["listed" if stage == "list" else "opened"] for stage in STAGES}
    shares = busy(seconds, readers)
    slowest = max(spent, key=lambda stage: spent[stage]) if counts["opened"] else None
    worth = slowest and spent[slowest] > 0.1 * seconds["elapsed"]
    return {
        "device": device,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "images_per_second": {stage: round(done[stage] / spent[stage], 1) for stage in STAGES if spent[stage] > 0},
        "busy": {stage: round(share, 3) for stage, share in shares.items()},
        "bottleneck": slowest,
        "advice": _advice(slowest, shares, device) if slowest and worth else None,
    }


def _advice(slowest: str, shares: dict[str, float], device: str | None) -> str:
    gpu = f"{device}".startswith("cuda")
    cores = f"{shares['decode'] * THREADS:.1f} of {THREADS} cores busy"
    match slowest:
        case "list":
            return "list: the source is slow to list; a table of its files would help"
        case "read":
            return f"read: {shares['read']:.0%} of its threads waiting; storage that is nearer or faster would help"
        case "decode" if gpu:
            return f"decode: {cores}; the GPU waits, more cores would help"
        case "decode":
            return f"decode: {cores}; smaller images or more cores would help, a GPU would idle"
        case "model" if gpu:
            return f"model: {shares['model']:.0%} of the time; a smaller backbone or another GPU (--shard) would help"
        case "model":
            return f"model: {shares['model']:.0%} of the time; a GPU, bf16 units or a smaller backbone would help"
    return f"{slowest}: {shares[slowest]:.0%} of the time; a faster disk under the store would help"


def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
