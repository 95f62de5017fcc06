"""Samples to facts and pixels: read, hash, decode and transform in threads, handed on in order."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from features import images, samples, sources
from features.errors import ImageError

THREADS = os.cpu_count() or 1
AHEAD = 128
"""How many results may wait to be taken; bounds memory."""

Transform = Callable[[], Callable[[Image], Any]]


@dataclass(frozen=True)
class Reading:
    """What reading one sample told.

    Attributes
    ----------
    facts : dict
        A value for each of `features.samples.READ`.
    pixels : torch.Tensor or None
        What the backbone reads; None for a failure, and where the embedding is there already.
    seconds : dict of str to float
        Time spent on ``read`` and ``decode``, the transform included.
    """

    facts: dict[str, Any]
    pixels: Any
    seconds: dict[str, float]


def read_all(uris: list[str], transform: Transform, present: set[str]) -> Iterator[Reading]:
    """Read samples in threads.

    Parameters
    ----------
    uris : list of str
    transform : callable
        Gives the backbone's transform; asked only where an image needs pixels, so that the model can wait till then.
    present : set of str
        SHA-256 of the images that need no pixels; may grow while this runs.

    Yields
    ------
    Reading
        One for each of `uris`, in their order, whichever thread is done first.
    """
    pool = ThreadPoolExecutor(THREADS)
    running: deque[Future[Reading]] = deque()
    try:
        for uri in uris:
            running.append(pool.submit(_read, uri, transform, present))
            if len(running) > AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(uri: str, transform: Transform, present: set[str]) -> Reading:
    facts: dict[str, Any] = dict.fromkeys(samples.READ) | {"status": "ok"}
    seconds, pixels = {"read": 0.0, "decode": 0.0}, None
    try:
        begun = time.perf_counter()
        data = sources.read(uri)
        facts |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        seconds["read"] = time.perf_counter() - begun
        to_pixels = None if facts["sha256"] in present else transform()
        begun = time.perf_counter()
        image = images.decode(data)
        facts |= {"width": image.width, "height": image.height, "format": image.format}
        if to_pixels:
            pixels = to_pixels(image)
        seconds["decode"] = time.perf_counter() - begun
    except ImageError as error:
        facts |= {"status": "failed", "error": str(error)}
    except MemoryError:
        facts |= {"status": "failed", "error": "out_of_memory: transforming it needs more memory than there was"}
    return Reading(facts, pixels, seconds)
