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

from features import runs, samples
from features.errors import NonFinite
from features.plan import Plan
from features.reading import read_all
from features.sources import Source
from features.store import FeatureStore, Present
from features.views import Request, View

if TYPE_CHECKING:
    from features.backbones import Backbone

BATCH = 64
PART = 2048
STAGES = ("load", "read", "decode", "model", "write")
LIBRARIES = ("torch", "torchvision", "pillow", "numpy", "pyarrow")

Progress = Callable[[int, int], None]
"""Called with the samples done and the samples to do."""


@dataclass(frozen=True)
class Filled:
    """What `fill` leaves to publish.

    Attributes
    ----------
    view : View
    rows : pyarrow.Table
        The source's listing, by `features.samples.SCHEMA`.
    pending : list of str
        Pending files that this run wrote.
    adopted : list of str
        Pending files of earlier runs that it built on. All are needless once `rows` are published.
    counts : dict of str to int
        Samples ``listed``, ``opened``, ``embedded`` and ``failed``.
    seconds : dict of str to float
        Time spent by stage; that of ``read`` and ``decode`` adds up over threads.
    """

    view: View
    rows: pa.Table
    pending: list[str]
    adopted: list[str]
    counts: dict[str, int]
    seconds: dict[str, float]


def extract(
    source: Source,
    store: FeatureStore,
    request: Request,
    *,
    view: str | None = None,
    device: str = "auto",
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
    progress : callable, optional

    Returns
    -------
    dict
        The record that is also kept in the store: counts, seconds, versions.

    Raises
    ------
    SourceError
        If a column clashes with the store's.
    BackboneError
        If the backbone cannot be loaded.
    ViewMismatch
        If the view holds embeddings of another spec.
    NonFinite
        If the backbone gives NaN or infinity.
    """
    started = time.perf_counter()
    before = store.snapshot()
    gone = samples.replaced(before.samples, source.name, source.listing["id"], source.whole)
    samples.require_same_types(before.samples.filter(pc.invert(gone)), source.listing, source.name)
    filled = fill(source, store, request, view or request.view_name, device=device, progress=progress)
    snapshot, outcome = store.publish(source.name, filled.rows, source.listed_at, source.whole)
    store.refresh_listing()
    runs.drop(store.root, [*filled.pending, *filled.adopted])
    record = {
        "command": "extract",
        "source": source.name,
        "view": filled.view.name,
        "snapshot": snapshot.number,
        "outcome": outcome,
        **filled.counts,
        "seconds": {stage: round(spent, 3) for stage, spent in filled.seconds.items()},
        "total_seconds": round(time.perf_counter() - started, 3),
        "versions": {library: version(library) for library in ("permafrost", *LIBRARIES)},
    }
    runs.record(store.root, record)
    return record


def fill(
    source: Source,
    store: FeatureStore,
    request: Request,
    name: str,
    *,
    expected: View | None = None,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
) -> Filled:
    """Embed what a source has and a view has not, and publish nothing; see `extract`.

    With `expected`, any view that has another spec than that one is refused, and none such is made.
    """
    plan, present, adopted = look_ahead(source, store, name)
    view = store.view(name)
    if expected and view:
        expected.require(view.spec)
    seconds = dict.fromkeys(STAGES, 0.0)

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
    for facts, sha256, vectors in _parts(plan, backbone, present, seconds, progress):
        begun = time.perf_counter()
        embedded += store.add_part(view, sha256, vectors, present, {lib: version(lib) for lib in LIBRARIES})
        read.append(facts)
        pending.append(runs.keep(store.root, source.name, facts))
        seconds["write"] += time.perf_counter() - begun
    rows = plan.rows(source.name, read)
    failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
    counts = {"listed": len(rows), "opened": len(plan.todo), "embedded": embedded, "failed": failed}
    return Filled(view, rows, pending, adopted, counts, seconds)


def preview(source: Source, store: FeatureStore, view: str) -> dict[str, Any]:
    """What a run would do: samples ``listed``, ``to_open``, and ``gone`` from the listing; writes nothing."""
    plan, _, _ = look_ahead(source, store, view)
    listed = store.snapshot().samples
    before = listed.filter(pc.equal(listed["source"], source.name))["id"]
    gone = len(set(before.to_pylist()) - set(source.listing["id"].to_pylist())) if source.whole else 0
    return {"source": source.name, "view": view, "listed": len(source.listing), "to_open": len(plan.todo), "gone": gone}


def look_ahead(source: Source, store: FeatureStore, name: str) -> tuple[Plan, Present, list[str]]:
    """Plan a run: what it would open, what the view has, and which pending files it builds on."""
    present, view = Present(), store.view(name)
    if view:
        store.look(view, present)
    listed = store.snapshot().samples
    kept, pending = runs.kept(store.root, source.name)
    mine = listed.filter(pc.equal(listed["source"], source.name)).select(kept.column_names)
    return Plan.make(source.listing, pa.concat_tables([kept, mine]), present.sha256), present, pending


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
    plan: Plan, backbone: Callable[[], Backbone], present: Present, seconds: dict[str, float], progress: Progress
) -> Iterator[tuple[pa.Table, list[str], NDArray[np.float32]]]:
    """Read and embed what is to do, a part at a time: facts, and the vectors by SHA-256."""
    for start in range(0, len(plan.todo), PART):
        some = plan.listing.take(pa.array(plan.todo[start : start + PART]))
        facts: list[dict[str, Any]] = []
        waiting: dict[str, Any] = {}
        vectors: dict[str, NDArray[np.float32]] = {}
        for reading in read_all(some["uri"].to_pylist(), lambda: backbone().transform, present.sha256):
            for stage, spent in reading.seconds.items():
                seconds[stage] += spent
            facts.append(reading.facts)
            if reading.pixels is not None and reading.facts["sha256"] not in vectors:
                waiting[reading.facts["sha256"]] = reading.pixels
            if len(waiting) == BATCH or (waiting and len(facts) == len(some)):
                vectors |= _embed(backbone(), waiting, seconds)
                waiting = {}
            progress(start + len(facts), len(plan.todo))
        stacked = np.stack(list(vectors.values())) if vectors else np.empty((0, 0), np.float32)
        yield samples.read_rows(some, facts), list(vectors), stacked


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
