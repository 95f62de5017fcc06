"""What `permafrost train` costs where embeddings are read block by block: seconds, and the process's peak memory.

The store is drawn: classes that overlap, sorted as in a folder, with one sample in a thousand a copy of another.
What the best head could reach is estimated by the densities that the embeddings were drawn from. Takes ``8 * rows *
dim`` bytes of temporary files.
Run it as ``python tests/benchmarks/streaming.py [ROWS [DIM [CLASSES [FOLDER [OPTION]]]]]``.
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

ROWS, DIM, CLASSES = 5_000_000, 512, 10
COMMAND = [sys.executable, "-m", "pipeline.cli"]
APART = 3.0
"""Distance of two classes in standard deviations."""


def make(place: Path, rows: int, dim: int, classes: int) -> None:
    """Write a store, and beside it the accuracy of the best head there can be."""
    store, view = FeatureStore.open_or_new(str(place / "store")), View("v", {}, dim, Request("none", "V1"))
    store.add_view(view)
    random, present = np.random.default_rng(0), parts.Present()
    centres = np.linalg.qr(random.standard_normal((dim, classes)))[0].T.astype(np.float32) * np.float32(APART / 2**0.5)
    label = np.arange(rows) * classes // rows
    same = np.where(np.arange(rows) % 1000 == 999, np.arange(rows) - 1, np.arange(rows)).tolist()
    keys = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(rows)]
    right = 0
    for start in range(0, rows, embedding.PART):
        some = slice(start, start + embedding.PART)
        X = centres[label[some]] + random.standard_normal((len(keys[some]), dim), np.float32)
        # The classes lie equally far from the middle.
        right += int(((X @ centres.T).argmax(axis=1) == label[some]).sum())
        parts.add(store.root, view, keys[some], X, present, {})
    known = {
        "source": pa.array(["drawn"]).take(pa.array(np.zeros(rows, int))),
        "id": [f"class-{number}/{row:08d}.jpg" for row, number in enumerate(label.tolist())],
        "uri": [f"/photographs/class-{number}/{row:08d}.jpg" for row, number in enumerate(label.tolist())],
        "version": [f"{row * 7919 % 1_000_003}-{row * 104729}" for row in range(rows)],
        "sha256": [keys[row] for row in same],
        "bytes": random.integers(10_000, 1_000_000, rows),
        "width": random.integers(100, 2000, rows),
        "height": random.integers(100, 2000, rows),
        "format": pa.array(["JPEG"]).take(pa.array(np.zeros(rows, int))),
        "status": pa.array(["ok"]).take(pa.array(np.zeros(rows, int))),
    }
    table = pa.table([known.get(name, pa.nulls(rows)) for name in samples.SCHEMA.names], samples.SCHEMA.names)
    table = table.cast(samples.SCHEMA).append_column("label", pa.array([f"class-{number}" for number in label]))
    store.publish("drawn", table, "2025-01-01T00:00:00+00:00")
    (place / "best").write_text(f"{right / rows}")


def main(place: Path, rows: int, dim: int, classes: int, options: list[str]) -> None:
    """Make a store unless the folder has one, train on it, and print seconds, accuracy and peak memory."""
    if not (place / "best").exists():
        # In a process of its own: a child's peak counts what its parent took when it was started.
        sizes = map(str, (place, rows, dim, classes))
        subprocess.run([sys.executable, __file__, "make", *sizes], check=True, stdout=subprocess.DEVNULL)
    begun = time.perf_counter()
    train = ["train", place / "store", "--target", "label", "--out", place / "bundle", "--no-images", "--json"]
    child = subprocess.Popen([*COMMAND, *map(str, train), *options], stdout=subprocess.PIPE)
    assert child.stdout
    facts = json.load(child.stdout)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - begun
    assert child.returncode == 0
    scores = facts["targets"][0]["cross_validation"]["head"]
    told = ", ".join(f"{name} {scores[name]['value']:.4f}" for name in ("accuracy", "log_loss"))
    told += f" [{scores['accuracy']['low']:.4f}, {scores['accuracy']['high']:.4f}]"
    print(f"{rows:,} x {dim}, {classes} classes, {' '.join(options)}: {seconds:.0f} s, peak", end=" ")
    print(f"{usage.ru_maxrss / 2**20:.2f} GiB, {usage.ru_utime + usage.ru_stime:.0f} s of CPU; {told}", end=" ")
    print(f"(best possible {float((place / 'best').read_text()):.4f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        sizes = [int(size) for size in sys.argv[1:4]]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(sys.argv[4] if len(sys.argv) > 4 else temporary)
            main(folder, *sizes, *(ROWS, DIM, CLASSES)[len(sizes) :], sys.argv[5:] or ["--streaming"])
