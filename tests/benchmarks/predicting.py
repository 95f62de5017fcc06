"""What `permafrost predict BUNDLE STORE` costs: seconds, and the peak memory of the process.

The store is drawn: classes that overlap, and ids that sort the samples otherwise than the parts have them, as stores do
that grew night by night. A head is trained on some of it. Takes ``4 * rows * (dim + 2 * classes)`` bytes of temporary
files; run as ``python tests/benchmarks/predicting.py [ROWS [DIM [CLASSES [FOLDER]]]]``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from features import embedding, parts, samples
from features.store import FeatureStore
from features.views import Request, View

ROWS, DIM, CLASSES = 1_000_000, 512, 2
COMMAND = [sys.executable, "-m", "pipeline.cli"]


def make(place: Path, rows: int, dim: int, classes: int) -> None:
    """Write a store, and a bundle whose head was trained on ten samples of each class and at least a thousand."""
    store, view = FeatureStore.open_or_new(str(place / "store")), View("v", {}, dim, Request("none", "V1"))
    store.add_view(view)
    random, present = np.random.default_rng(0), parts.Present()
    centres = random.standard_normal((classes, dim), np.float32) * np.float32(4 / np.sqrt(dim))
    label = np.arange(rows) % classes
    keys = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows)]
    for start in range(0, rows, embedding.PART):
        some = slice(start, start + embedding.PART)
        X = centres[label[some]] + random.standard_normal((len(keys[some]), dim), np.float32)
        parts.add(store.root, view, keys[some], X, present, {})
    trained = np.arange(rows) < max(1000, 10 * classes)
    known = {
        "source": pa.array(["drawn"]).take(pa.array(np.zeros(rows, int))),
        "id": [f"{key[:2]}/{key[2:18]}.jpg" for key in keys],
        "uri": [f"/photographs/{key[:2]}/{key[2:18]}.jpg" for key in keys],
        "sha256": keys,
        "status": pa.array(["ok"]).take(pa.array(np.zeros(rows, int))),
    }
    table = pa.table([known.get(name, pa.nulls(rows)) for name in samples.SCHEMA.names], samples.SCHEMA.names)
    table = table.cast(samples.SCHEMA).append_column("label", pa.array([f"class-{number:04d}" for number in label]))
    table = table.append_column("split", pa.array(np.where(trained, "train", "rest")))
    store.publish("drawn", table, "2025-01-01T00:00:00+00:00")
    train = ["train", place / "store", "--target", "label", "--where", "split = 'train'", "--folds", "2"]
    subprocess.run([*COMMAND, *map(str, train), "--split-near-duplicates", "--out", str(place / "bundle")], check=True)


def main(place: Path, rows: int, dim: int, classes: int) -> None:
    """Make a store and a bundle unless the folder has them, and print seconds, rows/s and peak memory."""
    if not (place / "bundle").exists():
        # In a process of its own: a child's peak counts what its parent took when it was started.
        sizes = map(str, (place, rows, dim, classes))
        subprocess.run([sys.executable, __file__, "make", *sizes], check=True, stdout=subprocess.DEVNULL)
    out, begun = place / "p.parquet", time.perf_counter()
    predict = ["predict", place / "bundle", place / "store", "--out", out, "--json"]
    child = subprocess.Popen([*COMMAND, *map(str, predict)], stdout=subprocess.PIPE)
    assert child.stdout
    counts = json.load(child.stdout)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - begun
    assert child.returncode == 0 and counts["predicted"] == rows
    told = f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s, peak {usage.ru_maxrss / 2**20:.2f} GiB"
    size = f"{out.stat().st_size / 2**30:.2f} GiB written"
    print(f"{rows:,} x {dim}, {classes:,} classes: {told}, {usage.ru_utime + usage.ru_stime:.1f} s of CPU, {size}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        sizes = [int(size) for size in sys.argv[1:4]]
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(sys.argv[4] if len(sys.argv) > 4 else temporary), *sizes, *(ROWS, DIM, CLASSES)[len(sizes) :])
