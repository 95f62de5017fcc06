"""Images to embeddings through a store: what it has is taken from it, what it lacks is embedded and added to it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from features import embedding, fill, parts, samples
from features.embedding import Stream, Target, Vectors
from features.errors import StoreError
from features.parts import Present
from features.plan import Plan
from features.store import FeatureStore
from features.views import Request, View
from pipeline.inputs import Images

if TYPE_CHECKING:
    from features.backbones import Backbone

KEPT = 4
"""Backbones that a process holds; of more, the one used longest ago goes."""

_loaded: dict[tuple[Request, str, str], Backbone] = {}
_loading = Lock()


class _Lacking(Exception):
    """A store has no embedding of an image."""


class Embedded(NamedTuple):
    """What became of cells with images.

    Attributes
    ----------
    there : numpy.ndarray
        bool, shape (cells,): what was embedded.
    vectors : numpy.ndarray
        float32, shape (cells, dim); elsewhere anything.
    reasons : dict of int to str
        Why not, for those cells that have an image.
    """

    there: NDArray[np.bool_]
    vectors: NDArray[np.float32]
    reasons: dict[int, str]


def load(request: Request, device: str, decode: dict[str, Any] | None = None) -> Backbone:
    """Load a backbone, or give the one that this process has loaded for the same request; any thread may use it."""
    asked = (request, device, json.dumps(decode, sort_keys=True))
    with _loading:
        if asked in _loaded:
            backbone = _loaded.pop(asked)
        else:
            from features import backbones

            backbone = backbones.load([request], device, decode, "off")
            # Whoever knows the view asks for what was chosen here.
            exact = json.dumps(backbone.specs[0]["decode"], sort_keys=True)
            backbone = _loaded.setdefault((request.resolved(backbone.precision), device, exact), backbone)
        _loaded[asked] = backbone
        while len({id(each) for each in _loaded.values()}) > KEPT:
            del _loaded[next(iter(_loaded))]
        return backbone


def embed(images: Images, view: View, store: FeatureStore | None, backbone: Callable[[], Backbone]) -> Embedded:
    """Embed images, each content once; those whose embeddings a store has are read, but not decoded.

    Parameters
    ----------
    images : Images
    view : View
        What the embeddings are.
    store : FeatureStore or None
        Gets the new embeddings, part by part; its listing stays as it is.
    backbone : callable
        Loads what gives them; called only if there is something to embed.

    Raises
    ------
    NonFinite
        If the backbone gives NaN or infinity.
    StoreError
        If the store loses embeddings meanwhile.
    """
    view = _view_in(store, view) if store else view
    target = Target(view.name, view.request, Present(), view, view.spec["decode"])
    facts, new = dict[str, dict[str, Any]](), Vectors()
    if store is None:
        for some, vectors in _parts(images, Stream([target], backbone)):
            facts |= some
            target.present.sha256.update(vectors)
            new |= vectors
    else:
        parts.look(store.root, view, target.present)
        try:
            for some, _ in _parts(images, Stream([target], _refuse)):
                facts |= some
        except _Lacking:
            with _alone(store):
                parts.look(store.root, view, target.present)
                for some, vectors in _parts(images, Stream([target], backbone)):
                    facts |= some
                    if vectors:
                        store.add_view(view)
                        fill.add(store, target, vectors)
    told = [facts.get(place or "", {}) for place in images.places]
    keys = [each["sha256"] if each.get("status") == "ok" else None for each in told]
    reasons = {cell: each["error"] for cell, each in enumerate(told) if each.get("error")}
    if store:
        there, matrix = parts.gather(store.root, view, pa.chunked_array([pa.array(keys, pa.string())]))
        if there.sum() < len(keys) - keys.count(None):
            raise StoreError(f"view {view.name!r} lost embeddings while they were read; run again")
        return Embedded(there, matrix, reasons)
    matrix = np.empty((len(keys), view.dim), np.float32)
    for cell, key in enumerate(keys):
        if key is not None:
            matrix[cell] = new[key]
    return Embedded(np.array([key is not None for key in keys]), matrix, reasons)


def _refuse() -> Backbone:
    raise _Lacking


@contextmanager
def _alone(store: FeatureStore) -> Iterator[None]:
    """Let one thread of one of this user's processes pass at a time: others would embed the same images."""
    name = hashlib.sha256(store.root.url.encode()).hexdigest()[:16]
    with ExitStack() as stack:
        # It saves work, and nothing depends on it: some places have no folder, or no locks, for it.
        with suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(Path(tempfile.gettempdir(), f"permafrost-{os.getuid()}-{name}.lock")))
        yield


def _view_in(store: FeatureStore, view: View) -> View:
    """The store's view of that fingerprint; a new one has a longer name if the name is another's."""
    longer = replace(view, name=f"{view.name}-{view.fingerprint[:8]}")
    return fill.alike(store, view) or (longer if store.view(view.name) else view)


def _parts(images: Images, stream: Stream) -> Iterator[tuple[dict[str, dict[str, Any]], Vectors]]:
    """Embed what a stream lacks, part by part: what was read, by place, and the vectors."""
    places = list(dict.fromkeys(place for place in images.places if place is not None))
    if not places:
        return
    column = pa.array(places, pa.string())
    listing = pa.table({"id": column, "uri": column, "version": pa.nulls(len(places), pa.string())})
    plan = Plan.make(listing, samples.READING.empty_table(), set())
    seconds = {"read": 0.0, "decode": 0.0, "model": 0.0}
    run = embedding.embed(plan, [stream], seconds, lambda: None, lambda done: None, images.read, trusting=True)
    for facts, [(_, vectors)] in run:
        yield {fact["id"]: fact for fact in facts.to_pylist()}, vectors
