"""The feature store: Parquet, all of it.

An embedding is keyed by the bytes of its image and the spec of its view, so parts are only ever added. The listing
of samples is a numbered series of snapshots that are only ever added either. Nothing is locked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features import samples
from features.errors import StoreError
from features.files import Root, encode_json, now, stamp
from features.parquet import decode, encode, encode_part, open_file, read_part
from features.views import View

ALL = "0/1"
Outcome = Literal["published", "unchanged", "superseded"]
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
        others = [name for name in store.root.names("") if name not in ("tmp", "lost+found") and name[0] != "."]
        # Looked at again, since another first run may have made the store in the meantime.
        if others and not cls.is_store(url):
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
        try:
            table, meta = decode(content)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"snapshot {number} of {self.root.path} is damaged ({error}); restore its file") from None
        if meta["format"] > FORMAT:
            raise StoreError(f"snapshot {number} has format {meta['format']}, this permafrost reads up to {FORMAT}")
        digest = hashlib.sha256(content).hexdigest()
        return Snapshot(number, digest, table, meta["listed"])

    def publish(self, source: str, rows: pa.Table, listed_at: str, whole: bool = True) -> tuple[Snapshot, Outcome]:
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
        snapshot : Snapshot
            The one published, or the newest.
        outcome : str
            ``published``, ``unchanged``, or ``superseded`` by a newer listing of the same source.
        """
        while True:
            base = self.snapshot()
            # A time to come is a clock's mistake; heeding it would freeze the listing until then.
            if listed_at < base.listed.get(source, {}).get(ALL, "") <= now().isoformat():
                return base, "superseded"
            gone = samples.replaced(base.samples, source, rows["id"], whole)
            merged = samples.merge(base.samples, rows, gone)
            if merged.equals(base.samples):
                return base, "unchanged"
            number, listed = base.number + 1, base.listed | ({source: {ALL: listed_at}} if whole else {})
            meta = {"format": FORMAT, "number": number, "created": now().isoformat(), "listed": listed}
            content = encode(merged, meta)
            if self.root.create(_snapshot_file(number), content):
                return Snapshot(number, hashlib.sha256(content).hexdigest(), merged, listed), "published"

    def refresh_listing(self) -> None:
        """Make `samples.parquet`, which plain tools read, a copy of the newest snapshot."""
        while (newest := self._newest()) != self._listing_number():
            self.root.replace("samples.parquet", self.root.read(_snapshot_file(newest)))

    def pin(self, snapshot: Snapshot, owner: str) -> None:
        """Mark a snapshot as the training set of a bundle, so that it is kept."""
        name = f"snapshots/{snapshot.number:06d}.pin"
        self.root.create(name, encode_json({"digest": snapshot.digest, "owner": owner, "at": now().isoformat()}))

    def _newest(self) -> int:
        names = [name.removesuffix(".parquet") for name in self.root.names("snapshots") if name.endswith(".parquet")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _listing_number(self) -> int:
        # Plain tools may have overwritten or damaged this one file; then it is made anew.
        try:
            with self.root.open_native("samples.parquet") as file:
                number: int = open_file(file)[1]["number"]
                return number
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return 0

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
        return View.from_json(described)

    def add_view(self, view: View) -> View:
        """Create a view, or return the one of that name.

        Raises
        ------
        ViewMismatch
            If the name belongs to a view of another spec.
        """
        self.root.create("store.json", encode_json({"format": FORMAT}))
        described = view.to_json() | {"format": FORMAT}
        if self.root.create(f"embeddings/{view.name}/_view.json", encode_json(described)):
            return view
        there = self.view(view.name)
        if there is None:
            raise StoreError(f"view {view.name!r} vanished while it was opened")
        there.require(view.spec)
        return there

    def look(self, view: View, present: Present) -> None:
        """Bring `present` up to date with the parts of a view; only new parts are read."""
        for name in self._parts(view):
            if name not in present.parts:
                with self._open_part(view, name) as part:
                    present.sha256.update(part.read(["sha256"])["sha256"].to_pylist())
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
        self.look(view, present)
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
        for name in self._parts(view):
            with self._open_part(view, name) as part:
                part_keys, matrix = read_part(part)
            new = [row for row, key in enumerate(part_keys) if key not in keys and (wanted is None or key in wanted)]
            keys.update(zip((part_keys[row] for row in new), range(len(keys), len(keys) + len(new)), strict=True))
            rows.append(matrix if len(new) == len(matrix) else matrix[new])
        stacked = np.concatenate(rows) if rows else np.empty((0, view.dim), np.float32)
        return np.array(list(keys), dtype=object), stacked

    def _parts(self, view: View) -> list[str]:
        return [name for name in self.root.names(f"embeddings/{view.name}") if name.endswith(".parquet")]

    @contextmanager
    def _open_part(self, view: View, name: str) -> Iterator[pq.ParquetFile]:
        where = f"part {name} of view {view.name!r}"
        try:
            with self.root.open_native(f"embeddings/{view.name}/{name}") as file:
                part, meta = open_file(file)
                if meta["format"] > FORMAT:
                    raise StoreError(f"{where} has format {meta['format']}, this permafrost reads up to {FORMAT}")
                if meta["fingerprint"] != view.fingerprint:
                    raise StoreError(f"{where} holds embeddings of another view; remove it")
                yield part
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            # Arrow tells of a wrong checksum by an OSError too, but without a number.
            if isinstance(error, OSError) and error.errno:
                raise
            raise StoreError(f"{where} is damaged ({error}); remove it, and the next run makes it anew") from None


def _snapshot_file(number: int) -> str:
    return f"snapshots/{number:06d}.parquet"
