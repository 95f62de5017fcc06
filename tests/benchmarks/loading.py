"""How fast a view comes back from a store, beside `pandas.read_parquet` and `numpy.load`: a Markdown table.

Rounds interleave all loads of warm files, and the values are compared once. Takes 5 GB of memory and of temporary
files; run as ``python tests/benchmarks/loading.py``.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from features import pages, parquet, parts, samples
from features.store import FeatureStore
from features.views import Request, View

ROWS, DIM, PART, REPETITIONS = 50_000, 2048, 2048, 7
VIEW = View("v", {"backbone": "none"}, DIM, Request("none", "V1"))
SETTINGS = {
    "lz4": {"compression": "lz4"},
    "zstd": {"compression": "zstd"},
    "byte-stream-split + zstd": {
        "compression": "zstd",
        "use_byte_stream_split": ["embedding.list.element"],
    },
    "none": {},
}


def make(folder: Path, keys: list[str], matrix: np.ndarray[Any, Any], settings: dict[str, Any]) -> FeatureStore:
    ours = dict(parquet.PART_SETTINGS)
    parquet.PART_SETTINGS.update(settings)
    store = FeatureStore.open_or_new(str(folder))
    store.add_view(VIEW)
    for start in range(0, ROWS, PART):
        rows = slice(start, start + PART)
        parts.write(store.root, VIEW, keys[rows], matrix[rows], {})
    parquet.PART_SETTINGS.clear()
    parquet.PART_SETTINGS.update(ours)
    # By id the samples come in another order than the parts have them.
    rows = [{"source": "s", "id": key[::-1], "sha256": key, "status": "ok"} for key in keys]
    store.publish("s", pa.Table.from_pylist(rows, samples.SCHEMA), "2025-01-01T00:00:00+00:00")
    return store


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    matrix = np.maximum(random.standard_normal((ROWS, DIM), np.float32) + np.float32(0.43), 0)
    keys = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(ROWS)]
    place = {key: row for row, key in enumerate(keys)}
    pd.DataFrame({"sha256": keys, "embedding": list(matrix)}).to_parquet(folder / "pandas.parquet")
    np.save(folder / "numpy.npy", matrix)
    loads: dict[str, Callable[[], Any]] = {
        'pandas\' defaults, `np.stack(pd.read_parquet(f)["embedding"])`': lambda: np.stack(
            pd.read_parquet(folder / "pandas.parquet")["embedding"].tolist()
        ),
        "`np.load`": lambda: np.load(folder / "numpy.npy"),
    }
    sizes = [(folder / "pandas.parquet").stat().st_size, matrix.nbytes]
    by_arrow = pages._is_plain
    for name, settings in SETTINGS.items():
        store = make(folder / name, keys, matrix, settings)
        sizes.append(sum(path.stat().st_size for path in (folder / name / "embeddings/v").iterdir()))
        loads[f"`load`, {name}"] = store.load
        loaded = store.load()
        assert np.array_equal(loaded.embeddings, matrix[[place[key] for key in loaded.samples["sha256"]]])

    def through_arrow() -> None:
        pages._is_plain = lambda *of: False
        store.load()
        pages._is_plain = by_arrow

    loads["`load`, none, decoded by Arrow"] = through_arrow
    sizes.append(sizes[-1])
    rounds = [{name: timed(call) for name, call in loads.items()} for _ in range(REPETITIONS)]
    median = {name: float(np.median([each[name] for each in rounds])) for name in loads}
    pandas, numpy = list(median.values())[:2]
    print("| | size | seconds | x pandas | x `np.load` |\n|---|---:|---:|---:|---:|")
    for (name, spent), size in zip(median.items(), sizes, strict=True):
        print(f"| {name} | {size / matrix.nbytes:.2f} | {spent:.3f} | {pandas / spent:.1f} | {numpy / spent:.2f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
