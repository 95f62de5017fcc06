"""One run: what is listed and readable and not yet in its views is embedded, and the listing is published.

Whatever an earlier run did not finish is therefore done by the next, and a run with nothing to do loads no model.
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from features import guards, runs, samples
from features.embedding import Progress, Stopped
from features.errors import TooManyFailures
from features.fill import fill, look_ahead
from features.sources import Source
from features.store import FeatureStore
from features.views import AUTO, Request, named


def extract(
    source: Source,
    store: FeatureStore,
    requests: list[Request],
    *,
    view: str | None = None,
    device: str = AUTO,
    compile: str = AUTO,
    rehash: bool = False,
    retry_failed: bool = False,
    allow_shrink: bool = False,
    max_failures: str | None = None,
    stopped: Stopped = lambda: None,
    progress: Progress = lambda done, total, busy: None,
) -> dict[str, Any]:
    """Bring views up to date with a source in one pass over it, and publish the source's listing.

    Parameters
    ----------
    source : Source
    store : FeatureStore
    requests : list of Request
        One for each view. Those that differ in the layer alone share a forward pass.
    view : str, optional
        Name of the view, of one request only; by default it says backbone, weights and layer.
    device : str
        ``auto``, or a torch device.
    compile : str
        ``on``, ``off``, or ``auto``: where there are enough images to pay for it.
    rehash : bool
        Read every file, whether its version has changed or not.
    retry_failed : bool
        Read again what failed, whether its version has changed or not.
    allow_shrink : bool
        Publish a listing that lost more than half of what the source had.
    max_failures : str, optional
        How many failed samples are too many: a count, or a share such as ``5%``.
    stopped : callable, optional
    progress : callable, optional

    Returns
    -------
    dict
        The record that is also kept in the store: counts, seconds and images/s by stage, versions.

    Raises
    ------
    SourceError
        If there is no sample, or a column clashes with the store's.
    Shrunk
        If more than half of the source's samples are gone.
    BackboneError
        If a backbone cannot be loaded.
    ViewMismatch
        If a view holds embeddings of another spec.
    NonFinite
        If a backbone gives NaN or infinity.
    Interrupted
        If `stopped` said so; what was finished is kept.
    TooManyFailures
        If there are more than `max_failures`, having published.

    Examples
    --------
    >>> from features.sources import list_source
    >>> from features.store import FeatureStore
    >>> from features.views import Request
    >>> store = FeatureStore.open_or_new("new")
    >>> record = extract(list_source("photos"), store, [Request.parse("tiny")])
    >>> record["opened"], record["embedded"], record["failed"]
    (24, 24, 0)
    >>> again = extract(list_source("photos"), store, [Request.parse("tiny")])
    >>> again["listed"], again["opened"], again["outcome"]
    (24, 0, 'unchanged')
    """
    views = named(requests, view)
    most = guards.most(max_failures, len(source.listing), "--max-failures")
    with runs.recorded(store.root, "extract") as record:
        record |= {"source": source.name, "shard": str(source.shard), "views": list(views)}
        before = store.snapshot()
        guards.require_samples(source, before, allow_shrink)
        gone = samples.replaced(before.samples, source.name, source.listing["id"], source.whole)
        samples.require_same_types(before.samples.filter(pc.invert(gone)), source.listing, source.name)
        ahead = look_ahead(source, store, views, before, rehash=rehash, retry_failed=retry_failed)
        filled = fill(source, store, ahead, device=device, compile=compile, stopped=stopped, progress=progress)
        snapshot, outcome = store.publish(source.name, filled.rows, source.listed_at, source.whole, source.shard)
        store.refresh_listing()
        runs.drop(store.root, [*filled.pending, *ahead.adopted])
        record |= {"snapshot": snapshot.number, "outcome": outcome, **filled.counts}
        record |= runs.speed(filled.counts, filled.seconds | {"list": source.seconds}, filled.readers, filled.device)
        if filled.counts["failed"] > most:
            raise TooManyFailures(
                f"{filled.counts['failed']:,} of {filled.counts['listed']:,} samples failed, more than --max-failures "
                f"{max_failures}; snapshot {snapshot.number} has their reasons, `permafrost info` counts them"
            )
    return record


def preview(source: Source, store: FeatureStore, requests: list[Request], view: str | None = None) -> dict[str, Any]:
    """What a run would do: samples ``listed``, ``to_open``, and ``gone`` from the listing; writes nothing.

    Parameters
    ----------
    source : Source
    store : FeatureStore
    requests : list of Request
    view : str, optional
        Name of the view, of one request only.

    Returns
    -------
    dict

    Examples
    --------
    >>> from features.sources import list_source
    >>> from features.store import FeatureStore
    >>> from features.views import Request
    >>> preview(list_source("photos"), FeatureStore.open("store"), [Request.parse("tiny")])["to_open"]
    0
    """
    views, before = named(requests, view), store.snapshot()
    to_open = len(look_ahead(source, store, views, before).plan.todo)
    gone = len(guards.gone(source, before)[1]) if source.whole else 0
    listed = len(source.listing)
    return {"source": source.name, "views": list(views), "listed": listed, "to_open": to_open, "gone": gone}
