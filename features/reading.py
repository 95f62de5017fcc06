"""Samples to facts and pixels: read, hash, decode and crop in threads, handed on in order.

Nothing that a file, a disk or a server does may hold a run up: whoever takes too long becomes a failed row, and the
thread that waits for it is left behind.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from PIL.Image import Image

from features import images, locations, samples
from features.errors import ImageError

THREADS = os.cpu_count() or 1
CONNECTIONS = max(THREADS, 16)
"""Threads where the bytes come from another machine, since most of them wait."""
AHEAD = 256
"""How many results may wait to be taken: two of a GPU's batches. Bounds memory."""
SECONDS_TO_READ = 60.0
SECONDS_TO_DECODE = 10.0
SECONDS_TO_END = 5.0
THREAD = "permafrost-read"
DELAYS = (0.5, 2.0)
"""Seconds before what was unreachable is tried again."""
HOPELESS = 50
"""Once so many were tried again in vain, there is no more waiting."""

Crops = dict[str, tuple[Callable[[Image], Any], bool]]
"""By name: what makes pixels of an image, and whether `features.images.REDUCED` is how it is decoded."""


@dataclass(frozen=True)
class Reading:
    """What reading one sample told.

    Attributes
    ----------
    facts : dict
        A value for each of `features.samples.READ`.
    pixels : dict of str to numpy.ndarray
        What backbones read, by name; empty for a failure, and where the embeddings are there already.
    seconds : dict of str to float
        Time that ``read`` took, and of a core that ``decode`` took, cropping included.
    """

    facts: dict[str, Any]
    pixels: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Job:
    """One sample to read; its deadline is infinite while nobody is to blame."""

    uri: str
    done: Event = field(default_factory=Event)
    deadline: float = math.inf
    result: Reading | BaseException | None = None
    left: bool = False

    def may_take(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds


def threads_for(uris: list[str]) -> int:
    """How many threads read."""
    return THREADS if all(locations.local_path(uri) is not None for uri in uris) else CONNECTIONS


def read_all(
    uris: list[str],
    crops: Callable[[str], Crops | None],
    stopped: Callable[[], bool] = lambda: False,
    fetch: Callable[[str], bytes] | None = None,
) -> Iterator[Reading]:
    """Read samples in threads.

    Parameters
    ----------
    uris : list of str
    crops : callable
        Says by the SHA-256 of an image which pixels are needed of it, or None if it need not even be decoded; it may
        load a model first.
    stopped : callable, optional
        Whether to end early.
    fetch : callable, optional
        Gives the bytes of one of `uris`, or raises ImageError; by default those at a path or URL.

    Yields
    ------
    Reading
        One for each of `uris`, in their order, whichever thread is done first.
    """
    jobs: SimpleQueue[_Job | None] = SimpleQueue()
    waiting: deque[_Job] = deque()
    threads: list[Thread] = []
    hopeless: list[str] = []
    one_large = Lock()

    def work() -> None:
        while job := jobs.get():
            try:
                job.result = _read(job, fetch or locations.read, crops, hopeless, one_large)
            except BaseException as error:  # Whoever takes the result raises it.
                job.result = error
            job.done.set()
            if job.left:
                return

    def start() -> None:
        # Daemons, since a thread that hangs would keep the process from its end.
        threads.append(Thread(target=work, name=THREAD, daemon=True))
        threads[-1].start()

    def taken() -> Reading | None:
        job = waiting.popleft()
        while not job.done.wait(0.1):
            if stopped():
                return None
            if time.monotonic() > job.deadline:
                job.left = True
                start()
                return Reading(_failed("timeout: reading it took too long"))
        if isinstance(job.result, BaseException):
            raise job.result
        return None if stopped() else job.result

    for _ in range(threads_for(uris)):
        start()
    try:
        for place, uri in enumerate(uris):
            waiting.append(_Job(uri))
            jobs.put(waiting[-1])
            while len(waiting) > AHEAD or (waiting and place == len(uris) - 1):
                reading = taken()
                if reading is None:
                    return
                yield reading
    finally:
        with suppress(Empty):
            while True:
                jobs.get_nowait()
        for _ in threads:
            jobs.put(None)
        # An interpreter that ends beside threads in foreign code may abort; but who hangs is not waited for.
        patience = time.monotonic() + SECONDS_TO_END
        for thread in threads:
            thread.join(max(0.0, patience - time.monotonic()))


def _read(
    job: _Job,
    fetch: Callable[[str], bytes],
    crops: Callable[[str], Crops | None],
    hopeless: list[str],
    one_large: Lock,
) -> Reading:
    @contextmanager
    def alone() -> Iterator[None]:
        job.deadline = math.inf
        # Whoever hangs in there is left behind, and the others must not wait for it.
        entered = one_large.acquire(timeout=2 * SECONDS_TO_DECODE)
        try:
            job.may_take(SECONDS_TO_DECODE)
            yield
        finally:
            if entered:
                one_large.release()

    facts: dict[str, Any] = dict.fromkeys(samples.READ) | {"status": "ok"}
    seconds, pixels = {"read": 0.0, "decode": 0.0}, dict[str, Any]()
    try:
        begun = time.perf_counter()
        data = _fetch(job, fetch, hopeless)
        facts |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        seconds["read"] = time.perf_counter() - begun
        job.deadline = math.inf
        wanted = crops(facts["sha256"])
        begun = time.thread_time()
        # Whoever wants no pixels has it checked nonetheless.
        for reduced in () if wanted is None else {reduced for _, reduced in wanted.values()} or {True}:
            job.may_take(SECONDS_TO_DECODE)
            decoded = images.decode(data, alone(), reduced)
            facts |= {"width": decoded.width, "height": decoded.height, "format": decoded.format}
            pixels |= {name: crop(decoded.image) for name, (crop, how) in (wanted or {}).items() if how == reduced}
        seconds["decode"] = time.thread_time() - begun
    except ImageError as error:
        facts |= {"status": "failed", "error": str(error)}
    except MemoryError:
        facts |= {"status": "failed", "error": "out_of_memory: cropping it needs more memory than there was"}
    return Reading(facts, pixels if facts["status"] == "ok" else {}, seconds)


def _fetch(job: _Job, fetch: Callable[[str], bytes], hopeless: list[str]) -> bytes:
    for delay in (*DELAYS, None):
        job.may_take(SECONDS_TO_READ)
        try:
            return fetch(job.uri)
        except ImageError as error:
            if error.code != "unreachable" or delay is None or len(hopeless) >= HOPELESS:
                hopeless += [job.uri] if error.code == "unreachable" else []
                raise
        job.deadline = math.inf
        time.sleep(delay)
    raise AssertionError("the last delay is None")


def _failed(error: str) -> dict[str, Any]:
    return dict.fromkeys(samples.READ) | {"status": "failed", "error": error}
