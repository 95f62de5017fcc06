"""Upkeep of a store: compact its parts, vacuum what nothing refers to; `verify` it.

All of it runs beside extractions, readers and each other. A part is deleted only once each of its rows that is still
referred to lies in a part that the same call wrote after it had listed the first. So of two that rewrite the same
parts at once, neither ever relies on a part that the other is about to delete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features import parts
from features.errors import PermafrostError
from features.files import Root, now
from features.pages import read_vectors
from features.store import FeatureStore
from features.verify import column, files, numbers, require_intact, snapshot_file
from features.verify import verify as verify
from features.views import View

PART_BYTES, LEAST_ROWS = 2**27, 2048  # of vectors in a compacted part
IN_FLIGHT = timedelta(hours=1)
"""For so long a file in `tmp/` may still be one that is being written, whatever the grace."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows to do."""


def compact(store: FeatureStore, progress: Progress = lambda done, total: None) -> dict[str, int]:
    """Merge small parts of every view into larger ones, and drop doubles, of which the first counts.

    Parameters
    ----------
    store : FeatureStore
    progress : callable, optional
        Told of the rows that are done, and of how many there are.

    Returns
    -------
    dict
        ``parts_before``, ``parts_after``, and ``doubles``: how many rows were dropped.

    Examples
    --------
    >>> compact(FeatureStore.open("store"))
    {'parts_before': 1, 'parts_after': 1, 'doubles': 0}
    """
    counts = dict.fromkeys(("parts_before", "parts_after", "doubles"), 0)
    plans = [(view, *_to_merge(store.root, view)) for view in store.views().values()]
    done, total = 0, sum(sum(rows.values()) for _, _, rows in plans)

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    for view, before, rows in plans:
        written, removed, doubles = _rewrite(store.root, view, rows, lambda key: True, advance)
        counts["parts_before"] += before
        counts["parts_after"] += before + written - removed
        counts["doubles"] += doubles
    return counts


def _to_merge(root: Root, view: View) -> tuple[int, dict[str, int]]:
    """How many parts a view has, and the rows of those to be merged."""
    first, rows, doubled = dict[str, str](), dict[str, int](), set[str]()
    for name in parts.names(root, view):
        if not (keys := _keys(root, view, name)):
            continue
        rows[name] = len(keys)
        others = {first.setdefault(key, name) for key in keys} - {name}
        # A double may only be dropped for one that is written anew; the other's part may be about to go.
        doubled |= others | {name} if others or len(set(keys)) < len(keys) else set()
    chosen = doubled | {name for name, count in rows.items() if count < _most_rows(view) / 2}
    return len(rows), {name: rows[name] for name in rows if name in chosen and (doubled or len(chosen) > 1)}


def _rewrite(
    root: Root, view: View, rows: dict[str, int], wanted: Callable[[str], bool], advance: Callable[[int], None]
) -> tuple[int, int, int]:
    """Write what is wanted of some parts anew, then delete them: parts written, parts deleted, rows dropped."""
    buffer = np.empty((min(_most_rows(view), sum(rows.values())), view.dim), np.float32)
    keys, versions, finished, seen = list[str](), list[dict[str, str]](), list[str](), set[str]()
    written = removed = dropped = 0

    def flush() -> None:
        nonlocal written, removed
        if keys:
            parts.write(root, view, keys, buffer[: len(keys)], _joined(versions))
        for name in finished:
            root.remove(f"embeddings/{view.name}/{name}")
        written, removed = written + bool(keys), removed + len(finished)
        for full in (keys, versions, finished):
            full.clear()

    for name in rows:
        advance(rows[name])
        try:
            there, vectors, made_by = _read(root, view, name)
        except FileNotFoundError:
            continue
        new = []
        for row, key in enumerate(there):
            if key not in seen and wanted(key):
                seen.add(key)
                new.append(row)
        dropped += len(there) - len(new)
        while new:
            room = len(buffer) - len(keys)
            here, new = new[:room], new[room:]
            buffer[len(keys) : len(keys) + len(here)] = vectors[here]
            keys += [there[row] for row in here]
            versions.append(made_by)
            if len(keys) == len(buffer):
                flush()
        finished.append(name)
    flush()
    return written, removed, dropped


def _read(root: Root, view: View, name: str) -> tuple[list[str], NDArray[np.float32], dict[str, str]]:
    with parts.opened(root, view, name) as (native, part, meta):
        require_intact(native, name)
        keys = part.read(["sha256"], use_threads=False)["sha256"].to_pylist()
        groups = [read_vectors(native, part, group, view.dim) for group in range(part.num_row_groups)]
        versions: Any = meta["versions"]
        return keys, np.concatenate(groups).view(np.float32).reshape(len(keys), view.dim), versions


def _keys(root: Root, view: View, name: str) -> list[str]:
    """What a part holds; nothing if it is gone."""
    with suppress(FileNotFoundError), parts.opened(root, view, name, ["sha256"]) as (_, part, _meta):
        return list(part.read(["sha256"], use_threads=False)["sha256"].to_pylist())
    return []


def _joined(versions: list[dict[str, str]]) -> dict[str, str]:
    """Versions of libraries: where several made the rows of a part, each of them."""
    pairs = [
        (library, text) for made_by in versions for library, joint in made_by.items() for text in joint.split(", ")
    ]
    return {library: ", ".join(dict.fromkeys(text for of, text in pairs if of == library)) for library, _ in pairs}


def _most_rows(view: View) -> int:
    return max(PART_BYTES // (4 * view.dim), LEAST_ROWS)


def vacuum(store: FeatureStore, keep: int, grace: timedelta) -> dict[str, int]:
    """Remove old snapshots, what no run will adopt any more, and embeddings that nothing refers to.

    An embedding that a run is about to refer to again may go; the next run makes it anew.

    Parameters
    ----------
    store : FeatureStore
    keep : int
        How many of the newest snapshots stay, at least 1; pinned ones stay as well.
    grace : datetime.timedelta
        Nothing younger is removed. Shorter than a run takes, it may take away what that run is about to use.

    Returns
    -------
    dict
        What was removed: ``snapshots``, ``rows``, ``parts`` of dead rows alone, ``pending`` and ``tmp`` files.

    Raises
    ------
    PermafrostError
        If nothing would be kept; as StoreError, if a file is damaged or newer.

    Examples
    --------
    >>> vacuum(FeatureStore.open("store"), keep=10, grace=timedelta(days=7))
    {'snapshots': 0, 'rows': 0, 'parts': 0, 'pending': 0, 'tmp': 0}
    """
    if keep < 1:
        raise PermafrostError(f"--keep {keep} would leave no snapshot; keep at least 1")
    root, before, views = store.root, now() - grace, store.views().values()
    counts = dict.fromkeys(("snapshots", "rows", "parts", "pending", "tmp"), 0)

    for name in map(snapshot_file, numbers(root)[:-keep]):
        with suppress(FileNotFoundError):
            created = column(root, name)[1]["created"]
            if datetime.fromisoformat(created) < before and not root.fs.exists(root.at(name[:-8] + ".pin")):
                root.remove(name)
                counts["snapshots"] += 1
    for name in [name for name in files(root, "pending", ".parquet") if _stamped(name) < before]:
        root.remove(name)
        counts["pending"] += 1
    for name in root.names("tmp") if root.is_local else ():
        with suppress(FileNotFoundError):
            if root.fs.modified(root.at(f"tmp/{name}")) < min(before, now() - IN_FLIGHT):
                root.remove(f"tmp/{name}")
                counts["tmp"] += 1
    alive, looked = set[str](), set[str]()
    for view, name in [(of, name) for of in views for name in parts.names(root, of) if _stamped(name) < before]:
        keys = _keys(root, view, name)
        # Looked at again right before rows go, since a run may just have published.
        if not alive.issuperset(keys):
            _look(root, alive, looked)
        if not alive.issuperset(keys):
            written, removed, dropped = _rewrite(root, view, {name: len(keys)}, alive.__contains__, lambda more: None)
            counts["parts"] += 0 if written else removed
            counts["rows"] += dropped
    return counts


def _look(root: Root, alive: set[str], looked: set[str]) -> None:
    """Bring up to date which images a snapshot or a pending file refers to."""
    # A run publishes first and drops its pending files after, so these are read before snapshots are listed.
    for names in (lambda: files(root, "pending", ".parquet"), lambda: map(snapshot_file, numbers(root))):
        for name in names():
            if name not in looked:
                with suppress(FileNotFoundError):
                    alive.update(column(root, name, "sha256")[0])
                looked.add(name)


def _stamped(name: str) -> datetime:
    """When a file was written, by its name; what has no such name is never old."""
    match = re.search(r"\d{8}T\d{12}Z", name)
    return datetime.strptime(match[0], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC) if match else now()


def parse_grace(text: str) -> timedelta:
    """A span of time such as ``7d``, ``12h``, ``30m`` or ``0``.

    Raises
    ------
    PermafrostError
        If it is none.
    """
    match = re.fullmatch(r"(\d{1,5})([dhm])|0", text.strip())
    if not match:
        raise PermafrostError(f"{text!r} is no span of time; write days, hours or minutes such as 7d, 12h or 30m, or 0")
    units = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
    return int(match[1]) * units[match[2]] if match[1] else timedelta()
