"""What a run costs before any image is opened: a folder with nothing to do, and a table of a million rows.

The folder's run is timed beside the bare `os.scandir` and `stat` of the same tree, in one process, imports aside. Of
the table, each stage of listing, comparing and publishing tells its seconds, and the process its peak memory.
Run as ``python tests/benchmarks/listing.py``.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from features import embedding, fill, samples
from features.extract import extract
from features.plan import Plan
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request, View

FILES, ROWS, REPETITIONS = 100_000, 1_000_000, 7


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def scanned(folder: str) -> int:
    count, folders = 0, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def read(table: pa.Table) -> pa.Table:
    """What reading would tell, without doing it."""
    facts = {"sha256": [f"{row:064x}" for row in range(len(table))], "status": ["ok"] * len(table)}
    columns = {"id": table["id"], "version": table["version"], **facts}
    return pa.table(
        [columns.get(name, pa.nulls(len(table))) for name in samples.READING.names], samples.READING.names
    ).cast(samples.READING)


def folder(place: Path) -> None:
    tree, store = place / "tree", FeatureStore.open_or_new(str(place / "store"))
    for number in range(FILES):
        if number % 1000 == 0:
            (tree / f"{number // 1000:03d}").mkdir(parents=True)
        (tree / f"{number // 1000:03d}" / f"{number:06d}.jpg").write_bytes(b"%d" % number)
    source, view = list_source(str(tree)), View("tiny-V2-penultimate", {}, 64, Request.parse("tiny"))
    store.add_view(view)
    facts, random = read(source.listing), np.random.default_rng(0)
    from features import parts

    for start in range(0, FILES, embedding.PART):
        keys = facts["sha256"][start : start + embedding.PART].to_pylist()
        parts.write(store.root, view, keys, random.standard_normal((len(keys), 64), np.float32), {})
    plan = Plan.make(source.listing, samples.READING.empty_table(), set())
    store.publish(source.name, plan.rows(source.name, [facts]), source.listed_at)
    store.refresh_listing()

    def run() -> None:
        record = extract(list_source(str(tree)), store, [Request.parse("tiny")])
        assert (record["opened"], record["outcome"], "torch" in sys.modules) == (0, "unchanged", False)

    rounds = [(timed(lambda: scanned(str(tree))), timed(run)) for _ in range(REPETITIONS)]
    bare, whole = (float(np.median(column)) for column in zip(*rounds, strict=True))
    print(f"{FILES:,} files: scandir + stat {bare:.3f} s, a run with nothing to do {whole:.3f} s, {whole / bare:.2f} x")


def table(place: Path) -> None:
    (place / "one.jpg").write_bytes(b"x")
    columns = {
        "key": [f"row-{row:08d}" for row in range(ROWS)],
        "image": ["one.jpg"] * ROWS,
        "label": [f"{row % 7}" for row in range(ROWS)],
    }
    pyarrow.csv.write_csv(pa.table(columns), str(place / "table.csv"))
    # A process of its own, so that its peak is the table's.
    subprocess.run([sys.executable, __file__, str(place)], check=True)


def publish(place: Path) -> None:
    store = FeatureStore.open_or_new(str(place / "store"))
    spent = {}
    for stage in ("first", "second"):
        begun = time.perf_counter()
        source = list_source(str(place / "table.csv"), id_column="key")
        listed = time.perf_counter()
        plan = fill.look_ahead(source, store, {"v": Request("none", "V1")}, store.snapshot()).plan
        compared = time.perf_counter()
        rows = plan.rows(source.name, [read(source.listing.take(pa.array(plan.todo)))] if len(plan.todo) else [])
        _, outcome = store.publish(source.name, rows, source.listed_at)
        spent[stage] = (listed - begun, compared - listed, time.perf_counter() - compared, outcome)
    for stage, (listing, comparing, publishing, outcome) in spent.items():
        told = f"list {listing:.1f} s, compare {comparing:.1f} s, publish {publishing:.1f} s"
        print(f"{ROWS:,} rows, {stage}: {told} ({outcome})")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        publish(Path(sys.argv[1]))
    else:
        for measure in (folder, table):
            with tempfile.TemporaryDirectory() as temporary:
                measure(Path(temporary))
