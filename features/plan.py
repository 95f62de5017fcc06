"""What a run has to open: the listing, less what the store knows already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import samples
from features.errors import redacted
from features.images import TRANSIENT


@dataclass(frozen=True)
class Plan:
    """The listing against the store.

    Attributes
    ----------
    listing : pyarrow.Table
        Columns ``id, uri, version`` and the source's own.
    known : pyarrow.Table
        What earlier runs have read: columns `features.samples.READ`.
    place : numpy.ndarray
        int64, shape (samples,): for each sample its row in `known`, or -1.
    todo : numpy.ndarray
        int64: the samples to open, because they are new or changed, because reading them failed for a reason
        that may have passed, or because the view lacks their embedding. Samples at one place follow each other.
    files : list of str
        The places to open, each once, in the order of `todo`.
    sizes : numpy.ndarray
        int64, shape (files,): how many of `todo` each place stands for.
    """

    listing: pa.Table
    known: pa.Table
    place: NDArray[np.int64]
    todo: NDArray[np.int64]
    files: list[str]
    sizes: NDArray[np.int64]

    @classmethod
    def make(cls, listing: pa.Table, known: pa.Table, present: set[str], retry_failed: bool = False) -> Plan:
        """Compare a listing with what earlier runs have read and embedded.

        Parameters
        ----------
        listing : pyarrow.Table
        known : pyarrow.Table
            By `features.samples.READING`; of several rows alike the first counts.
        present : set of str
            SHA-256 of the images that the view has embeddings of.
        retry_failed : bool
            Open again whatever failed, for whatever reason.
        """
        # What has no version may have changed, and what may have passed is tried again.
        again = "" if retry_failed else f"({'|'.join(sorted(TRANSIENT))}):"
        transient = pc.match_substring_regex(known["error"], f"^{again}").fill_null(False).to_numpy()
        there = pc.is_in(known["sha256"], pa.array(present, pa.string())).to_numpy()
        frame = known.select(["id", "version", "sha256", "status"]).to_pandas()
        frame = frame.assign(place=np.arange(len(known)), there=there)
        frame = frame[frame["version"].notna() & ~transient].drop_duplicates(["id", "version"])
        found = listing.select(["id", "version"]).to_pandas().merge(frame, how="left", on=["id", "version"])
        lacking = found["status"].eq("ok") & found["there"].eq(False)
        # Of several samples with the same bytes, opening one is enough.
        embed = lacking & ~found["sha256"].where(lacking).duplicated()
        place = found["place"].fillna(-1).to_numpy(np.int64)
        todo = np.flatnonzero((place < 0) | embed)
        files, names = pd.factorize(listing["uri"].take(pa.array(todo)).to_pandas())
        todo = todo[np.argsort(files, kind="stable")]
        return cls(listing, known.select(samples.READ), place, todo, names.tolist(), np.bincount(files))

    def rows(self, source: str, read: list[pa.Table]) -> pa.Table:
        """The whole listing, by `features.samples.SCHEMA`, once `todo` has been read.

        Parameters
        ----------
        source : str
        read : list of pyarrow.Table
            By `features.samples.READING`: together one row for each of `todo`, in its order.
        """
        place = self.place.copy()
        place[self.todo] = len(self.known) + np.arange(len(self.todo))
        facts = pa.concat_tables([self.known, *(part.select(samples.READ) for part in read)]).take(pa.array(place))
        columns = {"source": pa.repeat(source, len(place))}
        columns |= {name: self.listing[name] for name in self.listing.column_names}
        columns |= {name: facts[name] for name in samples.READ}
        if pc.any(pc.match_substring(columns["uri"], "://")).as_py():
            # A URL may carry a key that is not to be kept, or that changes every night.
            columns["uri"] = pa.array([redacted(uri) for uri in columns["uri"].to_pylist()], pa.string())
        own = samples.own_columns(self.listing)
        schema = pa.schema([*samples.SCHEMA, *(self.listing.schema.field(name) for name in own)])
        return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
