"""What a run has to open: the listing, less what the store knows already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features import samples
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
        that may have passed, or because the view lacks their embedding.
    """

    listing: pa.Table
    known: pa.Table
    place: NDArray[np.int64]
    todo: NDArray[np.int64]

    @classmethod
    def make(cls, listing: pa.Table, known: pa.Table, present: set[str]) -> Plan:
        """Compare a listing with what earlier runs have read and embedded.

        Parameters
        ----------
        listing : pyarrow.Table
        known : pyarrow.Table
            By `features.samples.READING`; of several rows alike the first counts.
        present : set of str
            SHA-256 of the images that the view has embeddings of.
        """
        # What has no version may have changed, and what may have passed is tried again.
        transient = known["error"].fill_null("").to_pandas().str.match(f"({'|'.join(sorted(TRANSIENT))}):")
        frame = known.select(["id", "version", "sha256", "status"]).to_pandas().assign(place=np.arange(len(known)))
        frame = frame[frame["version"].notna() & ~transient].drop_duplicates(["id", "version"])
        found = listing.select(["id", "version"]).to_pandas().merge(frame, how="left", on=["id", "version"])
        lacking = found["status"].eq("ok") & ~found["sha256"].isin(present)
        # Of several samples with the same bytes, opening one is enough.
        embed = lacking & ~found["sha256"].where(lacking).duplicated()
        place = found["place"].fillna(-1).to_numpy(np.int64)
        return cls(listing, known.select(samples.READ), place, np.flatnonzero((place < 0) | embed))

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
        own = samples.own_columns(self.listing)
        schema = pa.schema([*samples.SCHEMA, *(self.listing.schema.field(name) for name in own)])
        return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
