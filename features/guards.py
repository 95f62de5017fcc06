"""What is checked before the work: that a listing did not shrink, what is too many, and where an answer may go."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import DataError, PermafrostError, Shrunk, SourceError
from features.shards import ALL
from features.sources import Source
from features.store import Snapshot


def gone(source: Source, before: Snapshot) -> tuple[int, pa.ChunkedArray]:
    """How many samples a source, and shard, had, and the ids of those that it has no more."""
    mine = before.samples.filter(pc.equal(before.samples["source"], source.name))["id"]
    mine = mine.filter(pa.array(source.shard.holds(mine)))
    return len(mine), mine.filter(pc.invert(pc.is_in(mine, source.listing["id"].combine_chunks())))


def require_samples(source: Source, before: Snapshot, allow_shrink: bool = False) -> None:
    """Check that a source is not empty, and has not lost more than half of what it had; a shard may be empty.

    Raises
    ------
    Shrunk
        If more than half is gone.
    SourceError
        If there is nothing, and there never was.
    """
    had, lost = gone(source, before)
    if source.whole and 2 * len(lost) > had and not allow_shrink:
        raise Shrunk(
            f"{len(lost):,} of the {had:,} samples of source {source.name} are gone, such as {lost[0].as_py()!r}; "
            "nothing was published. Is a disk not mounted? If that is right, pass --allow-shrink"
        )
    if not had and not len(source.listing) and source.shard == ALL:
        raise SourceError(f"source {source.name} holds no image; images are told by extensions such as .jpg and .png")


def require_folder(folder: Path, option: str = "--out") -> None:
    """Check that a file may be made in a folder.

    Raises
    ------
    DataError
        If the folder is not there, or cannot be written.
    """
    if not folder.is_dir():
        raise DataError(f"folder {folder} for {option} is not there; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"folder {folder} for {option} cannot be written; check who may write there, or name another")


def most(text: str | None, total: int, option: str) -> float:
    """How many are not yet too many: a count, or a share of all such as ``5%``; any number where nothing was said.

    Raises
    ------
    PermafrostError
        If it is neither; names the option.
    """
    if text is None:
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", text.strip())
    if not match:
        raise PermafrostError(f"{option} {text!r} is neither a count such as 10 nor a share such as 5%")
    return float(match[1]) / 100 * total if match[1] else float(match[2])
