"""The loop: list, read, decode, embed, store, publish.

A run embeds what is listed and readable and not yet in the view. Whatever an earlier run did not finish is
therefore done by the next, and a run with nothing to do loads no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import samples
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
        Pending files that are needless once `rows` are published.
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
    samples.require_same_types(_of_others(before.samples, source.name), source.listing, source.name)
    filled = fill(source, store, request, view or request.view_name, device, progress)
    published = store.publish(source.name, filled.rows, source.listed_at, source.whole)
    store.refresh_listing()
    store.drop_pending(filled.pending)
    record = {
        "command": "extract",
        "source": source.name,
        "view": filled.view.name,
        "snapshot": (published or before).number,
        "published": published is not None,
        **filled.counts,
        "seconds": {stage: round(spent, 3) for stage, spent in filled.seconds.items()},
        "total_seconds": round(time.perf_counter() - started, 3),
        "versions": {library: version(library) for library in ("permafrost", *LIBRARIES)},
    }
    store.record_run(record)
    return record


def fill(
    source: Source,
    store: FeatureStore,
    request: Request,
    name: str,
    device: str = "auto",
    progress: Progress = lambda done, total: None,
) -> Filled:
    """Embed what a source has and a view has not, and publish nothing; see `extract`."""
    plan, present, pending = look_ahead(source, store, name)
    view, backbone = store.view(name), None
    seconds = dict.fromkeys(STAGES, 0.0)
    if view is None or len(plan.todo) or not request.same_as(view.request):
        from features import backbones

        begun = time.perf_counter()
        backbone = backbones.load(request, device)
        view = store.add_view(View(name, backbone.spec, backbone.dim, request))
        seconds["load"] += time.perf_counter() - begun
    read, embedded = [], 0
    for facts, sha256, vectors in _parts(plan, backbone, present, seconds, progress) if backbone else ():
        begun = time.perf_counter()
        embedded += store.add_part(view, sha256, vectors, present, {lib: version(lib) for lib in LIBRARIES})
        read.append(facts)
        pending.append(store.keep_pending(source.name, facts))
        seconds["write"] += time.perf_counter() - begun
    rows = plan.rows(source.name, read)
    failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
    counts = {"listed": len(rows), "opened": len(plan.todo), "embedded": embedded, "failed": failed}
    return Filled(view, rows, pending, counts, seconds)


def preview(source: Source, store: FeatureStore, view: str) -> dict[str, Any]:
    """What a run would do: samples ``listed``, ``to_open``, and ``gone`` from the listing; writes nothing."""
    plan, _, _ = look_ahead(source, store, view)
    listed = store.snapshot().samples
    before = listed.filter(pc.equal(listed["source"], source.name))["id"]
    gone = len(set(before.to_pylist()) - set(source.listing["id"].to_pylist())) if source.whole else 0
    return {"source": source.name, "view": view, "listed": len(source.listing), "to_open": len(plan.todo), "gone": gone}


def look_ahead(source: Source, store: FeatureStore, view: str) -> tuple[Plan, Present, list[str]]:
    """Plan a run: what it would open, what the view has, and which pending files it builds on."""
    present = Present()
    store.look(view, present)
    listed = store.snapshot().samples
    kept, pending = store.pending(source.name)
    mine = listed.filter(pc.equal(listed["source"], source.name)).select(kept.column_names)
    return Plan.make(source.listing, pa.concat_tables([kept, mine]), present.sha256), present, pending


def _of_others(listed: pa.Table, source: str) -> pa.Table:
    return listed.filter(pc.not_equal(listed["source"], source))


def _parts(
    plan: Plan, backbone: Backbone, present: Present, seconds: dict[str, float], progress: Progress
) -> Iterator[tuple[pa.Table, list[str], NDArray[np.float32]]]:
    """Read and embed what is to do, a part at a time: facts, and the vectors by SHA-256."""
    for start in range(0, len(plan.todo), PART):
        some = plan.listing.take(pa.array(plan.todo[start : start + PART]))
        facts: list[dict[str, Any]] = []
        waiting: dict[str, Any] = {}
        vectors: dict[str, NDArray[np.float32]] = {}
        for reading in read_all(some["uri"].to_pylist(), backbone.transform, present.sha256):
            for stage, spent in reading.seconds.items():
                seconds[stage] += spent
            facts.append(reading.facts)
            if reading.pixels is not None and reading.facts["sha256"] not in vectors:
                waiting[reading.facts["sha256"]] = reading.pixels
            if len(waiting) == BATCH or (waiting and len(facts) == len(some)):
                vectors |= _embed(backbone, waiting, seconds)
                waiting = {}
            progress(start + len(facts), len(plan.todo))
        stacked = np.stack(list(vectors.values())) if vectors else np.empty((0, backbone.dim), np.float32)
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
