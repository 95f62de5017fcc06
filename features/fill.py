"""Views brought up to date with a source: what is missing, which models give it, and what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features import embedding, parts, runs, samples
from features.embedding import Progress, Stopped, Stream, Target, Vectors
from features.errors import BackboneError, Interrupted
from features.parts import Present
from features.plan import Plan
from features.reading import threads_for
from features.shards import ALL
from features.sources import Source
from features.store import FeatureStore, Snapshot
from features.views import AUTO, Request, View

if TYPE_CHECKING:
    from features.backbones import Backbone


@dataclass(frozen=True)
class Ahead:
    """What there is to do.

    Attributes
    ----------
    plan : Plan
    targets : list of Target
    adopted : list of str
        Pending files that are needless after this run.
    """

    plan: Plan
    targets: list[Target]
    adopted: list[str]


@dataclass(frozen=True)
class Filled:
    """What `fill` leaves to publish.

    Attributes
    ----------
    views : list of View
    rows : pyarrow.Table
        The source's listing, by `features.samples.SCHEMA`.
    pending : list of str
        Pending files that this run wrote; needless once `rows` are published.
    counts : dict of str to int
        Samples ``listed``, ``opened`` and ``failed``, and vectors ``embedded``.
    seconds : dict of str to float
        Time spent by stage, as `features.runs.STAGES` tells; ``load`` is that of the models, compilation included.
    readers : int
        Threads that read.
    device : str or None
        Where the models ran; None if none did.
    """

    views: list[View]
    rows: pa.Table
    pending: list[str]
    counts: dict[str, int]
    seconds: dict[str, float]
    readers: int
    device: str | None


def look_ahead(
    source: Source,
    store: FeatureStore,
    requests: Mapping[str, Request],
    before: Snapshot,
    *,
    rehash: bool = False,
    retry_failed: bool = False,
    expected: View | None = None,
) -> Ahead:
    """Plan a run that fills views; see `extract`.

    Parameters
    ----------
    source : Source
    store : FeatureStore
    requests : dict of str to Request
        By the name of the view.
    before : Snapshot
    rehash, retry_failed : bool
    expected : View, optional
        What the views have to equal.

    Raises
    ------
    ViewMismatch
        If one does not.
    """
    targets = []
    for name, request in requests.items():
        view, present = store.view(name), Present()
        if view:
            parts.look(store.root, view, present)
        if view and expected:
            expected.require(view.spec, "use another --store")
        known = view or expected
        resolved = request.resolved(known.request.precision) if known else request
        targets.append(Target(name, resolved, present, view, known.spec.get("decode") if known else None))
    pending = runs.kept(store.root, source.name)
    mine = before.samples.filter(pc.equal(before.samples["source"], source.name)).select(samples.READING.names)
    known_rows = samples.READING.empty_table() if rehash else pa.concat_tables([*pending.values(), mine])
    # What another shard has read is still needed.
    everything = source.whole and source.shard == ALL
    ids = source.listing["id"].combine_chunks()
    adopted = [file for file, rows in pending.items() if everything or pc.all(pc.is_in(rows["id"], ids)).as_py()]
    in_all = set.intersection(*(target.present.sha256 for target in targets))
    return Ahead(Plan.make(source.listing, known_rows, in_all, retry_failed), targets, adopted)


def fill(
    source: Source,
    store: FeatureStore,
    ahead: Ahead,
    *,
    device: str = AUTO,
    compile: str = AUTO,
    stopped: Stopped = lambda: None,
    progress: Progress = lambda done, total, busy: None,
    expected: View | None = None,
) -> Filled:
    """Embed what a source has and views have not, and publish nothing; see `extract`.

    With `expected`, no view of another spec is made.
    """
    if compile not in (AUTO, "on", "off"):
        raise BackboneError(f"--compile {compile!r} is unknown; use auto, on, off")
    plan, seconds = ahead.plan, dict.fromkeys(("load", "read", "decode", "model", "write"), 0.0)
    streams = []
    for targets in _by_model(ahead.targets):
        load = partial(_load, store, targets, device, compile, len(plan.files), expected, seconds)
        streams.append(Stream(targets, load))
        if not all(target.view and target.request.same_as(target.view.request) for target in targets):
            streams[-1].backbone()
    # Only once all that is asked for is known to be possible.
    for target in [target for stream in streams if stream.loaded for target in stream.targets]:
        target.view = store.add_view(_known(target.view))
    readers = threads_for(plan.files)
    read, pending, embedded, begun = [], list[str](), 0, time.monotonic() - seconds["load"]

    def tell(done: int) -> None:
        seconds["elapsed"] = time.monotonic() - begun - seconds["load"]
        progress(done, len(plan.todo), runs.busy_line(seconds, readers))

    for facts, vectors in embedding.embed(plan, streams, seconds, stopped, tell):
        since = time.perf_counter()
        for target, some in vectors:
            embedded += add(store, target, some)
        read.append(facts)
        pending.append(runs.keep(store.root, source.name, facts))
        seconds["write"] += time.perf_counter() - since
    done = sum(map(len, read))
    if done < len(plan.todo):
        why, code = stopped() or ("", 1)
        raise Interrupted(f"{why}: {done:,} of {len(plan.todo):,} samples are done and kept; run again to go on", code)
    seconds["elapsed"] = time.monotonic() - begun - seconds["load"]
    rows = plan.rows(source.name, read)
    failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
    counts = {"listed": len(rows), "opened": len(plan.todo), "embedded": embedded, "failed": failed}
    ran_on = next((f"{stream.loaded.forward.device}" for stream in streams if stream.loaded), None)
    views = [target.view for target in ahead.targets if target.view]
    return Filled(views, rows, pending, counts, seconds, readers, ran_on)


def fill_as(
    view: View,
    source: Source,
    store: FeatureStore,
    *,
    weights: str | None = None,
    device: str = AUTO,
    progress: Progress = lambda done, total, busy: None,
) -> Filled:
    """Embed what a source has as a view does that may be another store's, and list nothing.

    Parameters
    ----------
    view : View
    source : Source
    store : FeatureStore
        Embeddings in it are not computed again, and new ones are added to it.
    weights : str, optional
        Where the weight file is now.
    device : str
    progress : callable, optional

    Raises
    ------
    ViewMismatch
        If the weights, or the store's view of that name, are not those of the view.
    """
    request = view.request
    if weights:
        request = replace(Request.parse(request.backbone, weights), layer=request.layer, pooling=request.pooling)
        request = request.resolved(view.request.precision)
    same = alike(store, view) or view
    ahead = look_ahead(source, store, {same.name: request}, store.snapshot(), expected=view)
    filled = fill(source, store, ahead, device=device, progress=progress, expected=view)
    # What is not listed is in no snapshot, so that none will ever make these files needless.
    runs.drop(store.root, filled.pending)
    return filled


def alike(store: FeatureStore, wanted: View) -> View | None:
    """The view of a store with the fingerprint of another view; of several the one with the most embeddings."""
    same = [view for view in store.views().values() if view.fingerprint == wanted.fingerprint]
    if len(same) < 2:
        return same[0] if same else None
    held = {view.name: sum(len(keys) for _, keys in parts.keys(store.root, view, set())) for view in same}
    return max(same, key=lambda view: (held[view.name], view.name == wanted.name))


def _by_model(targets: list[Target]) -> list[list[Target]]:
    """Those that one forward pass serves: they differ in layer and pooling alone."""
    groups: dict[tuple[Request, str], list[Target]] = {}
    for target in targets:
        groups.setdefault((replace(target.request, layer="", pooling=""), f"{target.decode}"), []).append(target)
    return list(groups.values())


def _load(
    store: FeatureStore,
    targets: list[Target],
    device: str,
    compile: str,
    images: int,
    expected: View | None,
    seconds: dict[str, float],
) -> Backbone:
    import torch

    from features import backbones

    begun = time.perf_counter()
    requests = [target.request for target in targets]
    try:
        loaded = backbones.load(requests, device, targets[0].decode, compile, images)
    except torch.OutOfMemoryError:
        raise BackboneError(f"{requests[0].backbone} does not fit into the GPU's memory; use --device cpu") from None
    for target, spec, dim in zip(targets, loaded.specs, loaded.dims, strict=True):
        # By now a run beside this one, on other hardware, may have made the view that both of them lacked.
        view = target.view or store.view(target.name)
        if view and target.view is None and target.request.resolved(view.request.precision) != target.request:
            for each in targets:
                each.request = each.request.resolved(view.request.precision)
            return _load(store, targets, device, compile, images, expected, seconds)
        if expected:
            expected.require(spec, "name the weight file that made them with --weights")
        if view:
            view.require(spec)
        target.view = view or View(target.name, spec, dim, target.request.resolved(loaded.precision))
    seconds["load"] += time.perf_counter() - begun
    return loaded


def _known(view: View | None) -> View:
    assert view, "its model was loaded, or it was there"
    return view


def add(store: FeatureStore, target: Target, vectors: Vectors) -> int:
    """Write a part, unless there is nothing new; returns how many vectors it has."""
    if not vectors:
        return 0
    versions = {library: version(library) for library in runs.LIBRARIES}
    return parts.add(
        store.root, _known(target.view), list(vectors), np.stack(list(vectors.values())), target.present, versions
    )
