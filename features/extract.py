"""The loop: list, read, decode, embed, store, publish.

A run embeds what is listed and readable and not yet in the view. Whatever an earlier run did not finish is
therefore done by the next, and a run with nothing to do loads no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import guards, parts, runs, samples
from features.errors import Interrupted, NonFinite, TooManyFailures
from features.parts import Present
from features.plan import Plan
from features.reading import read_all
from features.shards import ALL
from features.sources import Source
from features.store import FeatureStore, Snapshot
from features.views import Request, View

if TYPE_CHECKING:
    from features.backbones import Backbone

BATCH = 64
PART = 2048
PART_SECONDS = 60.0
"""A part is finished at the latest after so long; more than that is never lost."""

Progress = Callable[[int, int], None]
"""Called with the samples done and the samples to do."""
Stopped = Callable[[], tuple[str, int] | None]
"""Says whether to end early: why, and with which exit code."""


@dataclass(frozen=True)
class Filled:
    """What `fill` leaves to publish.

    Attributes
    ----------
    view : View
    rows : pyarrow.Table
        The source's listing, by `features.samples.SCHEMA`.
    pending : list of str
        Pending files that this run wrote; needless once `rows` are published.
    counts : dict of str to int
        Samples ``listed``, ``opened``, ``embedded`` and ``failed``.
    seconds : dict of str to float
        Time spent by stage; that of ``read`` and ``decode`` adds up over threads.
    """

    view: View
    rows: pa.Table
    pending: list[str]
    counts: dict[str, int]
    seconds: dict[str, float]


def extract(
    source: Source,
    store: FeatureStore,
    request: Request,
    *,
    view: str | None = None,
    device: str = "auto",
    rehash: bool = False,
    retry_failed: bool = False,
    allow_shrink: bool = False,
    max_failures: str | None = None,
    stopped: Stopped = lambda: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Bring a view up to date with a source, and publish the source's listing.

    Parameters
    ----------
    source : Source
    store : FeatureStore
    request : Request
    view : str, optional
        Name of the view; by default it says backbone, weights and layer.
    device : str
        ``auto``, or a torch device.
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
        If the backbone cannot be loaded.
    ViewMismatch
        If the view holds embeddings of another spec.
    NonFinite
        If the backbone gives NaN or infinity.
    Interrupted
        If `stopped` said so; what was finished is kept.
    TooManyFailures
        If there are more than `max_failures`, having published.
    """
    most = guards.most_failures(max_failures, len(source.listing))
    with runs.recorded(store.root, "extract") as record:
        record |= {"source": source.name, "shard": str(source.shard), "view": view or request.view_name}
        before = store.snapshot()
        guards.require_samples(source, before, allow_shrink)
        gone = samples.replaced(before.samples, source.name, source.listing["id"], source.whole)
        samples.require_same_types(before.samples.filter(pc.invert(gone)), source.listing, source.name)
        plan, present, adopted = look_ahead(source, store, record["view"], before, rehash, retry_failed)
        filled = fill(source, store, request, record["view"], (plan, present), device, stopped, progress)
        snapshot, outcome = store.publish(source.name, filled.rows, source.listed_at, source.whole, source.shard)
        store.refresh_listing()
        runs.drop(store.root, [*filled.pending, *adopted])
        record |= {
            "snapshot": snapshot.number,
            "outcome": outcome,
            **filled.counts,
            **runs.speed(filled.counts, filled.seconds | {"list": source.seconds}),
        }
        if filled.counts["failed"] > most:
            raise TooManyFailures(
                f"{filled.counts['failed']:,} of {filled.counts['listed']:,} samples failed, more than --max-failures "
                f"{max_failures}; snapshot {snapshot.number} has their reasons, `permafrost info` counts them"
            )
    return record


def fill(
    source: Source,
    store: FeatureStore,
    request: Request,
    name: str,
    ahead: tuple[Plan, Present],
    device: str = "auto",
    stopped: Stopped = lambda: None,
    progress: Progress = lambda done, total: None,
    expected: View | None = None,
) -> Filled:
    """Embed what a source has and a view has not, and publish nothing; see `extract` and `look_ahead`.

    With `expected`, any view that has another spec than that one is refused, and none such is made.
    """
    plan, present = ahead
    view = store.view(name)
    if expected and view:
        expected.require(view.spec)
    seconds = dict.fromkeys(("load", "read", "decode", "model", "write"), 0.0)

    @_once
    def backbone() -> Backbone:
        from features import backbones

        begun = time.perf_counter()
        loaded = backbones.load(request, device)
        if expected:
            expected.require(loaded.spec)
        store.add_view(View(name, loaded.spec, loaded.dim, request))
        seconds["load"] += time.perf_counter() - begun
        return loaded

    if view is None or not request.same_as(view.request):
        view = View(name, backbone().spec, backbone().dim, request)
    read, pending, embedded = [], [], 0
    for facts, sha256, vectors in _parts(plan, backbone, present, seconds, stopped, progress):
        begun = time.perf_counter()
        versions = {library: version(library) for library in runs.LIBRARIES}
        embedded += parts.add(store.root, view, sha256, vectors, present, versions)
        read.append(facts)
        pending.append(runs.keep(store.root, source.name, facts))
        seconds["write"] += time.perf_counter() - begun
    done = sum(map(len, read))
    if done < len(plan.todo):
        why, code = stopped() or ("", 1)
        raise Interrupted(f"{why}: {done:,} of {len(plan.todo):,} samples are done and kept; run again to go on", code)
    rows = plan.rows(source.name, read)
    failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
    counts = {"listed": len(rows), "opened": len(plan.todo), "embedded": embedded, "failed": failed}
    return Filled(view, rows, pending, counts, seconds)


def preview(source: Source, store: FeatureStore, view: str) -> dict[str, Any]:
    """What a run would do: samples ``listed``, ``to_open``, and ``gone`` from the listing; writes nothing."""
    before = store.snapshot()
    plan, _, _ = look_ahead(source, store, view, before)
    gone = len(guards.gone(source, before)[1]) if source.whole else 0
    return {"source": source.name, "view": view, "listed": len(source.listing), "to_open": len(plan.todo), "gone": gone}


def look_ahead(
    source: Source,
    store: FeatureStore,
    name: str,
    before: Snapshot,
    rehash: bool = False,
    retry_failed: bool = False,
) -> tuple[Plan, Present, list[str]]:
    """Plan a run: what it would open, what the view has, and which pending files will be needless after it."""
    present, view = Present(), store.view(name)
    if view:
        parts.look(store.root, view, present)
    pending = runs.kept(store.root, source.name)
    mine = before.samples.filter(pc.equal(before.samples["source"], source.name)).select(samples.READING.names)
    known = samples.READING.empty_table() if rehash else pa.concat_tables([*pending.values(), mine])
    # What another shard has read is still needed.
    everything = source.whole and source.shard == ALL
    ids = source.listing["id"].combine_chunks()
    adopted = [file for file, rows in pending.items() if everything or pc.all(pc.is_in(rows["id"], ids)).as_py()]
    return Plan.make(source.listing, known, present.sha256, retry_failed), present, adopted


def _once(make: Callable[[], Backbone]) -> Callable[[], Backbone]:
    """Make it when it is first asked for, by whichever thread, and only then."""
    lock = Lock()
    made: list[Backbone] = []

    def get() -> Backbone:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get


def _parts(
    plan: Plan,
    backbone: Callable[[], Backbone],
    present: Present,
    seconds: dict[str, float],
    stopped: Stopped,
    progress: Progress,
) -> Iterator[tuple[pa.Table, list[str], NDArray[np.float32]]]:
    """Read and embed what is to do, a part at a time: facts, and the vectors by SHA-256."""
    facts: list[dict[str, Any]] = []
    waiting: dict[str, Any] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    done, begun = 0, time.monotonic()

    def part() -> tuple[pa.Table, list[str], NDArray[np.float32]]:
        some = plan.listing.take(pa.array(plan.todo[done - len(facts) : done]))
        if waiting:
            vectors.update(_embed(backbone(), waiting, seconds))
        stacked = np.stack(list(vectors.values())) if vectors else np.empty((0, 0), np.float32)
        return samples.read_rows(some, facts), list(vectors), stacked

    results = read_all(plan.files, lambda: backbone().transform, present.sha256, lambda: stopped() is not None)
    for result, size in zip(results, plan.sizes.tolist(), strict=False):
        for stage, spent in result.seconds.items():
            seconds[stage] += spent
        facts.extend([result.facts] * size)
        done += size
        if result.pixels is not None and result.facts["sha256"] not in vectors:
            waiting[result.facts["sha256"]] = result.pixels
        if len(waiting) == BATCH:
            vectors |= _embed(backbone(), waiting, seconds)
            waiting = {}
        progress(done, len(plan.todo))
        if len(facts) >= PART or time.monotonic() - begun > PART_SECONDS:
            yield part()
            facts, waiting, vectors, begun = [], {}, {}, time.monotonic()
    if facts:
        yield part()


def _embed(backbone: Backbone, images: dict[str, Any], seconds: dict[str, float]) -> dict[str, NDArray[np.float32]]:
    begun = time.perf_counter()
    vectors = backbone.embed(list(images.values()))
    seconds["model"] += time.perf_counter() - begun
    sick = [key for key, vector in zip(images, vectors, strict=True) if not np.isfinite(vector).all()]
    if sick:
        raise NonFinite(
            f"{backbone.spec['backbone']} gave {len(sick)} of {len(images)} vectors with NaN or infinity, the first "
            f"for the image with sha256 {sick[0]}; check its weights"
        )
    return dict(zip(images, vectors, strict=True))
