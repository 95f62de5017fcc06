"""The feature store: Parquet, all of it.

An embedding is keyed by the bytes of its image and the spec of its view, so parts are only ever added. The listing
of samples is a numbered series of snapshots that are only ever added either. Nothing is locked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import parts, samples, tabular
from features.errors import DataError, StoreError
from features.files import Root, encode_json, now
from features.parquet import decode, encode, open_file
from features.parts import FORMAT
from features.shards import ALL, Shard
from features.views import View

if TYPE_CHECKING:
    import polars
    import pyarrow.dataset as ds

Outcome = Literal["published", "unchanged", "superseded"]


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


class Loaded(NamedTuple):
    """Samples and their embeddings, row by row.

    Attributes
    ----------
    ids : numpy.ndarray
        str objects, shape (samples,).
    embeddings : numpy.ndarray
        float32, shape (samples, dim).
    samples : pandas.DataFrame
        By `features.samples.SCHEMA` and with the sources' own columns.
    """

    ids: NDArray[np.object_]
    embeddings: NDArray[np.float32]
    samples: pd.DataFrame


@dataclass(frozen=True)
class FeatureStore:
    """A feature store on a local disk or an object store.

    Examples
    --------
    >>> store = FeatureStore.open("store")
    >>> FeatureStore.is_store("store"), FeatureStore.open_or_new("new").views(), store.snapshot().number
    (True, {}, 1)
    >>> ids, embeddings, samples = store.load()
    >>> embeddings.shape, samples["label"][0], store.pick_view().dim
    ((24, 1280), 'blue', 1280)
    >>> sum(len(embeddings) for ids, embeddings, samples in store.iter_batches())
    24
    """

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
        """Read one state of the listing, the newest by default; StoreError if it is not there, or damaged."""
        number = self.newest() if number is None else number
        if number == 0:
            return Snapshot(0, "", samples.empty(), {})
        try:
            content = self.root.read(self.snapshot_file(number))
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

    def publish(
        self, source: str, rows: pa.Table, listed_at: str, whole: bool = True, shard: Shard = ALL
    ) -> tuple[Snapshot, Outcome]:
        """Make rows the listing of a source, or of a shard of it, as the next snapshot.

        Of several runs that publish at once, each merges its rows into what the others published before it.

        Parameters
        ----------
        source : str
        rows : pyarrow.Table
            By `features.samples.SCHEMA`, all of this source and shard.
        listed_at : str
            When the source was listed (ISO 8601, UTC). An older listing never replaces a newer one: of shards whose
            later listing was published, nothing is replaced.
        whole : bool
            Whether `rows` are all there is in the shard; otherwise they only replace rows of the same ids.
        shard : Shard, optional

        Returns
        -------
        snapshot : Snapshot
            The one published, or the newest.
        outcome : str
            ``published``, ``unchanged``, or ``superseded`` by newer listings of all of these samples.
        """
        while True:
            base = self.snapshot()
            listed = {Shard.parse(text): at for text, at in base.listed.get(source, {}).items()}
            # A time to come is a clock's mistake; heeding it would freeze the listing until then.
            newer = [other for other, at in listed.items() if listed_at < at <= now().isoformat()]
            if any(other.covers(shard) for other in newer):
                return base, "superseded"
            mine = rows.filter(pa.array(_outside(newer, rows["id"]))) if newer else rows
            gone = samples.replaced(base.samples, source, mine["id"], whole)
            if newer or shard != ALL:
                within = shard.holds(base.samples["id"]) & _outside(newer, base.samples["id"])
                gone = pc.and_(gone, pa.array(within))
            merged = samples.merge(base.samples, mine, gone)
            if merged.equals(base.samples):
                return base, "unchanged"
            if whole:
                listed = {other: at for other, at in listed.items() if other in newer or not shard.covers(other)}
                listed[shard] = listed_at
            number = base.number + 1
            stamps = base.listed | {source: {str(other): at for other, at in listed.items()}}
            meta = {"format": FORMAT, "number": number, "created": now().isoformat(), "listed": stamps}
            content = encode(merged, meta | {"previous": base.digest})
            if self.root.create(self.snapshot_file(number), content):
                return Snapshot(number, hashlib.sha256(content).hexdigest(), merged, stamps), "published"

    def refresh_listing(self) -> None:
        """Make `samples.parquet`, which plain tools read, a copy of the newest snapshot."""
        while (newest := self.newest()) != self._listing_number():
            self.root.replace("samples.parquet", self.root.read(self.snapshot_file(newest)))

    def pin(self, snapshot: Snapshot, owner: str) -> None:
        """Mark a snapshot as the training set of a bundle, so that it is kept."""
        name = f"snapshots/{snapshot.number:06d}.pin"
        self.root.create(name, encode_json({"digest": snapshot.digest, "owner": owner, "at": now().isoformat()}))

    def newest(self) -> int:
        """Number of the newest snapshot; 0 before anything was published."""
        names = [name.removesuffix(".parquet") for name in self.root.names("snapshots") if name.endswith(".parquet")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    @staticmethod
    def snapshot_file(number: int) -> str:
        """Name of the file of a snapshot."""
        return f"snapshots/{number:06d}.parquet"

    def _listing_number(self) -> int:
        # Plain tools may have overwritten or damaged this one file; then it is made anew.
        try:
            with self.root.open_native("samples.parquet") as file:
                number: int = open_file(file)[1]["number"]
                return number
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return 0

    # Views

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

    def pick_view(self, name: str | None = None) -> View:
        """The view of that name, or the only one.

        Raises
        ------
        DataError
            If there is none of that name, none at all, or more than one to choose from.
        """
        views = self.views()
        if name is None and len(views) == 1:
            return next(iter(views.values()))
        if name in views:
            return views[name]
        what = (
            "has several views, pick one with --view"
            if name is None and views
            else f"has no view {name or ''}".rstrip()
        )
        raise DataError(f"store {self.root.path} {what}; it has {', '.join(views) or 'none: run `permafrost extract`'}")

    # Reading

    def load(self, view: str | None = None) -> Loaded:
        """Read a view whole: one row for each listed sample that has an embedding, by source and id.

        Parameters
        ----------
        view : str, optional
            Needed where the store has more than one.

        Raises
        ------
        DataError
            If there is no such view.
        """
        table, embeddings = tabular.read(self, view)
        return Loaded(table["id"].to_numpy(), embeddings, table.to_pandas())

    def iter_batches(self, view: str | None = None) -> Iterator[Loaded]:
        """Read a view part by part, for stores larger than memory; each sample comes once, in no certain order.

        Parameters
        ----------
        view : str, optional
            Needed where the store has more than one.

        Raises
        ------
        DataError
            If there is no such view.
        """
        table = self.snapshot().samples
        for rows, embeddings in parts.join(self.root, self.pick_view(view), samples.readable(table)):
            some = table.take(pa.array(rows))
            yield Loaded(some["id"].to_numpy(), embeddings, some.to_pandas())

    def to_arrow(self, view: str | None = None) -> pa.Table:
        """The samples that `load` gives, with a column ``embedding``; see `features.tabular.to_arrow`."""
        return tabular.to_arrow(self, view)

    def to_pandas(self, view: str | None = None) -> pd.DataFrame:
        """The same as a data frame; see `features.tabular.to_pandas`."""
        return tabular.to_pandas(self, view)

    def to_polars(self, view: str | None = None) -> polars.DataFrame:
        """The same as a Polars data frame; see `features.tabular.to_polars`."""
        return tabular.to_polars(self, view)

    def dataset(self, view: str | None = None) -> ds.Dataset:
        """A view's parts, read only when asked, doubles included; see `features.tabular.dataset`."""
        return tabular.dataset(self, view)


def _outside(shards: list[Shard], ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    outside = np.ones(len(ids), bool)
    for shard in shards:
        outside &= ~shard.holds(ids)
    return outside
