from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from features import parts, samples
from features.errors import DataError, StoreError
from features.export import Format, export
from features.store import FeatureStore
from features.views import Request, View

VIEW = View("v", {"backbone": "toy"}, 3, Request("toy", "V1"))
IMAGES = 50
FORMATS: list[Format] = ["parquet", "csv", "arrow"]


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def vector(number: int) -> list[float]:
    return np.array([number / 10, -number, 1e-30], np.float32).tolist()


def rows(*numbers: int, **own: Any) -> pa.Table:
    """Samples of images by number; of -1 reading failed."""
    listed = [
        {"source": "A", "id": f"{place:03d}", "sha256": key(number), "status": "failed" if number < 0 else "ok"}
        for place, number in enumerate(numbers)
    ]
    table = pa.Table.from_pylist(listed, samples.SCHEMA)
    return pa.table({name: table[name] for name in table.column_names} | own)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Fifty images in three parts with doubles, each listed twice, one failed and one not embedded."""
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    store.add_view(VIEW)
    for some in (range(20), range(10, 40), range(30, IMAGES)):
        parts.write(store.root, VIEW, [key(n) for n in some], np.array([vector(n) for n in some], np.float32), {})
    numbers = [-1, 999, *range(IMAGES), *range(IMAGES)]
    own = {
        "label": pa.array([None, 'a "quoted", word', *["plain"] * 2 * IMAGES]),
        "taken": pa.array([1_700_000_000] * len(numbers), pa.timestamp("us")),
        "box": pa.array([None, [], *[[1, 2]] * 2 * IMAGES], pa.list_(pa.int64())),
        "tags": pa.array([None, [], *[["x, y", None]] * 2 * IMAGES], pa.list_(pa.string())),
        "shape": pa.array([None, *[{"w": 1}] * (1 + 2 * IMAGES)], pa.struct([("w", pa.int64())])),
    }
    store.publish("A", rows(*numbers, **own), "2025")
    return store


def expected(number: int) -> list[float] | None:
    return vector(number) if 0 <= number < IMAGES else None


def as_vector(value: Any) -> list[float] | None:
    if isinstance(value, str):
        value = json.loads(value)
    return None if value is None or np.ndim(value) == 0 else [np.float32(part).item() for part in value]


def by_pandas(out: Path) -> pd.DataFrame:
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".arrow": pd.read_feather}[out.suffix]
    return read(out, **({"dtype": {"id": str}} if out.suffix == ".csv" else {}))


def by_duckdb(out: Path) -> pd.DataFrame:
    if out.suffix == ".arrow":
        read = pa.ipc.open_file(pa.OSFile(str(out))).read_all()  # noqa: F841
        return duckdb.sql("from read").df()
    found = duckdb.sql(f"from '{out}'") if out.suffix == ".parquet" else duckdb.read_csv(str(out), dtype={"id": "text"})
    if out.suffix == ".csv" and "embedding" in found.columns:
        found = found.select("* replace (embedding::float[] as embedding)")
    return found.df()


def by_polars(out: Path) -> pd.DataFrame:
    if out.suffix == ".csv":
        return pl.read_csv(out, schema_overrides={"id": pl.String}).to_pandas()
    found = pl.read_parquet(out) if out.suffix == ".parquet" else pl.read_ipc(out)
    return found.to_pandas()


@pytest.mark.parametrize("wide", [False, True], ids=["list", "wide"])
@pytest.mark.parametrize("format", FORMATS)
def test_pandas_duckdb_and_polars_read_each_sample_once_with_its_embedding(
    tmp_path: Path, store: FeatureStore, format: Format, wide: bool
) -> None:
    out = tmp_path / f"out.{format}"
    listing = store.snapshot().samples
    assert export(store, VIEW, out, format, wide) == len(listing) == 2 * IMAGES + 2
    number = {key(n): n for n in (-1, 999, *range(IMAGES))}
    for read in (by_pandas, by_duckdb, by_polars):
        frame = read(out)
        columns = ["embedding_0", "embedding_1", "embedding_2"] if wide else ["embedding"]
        assert list(frame.columns) == [*listing.column_names, *columns]
        assert sorted(frame["id"]) == listing["id"].to_pylist()
        assert list(frame["status"][:-2]) == ["ok"] * 2 * IMAGES and set(frame["id"][-2:]) == {"000", "001"}
        assert list(frame["label"])[-1] == 'a "quoted", word' and set(frame["label"][:-2]) == {"plain"}
        for row in frame.to_dict("records"):
            found = [row[name] for name in columns] if wide else as_vector(row["embedding"])
            if found is not None and wide:
                found = None if all(map(pd.isna, found)) else as_vector(found)
            assert found == expected(number[row["sha256"]]), (read, row)


def test_nested_columns_are_json_in_csv_and_themselves_elsewhere(tmp_path: Path, store: FeatureStore) -> None:
    for format in FORMATS:
        export(store, VIEW, tmp_path / f"out.{format}", format, wide=False)
    listing, text = store.snapshot().samples, by_pandas(tmp_path / "out.csv").sort_values("id")
    for name in ("box", "tags", "shape"):
        assert [None if pd.isna(value) else json.loads(value) for value in text[name]] == listing[name].to_pylist()
    for table in (
        pa.parquet.read_table(str(tmp_path / "out.parquet")),
        pa.ipc.open_file(pa.OSFile(str(tmp_path / "out.arrow"))).read_all(),
    ):
        assert table.sort_by("id").select(listing.column_names).to_pylist() == listing.to_pylist()
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)


def test_an_image_of_very_many_samples_is_written_a_slice_at_a_time(
    tmp_path: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS", 7)
    store.publish("A", rows(*[1] * 40, *[-1] * 10), "2026")
    assert export(store, VIEW, tmp_path / "out.parquet", "parquet", False) == 50
    read = pa.parquet.ParquetFile(str(tmp_path / "out.parquet"))
    assert max(read.metadata.row_group(group).num_rows for group in range(read.num_row_groups)) == 7
    assert read.read()["embedding"].to_pylist() == [vector(1)] * 40 + [None] * 10


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_store_without_samples_is_a_table_without_rows(tmp_path: Path, format: Format, wide: bool) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    store.add_view(VIEW)
    out = tmp_path / f"out.{format}"
    assert export(store, VIEW, out, format, wide) == 0
    assert by_pandas(out).empty and "id" in by_pandas(out).columns


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_leaves_no_partial_file_and_the_old_one_as_it_was(
    tmp_path: Path, store: FeatureStore, format: Format
) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    last = Path(store.root.path, "embeddings", "v", parts.names(store.root, VIEW)[-1])
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(StoreError):
        export(store, VIEW, out, format, wide=False)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(DataError, match="nowhere for --out is not there; make it"):
        export(store, VIEW, tmp_path / "nowhere" / "out.csv", "csv", wide=False)
    with pytest.raises(DataError, match="is a directory; name a file"):
        export(store, VIEW, tmp_path, "csv", wide=False)
    store.publish("A", rows(1, 2, Embedding_2=pa.array([1, 2]), embedding_3=pa.array([1, 2])), "2026")
    with pytest.raises(DataError, match=r"'embedding_2'.*rename it, or export without --wide"):
        export(store, VIEW, tmp_path / "out.csv", "csv", wide=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert export(store, VIEW, tmp_path / "out.csv", "csv", wide=False) == 2
