"""The feature store: Parquet, all of it.

An embedding is keyed by the bytes of its image and the spec of its view, so parts are only ever added. The listing
of samples is a numbered series of snapshots that are only ever added either. Nothing is locked.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import samples
from features.errors import StoreError
from features.files import Root
from features.parquet import decode_part, encode, encode_part, meta_of
from features.views import View

ALL = "0/1"
FORMAT = 1
"""Of everything under a store's root. Raise it when an older reader would misread or miss a row; keep reading the
older ones, and keep a store of each in the tests."""


@dataclass(frozen=True)
class Snapshot:
    """One state of the listing.

    Attributes
    ----------
    number : int
        0 before anything was published.
    digest : str
        SHA-256 (hex) of its file.
    samples : pyarrow.Table
        One row per sample, by `features.samples.SCHEMA` and with the sources' own columns.
    listed : dict of str to dict
        For each source, when each shard of it was listed whole (ISO 8601, UTC); the shard of all samples is ``0/1``.
    """

    number: int
    digest: str
    samples: pa.Table
    listed: dict[str, dict[str, str]]


@dataclass
class Present:
    """Which images a view has embeddings of, as far as its parts have been looked at."""

    sha256: set[str] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class FeatureStore:
    """A feature store on a local disk or an object store."""

    root: Root

    @staticmethod
    def is_store(url: str) -> bool:
        """Whether there is a store, of whatever format."""
        root = Root.of(url)
        return bool(root.fs.exists(root.at("store.json")))

    @classmethod
    def open(cls, url: str) -> FeatureStore:
        """Open a store that is there.

        Raises
        ------
        StoreError
            If there is none, or it has a newer format.
        """
        store = cls(Root.of(url))
        if not cls.is_store(url):
            raise StoreError(f"{url} is not a feature store (it has no store.json); `permafrost extract` makes one")
        found = store.root.read_json("store.json").get("format")
        if not isinstance(found, int) or found > FORMAT:
            raise StoreError(
                f"store {url} has format {found}, this permafrost reads up to {FORMAT}; upgrade permafrost"
            )
        return store

    @classmethod
    def open_or_new(cls, url: str) -> FeatureStore:
        """Open a store, or an empty one that comes into being with its first view.

        Raises
        ------
        StoreError
            If the directory holds other things, or a store of a newer format.
        """
        store = cls(Root.of(url))
        if cls.is_store(url):
            return cls.open(url)
        others = [name for name in store.root.names("") if name != "tmp"]
        if others:
            raise StoreError(f"{url} is not empty and no feature store (it holds {others[0]}); use a new directory")
        return store

    # The listing

    def snapshot(self, number: int | None = None) -> Snapshot:
        """Read one state of the listing, the newest by default."""
        number = self._newest() if number is None else number
        if number == 0:
            return Snapshot(0, "", samples.empty(), {})
        try:
            content = self.root.read(_snapshot_file(number))
        except FileNotFoundError:
            raise StoreError(f"{self.root.path} has no snapshot {number}") from None
        table = pq.read_table(io.BytesIO(content))
        meta = meta_of(table.schema)
        if meta["format"] > FORMAT:
            raise StoreError(f"snapshot {number} has format {meta['format']}, this permafrost reads up to {FORMAT}")
        digest = hashlib.sha256(content).hexdigest()
        return Snapshot(number, digest, table.replace_schema_metadata(None), meta["listed"])

    def publish(self, source: str, rows: pa.Table, listed_at: str, whole: bool = True) -> Snapshot | None:
        """Make rows the listing of a source, as the next snapshot.

        Of several runs that publish at once, each merges its rows into what the others published before it.

        Parameters
        ----------
        source : str
        rows : pyarrow.Table
            By `features.samples.SCHEMA`, all of this source.
        listed_at : str
            When the source was listed (ISO 8601, UTC). An older listing never replaces a newer one.
        whole : bool
            Whether `rows` are all there is; otherwise they only replace rows of the same ids.

        Returns
        -------
        Snapshot or None
            None if that changes nothing.
        """
        while True:
            base = self.snapshot()
            if base.listed.get(source, {}).get(ALL, "") > listed_at:
                return None
            replaced = pc.equal(base.samples["source"], source)
            if not whole:
                replaced = pc.and_(replaced, pc.is_in(base.samples["id"], rows["id"].combine_chunks()))
            merged = samples.merge(base.samples, rows, replaced)
            if merged.equals(base.samples):
                return None
            number, listed = base.number + 1, base.listed | ({source: {ALL: listed_at}} if whole else {})
            meta = {"format": FORMAT, "number": number, "created": _now().isoformat(), "listed": listed}
            content = encode(merged, meta)
            if self.root.create(_snapshot_file(number), content):
                return Snapshot(number, hashlib.sha256(content).hexdigest(), merged, listed)

    def refresh_listing(self) -> None:
        """Make `samples.parquet`, which plain tools read, a copy of the newest snapshot."""
        while (newest := self._newest()) != self._listing_number():
            self.root.replace("samples.parquet", self.root.read(_snapshot_file(newest)))

    def pin(self, snapshot: Snapshot, owner: str) -> None:
        """Mark a snapshot as the training set of a bundle, so that it is kept."""
        name = f"snapshots/{snapshot.number:06d}.pin"
        self.root.create(name, _json({"digest": snapshot.digest, "owner": owner, "at": _now().isoformat()}))

    def _newest(self) -> int:
        names = [name for name in self.root.names("snapshots") if name.endswith(".parquet")]
        return max((int(name.removesuffix(".parquet")) for name in names), default=0)

    def _listing_number(self) -> int:
        if not self.root.fs.exists(self.root.at("samples.parquet")):
            return 0
        with self.root.fs.open(self.root.at("samples.parquet"), "rb") as file:
            number: int = meta_of(pq.read_schema(file))["number"]
            return number

    # Views and their parts

    def views(self) -> dict[str, View]:
        """Every view by name."""
        names = self.root.names("embeddings")
        views = {name: self.view(name) for name in names}
        return {name: view for name, view in views.items() if view is not None}

    def view(self, name: str) -> View | None:
        """One view, or None if there is none of that name."""
        if "_view.json" not in self.root.names(f"embeddings/{name}"):
            return None
        described = self.root.read_json(f"embeddings/{name}/_view.json")
        if described["format"] > FORMAT:
            raise StoreError(f"view {name!r} has format {described['format']}, this permafrost reads up to {FORMAT}")
        view = View.from_json(described)
        if view.fingerprint != described["fingerprint"]:
            raise StoreError(f"view {name!r} is damaged: its spec is not what its fingerprint stands for")
        return view

    def add_view(self, view: View) -> View:
        """Create a view, or return the one of that name.

        Raises
        ------
        ViewMismatch
            If the name belongs to a view of another spec.
        """
        self.root.create("store.json", _json({"format": FORMAT}))
        described = view.to_json() | {"format": FORMAT}
        if self.root.create(f"embeddings/{view.name}/_view.json", _json(described)):
            return view
        there = self.view(view.name)
        if there is None:
            raise StoreError(f"view {view.name!r} vanished while it was opened")
        there.require(view.spec)
        return there

    def look(self, view: str, present: Present) -> None:
        """Bring `present` up to date with the parts of a view; only new parts are read."""
        for name in self._parts(view):
            if name not in present.parts:
                with self.root.fs.open(self.root.at(f"embeddings/{view}/{name}"), "rb") as file:
                    present.sha256.update(pq.read_table(file, columns=["sha256"])["sha256"].to_pylist())
                present.parts.add(name)

    def add_part(
        self,
        view: View,
        sha256: list[str],
        embeddings: NDArray[np.float32],
        present: Present,
        versions: dict[str, str],
    ) -> int:
        """Add the embeddings that the view does not have by now, as one part.

        Parameters
        ----------
        view : View
        sha256 : list of str
            One per row, without doubles.
        embeddings : numpy.ndarray
            float32, shape (rows, dim).
        present : Present
            Brought up to date, the new part included.
        versions : dict of str to str
            Versions of the libraries that computed them.

        Returns
        -------
        int
            How many rows were written.
        """
        self.look(view.name, present)
        new = [row for row, key in enumerate(sha256) if key not in present.sha256]
        if not new:
            return 0
        keys = [sha256[row] for row in new]
        meta = {"format": FORMAT, "fingerprint": view.fingerprint, "versions": versions}
        content = encode_part(keys, embeddings[new], meta)
        name = f"{stamp()}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        self.root.create(f"embeddings/{view.name}/{name}", content)
        present.sha256.update(keys)
        present.parts.add(name)
        return len(new)

    def embeddings(self, view: View, wanted: set[str] | None = None) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Read a view, or some images' part of it; of doubles that a race left, the first counts.

        Parameters
        ----------
        view : View
        wanted : set of str, optional
            SHA-256 of the images; all by default.

        Returns
        -------
        sha256 : numpy.ndarray
            str objects, shape (images,), without doubles.
        embeddings : numpy.ndarray
            float32, shape (images, dim).
        """
        keys: dict[str, int] = {}
        rows: list[NDArray[np.float32]] = []
        for name in self._parts(view.name):
            with self.root.fs.open(self.root.at(f"embeddings/{view.name}/{name}"), "rb") as file:
                part_keys, matrix = decode_part(file)
            new = [row for row, key in enumerate(part_keys) if key not in keys and (wanted is None or key in wanted)]
            keys.update(zip((part_keys[row] for row in new), range(len(keys), len(keys) + len(new)), strict=True))
            rows.append(matrix if len(new) == len(matrix) else matrix[new])
        stacked = np.concatenate(rows) if rows else np.empty((0, view.dim), np.float32)
        return np.array(list(keys), dtype=object), stacked

    def _parts(self, view: str) -> list[str]:
        return [name for name in self.root.names(f"embeddings/{view}") if name.endswith(".parquet")]

    # What runs leave behind

    def keep_pending(self, source: str, rows: pa.Table) -> str:
        """Keep what a run has read so far, for the next run should this one die; returns the file's name."""
        name = f"pending/{_source_key(source)}-{stamp()}-{secrets.token_hex(4)}.parquet"
        self.root.create(name, encode(rows, {"format": FORMAT, "source": source}))
        return name

    def pending(self, source: str) -> tuple[pa.Table, list[str]]:
        """What runs over a source have read and not published, and the files that say so."""
        names = [f"pending/{name}" for name in self.root.names("pending") if name.startswith(_source_key(source))]
        tables = [pq.read_table(io.BytesIO(self.root.read(name))) for name in names]
        return pa.concat_tables([samples.READING.empty_table(), *tables]), names

    def drop_pending(self, names: Iterable[str]) -> None:
        """Delete pending files that a snapshot has made needless."""
        for name in names:
            self.root.remove(name)

    def record_run(self, record: dict[str, Any]) -> None:
        """Keep what a run did."""
        self.root.create(f"runs/{stamp()}-{secrets.token_hex(4)}.json", _json(record))


def stamp() -> str:
    """The time now (UTC) as file names have it; sorts by time."""
    return _now().strftime("%Y%m%dT%H%M%S%fZ")


def _now() -> datetime:
    return datetime.now(UTC)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _snapshot_file(number: int) -> str:
    return f"snapshots/{number:06d}.parquet"


def _source_key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
