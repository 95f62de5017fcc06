"""What `permafrost similar` costs, by a condition, and the same by SQL: seconds, and the peak memory of each process.

The store is drawn, with ids that sort the samples otherwise than the parts have them. Takes ``4 * rows * dim`` bytes
and a tenth more of temporary files; run as ``python tests/benchmarks/similar.py [ROWS [DIM [FOLDER]]]``.
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
from typing import Any

import numpy as np
import pyarrow as pa

from features import embedding, parts, samples
from features.store import FeatureStore
from features.views import Request, View

ROWS, DIM = 5_000_000, 512
COMMAND = [sys.executable, "-m", "pipeline.cli"]
NEAR = """
    select id, array_cosine_similarity(embedding, asked) as similarity
    from v, (select embedding as asked from v where id = '{}') where id <> '{}' order by similarity desc limit 10
"""


def named(row: int) -> str:
    return hashlib.sha256(b"%d" % row).hexdigest()


def make(place: Path, rows: int, dim: int) -> None:
    """Write a store."""
    store, view = FeatureStore.open_or_new(str(place)), View("v", {}, dim, Request("none", "V1"))
    store.add_view(view)
    random, present = np.random.default_rng(0), parts.Present()
    keys = [named(row) for row in range(rows)]
    for start in range(0, rows, embedding.PART):
        some = keys[start : start + embedding.PART]
        parts.add(store.root, view, some, random.standard_normal((len(some), dim), np.float32), present, {})
    known = {
        "source": pa.repeat("drawn", rows),
        "id": [f"{key[:2]}/{key[2:18]}.jpg" for key in keys],
        "uri": [f"/photographs/{key[:2]}/{key[2:18]}.jpg" for key in keys],
        "sha256": keys,
        "status": pa.repeat("ok", rows),
    }
    table = pa.table([known.get(name, pa.nulls(rows)) for name in samples.SCHEMA.names], samples.SCHEMA.names)
    store.publish("drawn", table.cast(samples.SCHEMA), "2025-01-01T00:00:00+00:00")


def measured(what: str, *command: object) -> Any:
    """Run a command, print what it cost, and return its answer."""
    begun = time.perf_counter()
    child = subprocess.Popen([*COMMAND, *map(str, command), "--json"], stdout=subprocess.PIPE)
    assert child.stdout
    answer = json.load(child.stdout)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode, seconds = os.waitstatus_to_exitcode(status), time.perf_counter() - begun
    assert child.returncode == 0
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{what}: {seconds:.1f} s, {cpu:.1f} s of CPU, peak {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)
    return answer


def main(place: Path, rows: int, dim: int) -> None:
    """Make a store unless it is there, search it three times, and compare the answers."""
    if not (place / "snapshots").exists():
        # In a process of its own: a child's peak counts what its parent took when it was started.
        subprocess.run([sys.executable, __file__, "make", str(place), str(rows), str(dim)], check=True)
    print(f"{rows:,} x {dim}")
    key = f"{named(rows // 2)[:2]}/{named(rows // 2)[2:18]}.jpg"
    near = measured("similar", "similar", place, "--id", key)["neighbours"]
    measured("similar --where", "similar", place, "--id", key, "--where", "id > '8'")
    rows_by_sql = measured("sql", "sql", place, NEAR.format(key, key))["rows"]
    assert [row["id"] for row in near] == [name for name, _ in rows_by_sql]


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        sizes = [int(size) for size in sys.argv[1:3]]
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(sys.argv[3] if len(sys.argv) > 3 else temporary), *sizes, *(ROWS, DIM)[len(sizes) :])
