"""Images on their way through the models: whole batches, every vector checked, one part after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features import samples
from features.errors import NonFinite
from features.parts import Present
from features.plan import Plan
from features.reading import Crops, read_all
from features.views import Request, View

if TYPE_CHECKING:
    from features.backbones import Backbone

PART = 2048
PART_BYTES = 2**28
PART_SECONDS = 60.0
"""A part is finished at the latest after so many samples, bytes of vectors and seconds; more is never lost."""

Vectors = dict[str, NDArray[np.float32]]
"""By SHA-256 of the image: float32, shape (dim,)."""
Progress = Callable[[int, int, str], None]
"""Called with the samples done, the samples to do, and how busy the stages are."""
Stopped = Callable[[], tuple[str, int] | None]
"""Says whether to end early: why, and with which exit code."""


@dataclass
class Target:
    """A view that a run fills.

    Attributes
    ----------
    name : str
    request : Request
        With the view's precision, if it was ``auto``.
    present : Present
        What the view has.
    view : View or None
        None before there is one.
    decode : dict or None
        The decode policy of the view, or of the one that it has to equal.
    """

    name: str
    request: Request
    present: Present
    view: View | None
    decode: dict[str, Any] | None


@dataclass
class Stream:
    """One model, and the images on their way through it.

    Attributes
    ----------
    targets : list of Target
        One for each layer of the model, in its order.
    load : callable
        Loads the model; called by whichever thread needs it first.
    """

    targets: list[Target]
    load: Callable[[], Backbone]
    loaded: Backbone | None = None
    _lock: Lock = field(default_factory=Lock)
    _waiting: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    _flying: tuple[list[str], list[Any]] | None = None
    _done: list[Vectors] = field(default_factory=list)

    def backbone(self) -> Backbone:
        """Load the model unless it is there."""
        with self._lock:
            self.loaded = self.loaded or self.load()
            return self.loaded

    def lacks(self, sha256: str) -> bool:
        """Whether any of the views has no embedding of an image."""
        return not all(sha256 in target.present.sha256 for target in self.targets)

    def put(self, sha256: str, pixels: dict[str, NDArray[np.uint8]], seconds: dict[str, float]) -> None:
        """Take what this model reads of an image; a batch that is full is embedded."""
        self._done = self._done or [{} for _ in self.targets]
        if sha256 in self._waiting or sha256 in self._done[0] or (self._flying and sha256 in self._flying[0]):
            return
        self._waiting[sha256] = pixels[self.backbone().pixels]
        if len(self._waiting) >= self.backbone().forward.batch:
            self._launch(seconds)

    def bytes(self) -> int:
        """Size of the vectors since the last time."""
        return len(self._done[0]) * sum(self.backbone().dims) * 4 if self._done else 0

    def take(self, seconds: dict[str, float]) -> list[Vectors]:
        """Embed what waits, and hand over all vectors since the last time: one for each view."""
        if self._waiting:
            self._launch(seconds)
        begun = time.perf_counter()
        self._land()
        seconds["model"] += time.perf_counter() - begun
        done, self._done = self._done or [{} for _ in self.targets], []
        return done

    def _launch(self, seconds: dict[str, float]) -> None:
        begun = time.perf_counter()
        outputs = self.backbone().forward(np.stack(list(self._waiting.values())))
        # While a GPU computes this batch, the last one is fetched and the next one is collected.
        self._land()
        self._flying, self._waiting = (list(self._waiting), outputs), {}
        seconds["model"] += time.perf_counter() - begun

    def _land(self) -> None:
        if self._flying is None:
            return
        (keys, outputs), self._flying = self._flying, None
        for target, done, output in zip(self.targets, self._done, outputs, strict=True):
            vectors = output.cpu().numpy()
            if len(sick := np.flatnonzero(~np.isfinite(vectors).all(1))):
                raise NonFinite(
                    f"{target.request.backbone} gave {len(sick)} of {len(keys)} vectors with NaN or infinity, the "
                    f"first for the image with sha256 {keys[sick[0]]}; check its weights, or try fp32 in a new view"
                )
            done.update(zip(keys, vectors, strict=True))


def embed(
    plan: Plan,
    streams: list[Stream],
    seconds: dict[str, float],
    stopped: Stopped,
    progress: Callable[[int], None],
    fetch: Callable[[str], bytes] | None = None,
    trusting: bool = False,
) -> Iterator[tuple[pa.Table, list[tuple[Target, Vectors]]]]:
    """Read what is to do and embed it, a part at a time.

    Parameters
    ----------
    plan : Plan
    streams : list of Stream
    seconds : dict of str to float
        Time spent by stage; grows.
    stopped : callable
    progress : callable
        Called with the samples done.
    fetch : callable, optional
        Gives the bytes of one of the plan's files, where they are not at its path or URL.
    trusting : bool
        Whether images with embeddings are not decoded, and their facts lack what only decoding tells.

    Yields
    ------
    facts : pyarrow.Table
        By `features.samples.READING`.
    vectors : list of (Target, dict)
        For each view what it is to be given.
    """

    def crops(sha256: str) -> Crops | None:
        lacking = [stream.backbone() for stream in streams if stream.lacks(sha256)]
        if trusting and not lacking:
            return None
        return {backbone.pixels: (backbone.crop, backbone.reduced) for backbone in lacking}

    facts: list[dict[str, Any]] = []
    done, begun = 0, time.monotonic()
    results = read_all(plan.files, crops, lambda: stopped() is not None, fetch)
    for result, size in zip(results, plan.sizes.tolist(), strict=False):
        for stage, spent in result.seconds.items():
            seconds[stage] += spent
        facts.extend([result.facts] * size)
        done += size
        for stream in streams if result.pixels else ():
            if stream.lacks(result.facts["sha256"]):
                stream.put(result.facts["sha256"], result.pixels, seconds)
        progress(done)
        large = sum(stream.bytes() for stream in streams) > PART_BYTES
        if large or len(facts) >= PART or time.monotonic() - begun > PART_SECONDS:
            yield _part(plan, facts, done, streams, seconds)
            facts, begun = [], time.monotonic()
    if facts:
        yield _part(plan, facts, done, streams, seconds)


def _part(
    plan: Plan, facts: list[dict[str, Any]], done: int, streams: list[Stream], seconds: dict[str, float]
) -> tuple[pa.Table, list[tuple[Target, Vectors]]]:
    some = plan.listing.take(pa.array(plan.todo[done - len(facts) : done]))
    vectors = [each for stream in streams for each in zip(stream.targets, stream.take(seconds), strict=True)]
    return samples.read_rows(some, facts), vectors
