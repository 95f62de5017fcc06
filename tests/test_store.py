from __future__ import annotations

import hashlib
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import stored
from features import info, parts, runs, samples
from features.errors import SourceError, StoreError, ViewMismatch
from features.parquet import encode, encode_part
from features.parts import Present
from features.store import FeatureStore
from features.views import Request, View

VIEW = View("v", {"backbone": "toy"}, 3, Request("toy", "V1"))
COLUMNS = {
    "a time": pa.array([1700000000, 1700000001], pa.timestamp("s")),
    "a time of day": pa.array([36000, 36001], pa.time32("s")),
    "a number that is none": pa.array([float("nan"), 1.0]),
    "a list": pa.array([[1], [2]], pa.list_(pa.field("item", pa.int64()))),  # which Parquet calls its element
    "nothing": pa.array([None, None], pa.string()),
}
FILES = {"part": "embeddings/v/*.parquet", "snapshot": "snapshots/*.parquet"}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.open_or_new(str(tmp_path))
    store.add_view(VIEW)
    return store


def listing(source: str, *ids: str, **own: Any) -> pa.Table:
    rows = [{"source": source, "id": key, "sha256": key, "status": "ok"} for key in ids]
    table = pa.Table.from_pylist(rows, samples.SCHEMA)
    return pa.table({name: table[name] for name in table.column_names} | own)


def add(store: FeatureStore, **vectors: list[float]) -> int:
    return parts.add(store.root, VIEW, list(vectors), np.array(list(vectors.values()), np.float32), Present(), {})


def intrude(store: FeatureStore, fingerprint: str = VIEW.fingerprint, **vectors: list[float]) -> None:
    meta = {"format": 1, "fingerprint": fingerprint, "versions": {}}
    content = encode_part(list(vectors), np.array(list(vectors.values()), np.float32), meta)
    store.root.create(f"embeddings/v/9-{hashlib.sha256(content).hexdigest()[:16]}.parquet", content)


def test_sources_that_are_published_at_once_lose_no_row_and_no_number(tmp_path: Path, store: FeatureStore) -> None:
    def publish(name: str) -> None:
        store.publish(name, listing(name, "a", "b"), "2025")
        store.refresh_listing()

    names = [f"source{number:02d}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, names))
    assert store.snapshot().samples["source"].to_pylist() == sorted(names * 2)
    sources = [set(store.snapshot(number).samples["source"].to_pylist()) for number in range(25)]
    assert all(len(after - before) == 1 and before < after for before, after in itertools.pairwise(sources))
    assert (tmp_path / "samples.parquet").read_bytes() == (tmp_path / "snapshots/000024.parquet").read_bytes()


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sets(st.sampled_from("abc"), min_size=1), st.booleans())))
@settings(max_examples=50, deadline=None)
def test_publishing_replaces_the_rows_of_its_own_source_and_no_others(steps: list[tuple[str, set[str], bool]]) -> None:
    store = FeatureStore.open_or_new(f"memory://{uuid4().hex}")
    expected: dict[tuple[str, str], int] = {}
    for step, (source, ids, whole) in enumerate(steps):
        store.publish(source, listing(source, *ids, step=pa.array([step] * len(ids))), f"2025-{step:03d}", whole)
        expected = {key: old for key, old in expected.items() if key[0] != source or not whole}
        expected |= {(source, key): step for key in ids}
        found = store.snapshot().samples.select(["source", "id", "step"]).to_pylist()
        assert [tuple(row.values()) for row in found] == [(*key, expected[key]) for key in sorted(expected)]
    assert store.snapshot().number == len(steps)


def test_an_older_listing_never_replaces_a_newer_one(store: FeatureStore) -> None:
    store.publish("A", listing("A", "new"), "2025-01-02")
    assert store.publish("A", listing("A", "old"), "2025-01-01")[1] == "superseded"
    store.publish("B", listing("B", "other"), "2025-01-01")
    assert store.snapshot().samples["id"].to_pylist() == ["new", "other"]


def test_a_snapshot_never_changes_and_nothing_new_makes_none(tmp_path: Path, store: FeatureStore) -> None:
    (first, _), file = store.publish("A", listing("A", "a"), "2025-01-01"), tmp_path / "snapshots/000001.parquet"
    content = file.read_bytes()
    assert store.publish("A", listing("A", "a"), "2025-01-02") == (first, "unchanged")
    store.publish("A", listing("A", "b"), "2025-01-03")
    assert (store.snapshot(1), file.read_bytes()) == (first, content)
    assert store.snapshot(1).digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_a_column_of_any_type_is_published_once(store: FeatureStore, column: pa.Array) -> None:
    store.publish("A", listing("A", "a", "b", own=column), "2025-01-01")
    store.publish("B", listing("B", "a"), "2025-01-01")
    assert store.publish("A", listing("A", "a", "b", own=column), "2025-01-02")[1] == "unchanged"
    assert store.publish("A", listing("A", "a", own=column[:1]), "2025-01-03", whole=False)[1] == "unchanged"


def test_whole_numbers_and_fractions_share_a_column_unless_digits_were_lost(store: FeatureStore) -> None:
    store.publish("A", listing("A", "a", x=pa.array([1])), "2025")
    store.publish("B", listing("B", "b", x=pa.array([0.5])), "2025")
    assert store.snapshot().samples["x"].to_pylist() == [1, 0.5]
    with pytest.raises(SourceError, match="'x'"):
        store.publish("C", listing("C", "c", x=pa.array([2**53 + 1])), "2025")


@pytest.mark.parametrize(
    "content", [None, b"garbage", pd.DataFrame({"id": ["a"]}).to_parquet()], ids=["older", "garbage", "foreign"]
)
def test_samples_parquet_becomes_the_newest_snapshot(
    tmp_path: Path, store: FeatureStore, content: bytes | None
) -> None:
    store.publish("A", listing("A", "a"), "2025")
    store.refresh_listing()
    store.publish("B", listing("B", "b"), "2025")
    if content is not None:
        (tmp_path / "samples.parquet").write_bytes(content)
    store.refresh_listing()
    assert (tmp_path / "samples.parquet").read_bytes() == (tmp_path / "snapshots/000002.parquet").read_bytes()


def test_a_part_is_named_by_its_content_and_has_the_schema_of_the_design(tmp_path: Path, store: FeatureStore) -> None:
    add(store, a=[1, 2, 3], b=[4, 5, 6])
    part = next(tmp_path.rglob(FILES["part"]))
    assert part.stem.rpartition("-")[2] == hashlib.sha256(part.read_bytes()).hexdigest()[:16]
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), 3)
    fields = [pa.field("sha256", pa.string(), nullable=False), pa.field("embedding", vector, nullable=False)]
    assert pq.read_schema(part).equals(pa.schema(fields))


def test_doubles_that_a_race_left_are_dropped_and_the_first_counts(store: FeatureStore) -> None:
    assert [add(store, a=[1, 1, 1], b=[2, 2, 2]), add(store, b=[9, 9, 9])] == [2, 0]
    intrude(store, b=[9, 9, 9], c=[3, 3, 3], a=[9, 9, 9])
    assert {key: vector[0] for key, vector in stored(store, VIEW).items()} == {"a": 1, "b": 2, "c": 3}
    found, matrix = parts.gather(store.root, VIEW, pa.chunked_array([["c", "b", None, "c", "d"]]))
    assert (found.tolist(), matrix[found][:, 0].tolist()) == ([True, True, False, True, False], [3, 2, 3])


def test_plain_tools_read_a_view_and_join_the_samples_and_drop_doubles(tmp_path: Path, store: FeatureStore) -> None:
    add(store, a=[1, 1, 1], b=[2, 2, 2])
    intrude(store, b=[2, 2, 2], c=[3, 3, 3])
    store.publish("A", listing("A", "a", "b", "lost", label=pa.array(["ant", "bee", "cow"])), "2025")
    store.refresh_listing()
    view, rows = tmp_path / "embeddings" / "v", tmp_path / "samples.parquet"
    frame = pd.read_parquet(view)
    assert len(frame) == 4
    joined = pd.read_parquet(rows).merge(frame.drop_duplicates("sha256"), on="sha256")
    query = f"""select label, embedding::float[3] from '{rows}' join (
        select distinct on (sha256) * from '{view}/*.parquet') using (sha256)"""
    lazy = pl.scan_parquet(rows).join(pl.scan_parquet(view / "*.parquet").unique("sha256"), on="sha256")
    pairs = (list(zip(joined["label"], joined["embedding"], strict=True)), duckdb.sql(query).fetchall())
    for found in (*pairs, lazy.select("label", "embedding").collect().rows()):
        assert sorted((label, *vector) for label, vector in found) == [("ant", 1, 1, 1), ("bee", 2, 2, 2)]


@pytest.mark.parametrize("what", FILES)
def test_a_flipped_bit_is_found_when_the_file_is_read(tmp_path: Path, store: FeatureStore, what: str) -> None:
    def read() -> tuple[object, ...]:
        vectors = stored(store, VIEW)
        return list(vectors), np.stack(list(vectors.values())).tolist(), store.snapshot().samples.to_pylist()

    vectors = {hashlib.sha256(bytes([row])).hexdigest(): [row, 0.5, 1e-3] for row in range(40)}
    add(store, **vectors)
    store.publish("A", listing("A", *vectors), "2025")
    file = next(tmp_path.rglob(FILES[what]))
    before, content = read(), file.read_bytes()
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(4, pages, 1 + pages // 150):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with suppress(OSError, ValueError, KeyError, StoreError):
            assert read() == before, f"byte {place}"


@pytest.mark.parametrize("what", FILES)
def test_damage_is_an_error_of_ours_that_names_the_file(tmp_path: Path, store: FeatureStore, what: str) -> None:
    add(store, a=[1, 2, 3])
    store.publish("A", listing("A", "a"), "2025")
    file = next(tmp_path.rglob(FILES[what]))
    content = file.read_bytes()
    for damaged in (content[:-20], content[:60] + b"!" + content[61:], b""):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=f"{file.stem}|{what} 1"):
            stored(store, VIEW) if what == "part" else store.snapshot()


def test_a_part_of_another_view_is_refused(store: FeatureStore) -> None:
    intrude(store, fingerprint="other", a=[1, 2, 3])
    with pytest.raises((StoreError, ViewMismatch)):
        stored(store, VIEW)


def test_nothing_unfinished_ever_lies_where_a_glob_finds_it(tmp_path: Path, store: FeatureStore) -> None:
    def write() -> None:
        for number in range(25):
            store.publish("A", listing("A", *map(str, range(number + 1))), f"2025-{number:02d}")
            store.refresh_listing()
            add(store, **{f"{number}-{row}": [1, 2, 3] for row in range(200)})

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            for file in [*tmp_path.glob("*.parquet"), *tmp_path.glob("[se]*/**/*.parquet")][-20:]:
                assert pq.read_table(io.BytesIO(file.read_bytes())).num_rows > 0
    writing.result()
    assert not list((tmp_path / "tmp").iterdir())


def test_pending_files_may_go_while_another_run_reads_them(store: FeatureStore) -> None:
    def publish_often() -> None:
        for _ in range(60):
            runs.drop(store.root, [runs.keep(store.root, "A", samples.READING.empty_table()) for _ in range(5)])

    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publish_often)
        while not publishing.done():
            runs.kept(store.root, "A")


@pytest.mark.parametrize("name", ["store", "view 'v'", "snapshot 1"])
def test_a_newer_format_is_refused_by_name(tmp_path: Path, store: FeatureStore, name: str) -> None:
    if file := {"store": "store.json", "view 'v'": "embeddings/v/_view.json"}.get(name):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | {"format": 2}))
    else:
        meta = {"format": 2, "number": 1, "listed": {}}
        store.root.create("snapshots/000001.parquet", encode(listing("A", "a"), meta))
    with pytest.raises(StoreError, match=rf"{name}.* has format 2, .* up to 1"):
        info.describe(FeatureStore.open(str(tmp_path)))


def test_a_directory_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"thesis\.tex.*new directory"):
        FeatureStore.open_or_new(str(tmp_path))
    with pytest.raises(StoreError, match="permafrost extract"):
        FeatureStore.open(str(tmp_path))


def test_a_store_in_memory_does_all_of_it() -> None:
    store = FeatureStore.open_or_new(f"memory://{uuid4().hex}/store")
    store.add_view(VIEW)
    add(store, a=[1, 2, 3], b=[4, 5, 6])
    store.publish("A", listing("A", "a", "c", label=pa.array(["ant", "cow"])), "2025")
    failed = {"source": "B", "id": "x", "status": "failed", "error": "missing: no such file"}
    store.publish("B", pa.Table.from_pylist([failed], samples.SCHEMA), "2025")
    store.refresh_listing()
    runs.drop(store.root, [runs.keep(store.root, "A", samples.READING.empty_table())])
    with pytest.raises(ViewMismatch):
        store.add_view(View("v", {"backbone": "other"}, 3, VIEW.request))
    told = info.describe(FeatureStore.open(f"memory://{store.root.path}"))
    counts = [(name, found["samples"], found["failed"]) for name, found in told["sources"].items()]
    assert counts == [("A", 2, 0), ("B", 1, 1)]
    assert (told["snapshot"], told["columns"], told["failures"]) == (2, ["label"], {"missing": 1})
    assert [told["views"]["v"][key] for key in ("dim", "images", "samples")] == [3, 2, 1]
