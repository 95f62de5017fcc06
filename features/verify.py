"""Whether a store is sound: everything is read again and held against its checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features import parts
from features.errors import PermafrostError, StoreError
from features.files import Root, now
from features.pages import read_vectors
from features.parquet import decode, open_file
from features.parts import FORMAT
from features.store import FeatureStore
from features.views import View

LAG = timedelta(minutes=10)
"""For so long after a snapshot was made, its run may still be copying it to `samples.parquet`."""
DAMAGE = (pa.ArrowException, OSError, KeyError, IndexError, TypeError, ValueError)
"""What reading a damaged file raises."""


def verify(store: FeatureStore) -> list[str]:
    """Read everything again, and hold it against its checksums.

    Parameters
    ----------
    store : FeatureStore

    Returns
    -------
    list of str
        A line with the remedy for each file that is not as it was written; none if the store is sound.

    Examples
    --------
    >>> verify(FeatureStore.open("store"))
    []
    """
    root, digests, found = store.root, dict[int, str](), list[str]()
    found += _check(lambda: ["store.json"], lambda name: _store_json(root, name))
    for view in root.names("embeddings"):
        found += _verify_view(store, view)
    found += _check(lambda: files(root, "snapshots", ".parquet"), lambda name: _snapshot(root, name, digests))
    found += _check(lambda: files(root, "snapshots", ".pin"), lambda name: _pin(root, name, digests))
    found += _check(lambda: files(root, "pending", ".parquet"), lambda name: _pending(root, name))
    return found + _check(lambda: ["samples.parquet"], lambda name: _listing(root, name))


def _check(names: Callable[[], list[str]], check: Callable[[str], str | None]) -> list[str]:
    """Check files, those included that come meanwhile; whatever vanishes is no problem."""
    done, found = set[str](), list[str]()
    while left := [name for name in names() if name not in done]:
        for name in left:
            done.add(name)
            try:
                problem = check(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                problem = f"cannot be read ({error.strerror or error}); look at the disk and at its permissions"
            # What Arrow says may have several lines.
            found += [" ".join(f"{name}: {problem}".split())] if problem else []
    return found


def files(root: Root, directory: str, suffix: str) -> list[str]:
    """Files in a directory, by their paths in the store."""
    return [f"{directory}/{name}" for name in root.names(directory) if name.endswith(suffix)]


def _store_json(root: Root, name: str) -> str | None:
    try:
        sound = isinstance(found := root.read_json(name).get("format"), int) and 0 < found <= FORMAT
    except StoreError:
        sound = False
    return None if sound else f'is missing or damaged; write {{"format": {FORMAT}}} into it'


def _verify_view(store: FeatureStore, name: str) -> list[str]:
    root, folder, views = store.root, f"embeddings/{name}", list[View]()

    def described(file: str) -> str | None:
        try:
            view = store.view(name)
        except (PermafrostError, AttributeError, *DAMAGE) as error:
            return f"is damaged ({error}); restore it from a backup, or remove {folder} and extract again"
        if view is not None and view.name == name:
            views.append(view)
        elif view is not None or files(root, folder, ".parquet"):
            return f"is missing or of another view; restore it, or remove {folder} and extract again"
        return None

    found = _check(lambda: [f"{folder}/_view.json"], described)
    for view in views:
        found += _check(lambda: files(root, folder, ".parquet"), lambda file: _part(root, view, file))  # noqa: B023
    return found


def _part(root: Root, view: View, file: str) -> str | None:
    try:
        with parts.opened(root, view, file.rpartition("/")[2]) as (native, part, _):
            require_intact(native, file)
            keys = part.read(["sha256"], use_threads=False)["sha256"]
            rows = 0
            for group in range(part.num_row_groups):
                vectors = read_vectors(native, part, group, view.dim).view(np.float32)
                rows += len(vectors)
                if not np.isfinite(vectors).all():
                    return "holds NaN or infinity; remove it, and look at the weights before the next run"
            if not rows == len(keys) == part.metadata.num_rows:
                return f"has {len(keys):,} keys and {rows:,} vectors; remove it, and the next run makes it anew"
            if keys.null_count or not pc.all(pc.match_substring_regex(keys, "^[0-9a-f]{64}$"), min_count=0).as_py():
                return "has keys that are no SHA-256; remove it, and the next run makes it anew"
    except StoreError as error:
        return str(error)
    return None


def require_intact(native: pa.NativeFile, file: str) -> None:
    """Check that a part is what its name says; page checksums leave out the headers.

    Raises
    ------
    StoreError
        If it is not.
    """
    native.seek(0)
    digest = hashlib.sha256()
    while block := native.read(2**20):
        digest.update(block)
    if not file.endswith(f"-{digest.hexdigest()[:16]}.parquet"):
        raise StoreError(
            f"part {file} is not what the digest in its name says; remove it, and the next run makes it anew"
        )


def _snapshot(root: Root, name: str, digests: dict[int, str]) -> str | None:
    content = root.read(name)
    try:
        number, (_, meta) = int(name[10:-8]), decode(content)
        if meta["format"] > FORMAT:
            return f"has format {meta['format']}, this permafrost reads up to {FORMAT}; upgrade permafrost"
        if meta["number"] != number:
            return f"says that it is snapshot {meta['number']}; restore it from a backup"
    except DAMAGE as error:
        return f"is damaged ({error}); restore it from a backup (samples.parquet is a copy of the newest)"
    digests[number] = hashlib.sha256(content).hexdigest()
    before = digests.get(number - 1)
    if before and meta.get("previous") and meta["previous"] != before:
        return f"followed another {snapshot_file(number - 1)} than is there; restore that from a backup"
    return None


def _pin(root: Root, name: str, digests: dict[int, str]) -> str | None:
    content = root.read(name)
    try:
        number, digest = int(name[10:-4]), json.loads(content)["digest"]
    except DAMAGE:
        return "is damaged; restore it, or remove it if its bundle is needed no more"
    snapshot = snapshot_file(number)
    try:
        found = digests.get(number) or hashlib.sha256(root.read(snapshot)).hexdigest()
    except FileNotFoundError:
        return f"pins {snapshot}, which is gone; restore that from a backup, or remove the pin"
    return None if digest == found else f"pins other bytes than {snapshot} has; restore that from a backup"


def _pending(root: Root, name: str) -> str | None:
    content = root.read(name)
    try:
        decode(content)
    except DAMAGE as error:
        return f"is damaged ({error}); remove it, and the next run reads those samples again"
    return None


def _listing(root: Root, name: str) -> str | None:
    seen, problem = -1, None
    # A run may be publishing: what differs is looked at again, until no newer snapshot came meanwhile.
    while seen != (newest := max(numbers(root), default=0)):
        seen, problem = newest, _difference(root, name, newest)
        if problem is None:
            return None
    return problem


def _difference(root: Root, name: str, newest: int) -> str | None:
    snapshot = root.read(snapshot_file(newest)) if newest else b""
    copy = root.read(name) if name in root.names("") else b""
    if copy == snapshot:
        return None
    if not newest:
        return "is a copy of a snapshot, but there is none; restore snapshots/ from a backup"
    try:
        created = datetime.fromisoformat(decode(snapshot)[1]["created"])
    except DAMAGE:
        return None
    try:
        behind = not copy or decode(copy)[1]["number"] < newest
    except DAMAGE as error:
        return f"is damaged ({error}); remove it, and the next run makes it anew"
    if behind:
        return None if now() - created < LAG else f"is behind snapshot {newest}; the next run makes it anew"
    return f"differs from {snapshot_file(newest)}; restore whichever changed, or move this copy away and run again"


def numbers(root: Root) -> list[int]:
    """Numbers of the snapshots, oldest first."""
    names = [name.removesuffix(".parquet") for name in root.names("snapshots") if name.endswith(".parquet")]
    return sorted(int(name) for name in names if name.isdecimal())


def snapshot_file(number: int) -> str:
    """Where a snapshot lies."""
    return f"snapshots/{number:06d}.parquet"


def column(root: Root, name: str, *columns: str) -> tuple[list[str], dict[str, Any]]:
    """One column of a snapshot or pending file, or none, and the facts beside it."""
    try:
        with root.open_native(name, list(columns)) as native:
            opened, meta = open_file(native)
            if meta.get("format", 1) > FORMAT:
                raise StoreError(f"{name} has format {meta['format']}, this permafrost reads up to {FORMAT}")
            table = opened.read(list(columns), use_threads=False)
            return [value for column in table.columns for value in column.to_pylist()], meta
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise StoreError(f"{name} is damaged ({error}); `permafrost verify` says what to do") from None
