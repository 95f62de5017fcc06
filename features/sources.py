"""Where samples are: a folder of images, a tar shard or a table, on a disk or behind a URL, becomes a listing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from features import locations
from features.errors import SourceError, redacted
from features.folders import list_folder, list_tar
from features.shards import ALL, Shard
from features.tables import SUFFIXES, list_table


@dataclass(frozen=True)
class Source:
    """A listing and where it comes from.

    Attributes
    ----------
    name : str
        By default the absolute path or the URL, the latter without query or credentials.
    listing : pyarrow.Table
        Columns ``id, uri, version`` and those of the source's own, sorted by id. ``version`` is null where
        there is no file.
    listed_at : str
        ISO 8601, UTC.
    whole : bool
        Whether the listing is all there is, in its shard.
    shard : Shard
        Which samples were listed.
    seconds : float
        Time that listing took.
    """

    name: str
    listing: pa.Table
    listed_at: str
    whole: bool
    shard: Shard = ALL
    seconds: float = 0.0


def list_source(
    location: str,
    *,
    name: str | None = None,
    image: str | None = None,
    id_column: str | None = None,
    columns: str | None = None,
    shard: Shard = ALL,
    limit: int | None = None,
) -> Source:
    """List a source; no image is opened.

    Parameters
    ----------
    location : str
        A path or an fsspec URL of a folder, a ``.tar`` shard, or a CSV, Parquet or JSON-lines table.
    name : str, optional
        Name of the source in the store.
    image, id_column : str, optional
        Columns of a table that hold the images' paths or URLs, and the ids. Paths are relative to the table; without
        an id column they are the ids.
    columns : str, optional
        Template that reads columns out of a folder's paths, such as ``{year}/{site}/{name}``.
    shard : Shard, optional
        Take only the samples of this shard.
    limit : int, optional
        Take only the first so many samples by id.

    Returns
    -------
    Source

    Raises
    ------
    SourceError
        If there is no such source, or the table or the template does not fit.

    Examples
    --------
    >>> source = list_source("photos")
    >>> source.listing.select(["id", "label", "split"]).slice(0, 1).to_pylist()
    [{'id': 'test/blue/20.png', 'label': 'blue', 'split': 'test'}]
    >>> list_source("photos.csv", image="file", id_column="number").listing.column_names
    ['id', 'uri', 'version', 'number', 'label', 'weight']
    """
    listed_at, begun = datetime.now(UTC).isoformat(), time.perf_counter()
    path = locations.local_path(location)
    if path is not None:
        location = locations.as_uri(os.path.normpath(Path(path).expanduser().absolute()))
    shown = redacted(location).rstrip("/")
    suffix = os.path.splitext(shown)[1].lower()
    kind = locations.kind(location)
    if kind == "file" and (suffix in SUFFIXES or suffix == ".tar"):
        if columns and suffix != ".tar":
            raise SourceError(f"{shown} is a table; --columns is for folders")
        if (image or id_column) and suffix == ".tar":
            raise SourceError(f"{shown} is a tar shard; --image and --id are for tables")
        listing = (
            list_tar(location, "", locations.versions([location])[0], columns)
            if suffix == ".tar"
            else list_table(location, image, id_column)
        )
    elif kind == "folder":
        if image or id_column:
            raise SourceError(f"{shown} is a folder; --image and --id are for tables")
        listing = list_folder(location, columns)
    elif kind == "file":
        raise SourceError(f"source {shown} is neither a folder nor a table ({', '.join(SUFFIXES)}) nor a .tar shard")
    else:
        raise SourceError(f"source {shown} is not there")
    listing = listing.sort_by("id")
    _require_unique(listing["id"], shown)
    if shard != ALL:
        listing = listing.filter(pa.array(shard.holds(listing["id"])))
    whole = limit is None or limit >= len(listing)
    listing = listing if whole else listing.slice(0, limit)
    return Source(name or shown, listing, listed_at, whole, shard, time.perf_counter() - begun)


def _require_unique(ids: pa.ChunkedArray, shown: str) -> None:
    """Check sorted ids of a folder for doubles: names inside a tar shard may repeat, and odd names may look alike."""
    if len(ids) > 1:
        doubled = ids.slice(1).filter(
            pc.equal(ids.slice(1).combine_chunks(), ids.slice(0, len(ids) - 1).combine_chunks())
        )
        if len(doubled):
            raise SourceError(f"id {doubled[0].as_py()!r} stands for two files of {shown}; rename one of them")
