"""A store under pandas, Polars, Arrow, DuckDB and Spark; SQL over it, and nearest neighbours."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from conftest import COLOURS, Toy, answer, draw
from features import parts, samples
from features.errors import DataError, StoreError
from features.export import export
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request, View
from pipeline import similar, sql

VIEW = View("some.view-1", {"backbone": "toy"}, 3, Request("toy", "V1"))
IMAGES = 300
QUOTED = f'"{VIEW.name}"'


def key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def vectors() -> Any:
    X = np.random.default_rng(0).standard_normal((IMAGES, 3), np.float32)
    X[7] = 0
    return X


def made(url: str) -> FeatureStore:
    """Images in parts with doubles that say something else, some listed twice, one failed, one not embedded."""
    store, X = FeatureStore.open_or_new(url), vectors()
    store.add_view(VIEW)
    parts.write(store.root, VIEW, [key(n) for n in range(200)], X[:200], {})
    later = [*range(150, IMAGES), 888]
    parts.write(store.root, VIEW, [key(n) for n in later], np.vstack([X[150:200] + 9, X[200:], X[:1]]), {})
    parts.write(store.root, VIEW, [key(n) for n in range(150, 160)], X[:10] + 9, {})
    numbers = [*range(IMAGES), 3, 3, 999, -1]
    rows = [
        {"source": "AB"[n % 2], "id": f"{at:04d}", "uri": f"/{at}.png", "sha256": key(n), "status": "ok"}
        for at, n in enumerate(numbers)
    ]
    rows[-1] |= {"status": "failed", "sha256": None, "error": "empty: the file has no bytes"}
    table = pa.Table.from_pylist(rows, samples.SCHEMA).append_column("weight", pa.array(np.arange(len(rows)) / 4))
    for source in "AB":
        store.publish(source, table.filter(ds.field("source") == source), "2025")
    store.refresh_listing()
    return store


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return made(str(tmp_path / "store"))


@pytest.fixture(params=["local", "memory", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/store"
    return f"memory://{tmp_path}/store" if request.param == "memory" else str(tmp_path / "store")


def files(store: FeatureStore) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(store.root.path).rglob("*") if path.is_file()}


def test_pandas_polars_and_arrow_hold_what_load_reads(anywhere: str) -> None:
    store = made(anywhere)
    loaded = store.load()
    X = vectors()
    assert np.array_equal(loaded.embeddings, X[[int(i) if int(i) < IMAGES else 3 for i in loaded.ids]])
    arrow, frame, polars = store.to_arrow(), store.to_pandas(VIEW.name), store.to_polars()
    assert arrow.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert arrow.column_names == list(frame.columns) == polars.columns == [*loaded.samples.columns, "embedding"]
    for embeddings in (np.stack(frame["embedding"].to_list()), polars["embedding"].to_numpy()):
        assert embeddings.dtype == np.float32 and np.array_equal(embeddings, loaded.embeddings)
    assert np.array_equal(np.array(arrow["embedding"].to_pylist(), np.float32), loaded.embeddings)
    for ids in (frame["id"], polars["id"], arrow["id"].to_pylist()):
        assert list(ids) == loaded.ids.tolist() and len(ids) == IMAGES + 2
    found = store.dataset()
    assert isinstance(found, ds.Dataset) and found.count_rows() == 200 + 151 + 10
    assert {row["sha256"] for row in found.to_table().to_pylist()} == {key(n) for n in [*range(IMAGES), 888]}
    with pytest.raises(DataError, match="has no view nope"):
        store.to_arrow("nope")


def test_plain_tools_join_the_files_themselves(store: FeatureStore) -> None:
    place, expected = store.root.path, store.to_pandas().sort_values("id")
    embeddings = pd.read_parquet(f"{place}/embeddings/{VIEW.name}").drop_duplicates("sha256")
    by_pandas = pd.read_parquet(f"{place}/samples.parquet").merge(embeddings, on="sha256")
    each = pl.read_parquet(f"{place}/embeddings/{VIEW.name}/*.parquet").unique("sha256", keep="first")
    by_polars = pl.read_parquet(f"{place}/samples.parquet").join(each, on="sha256").to_pandas()
    for frame in (by_pandas, by_polars):
        assert sorted(frame["id"]) == list(expected["id"])
        assert np.array_equal(
            np.stack(list(frame.sort_values("id")["embedding"])), np.stack(list(expected["embedding"]))
        )


def test_without_polars_one_line_says_so(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DataError, match="pip install polars"):
        store.to_polars()


def test_sql_sees_the_samples_and_each_view_joined_and_without_doubles(anywhere: str) -> None:
    store = made(anywhere)
    expected = store.to_pandas().sort_values("id")
    told = sql.answer(store, f"select * from {QUOTED} order by id")
    assert told["columns"] == list(expected.columns)
    assert [row[1] for row in told["rows"]] == list(expected["id"])
    assert np.array_equal(
        np.array([row[-1] for row in told["rows"]], np.float32), np.stack(list(expected["embedding"]))
    )
    kind = sql.answer(store, f"select distinct typeof(embedding), count(*) from {QUOTED.upper()} group by all")
    assert kind["rows"] == [["FLOAT[3]", IMAGES + 2]]
    counted = sql.answer(
        store, "select source, count(*) as n, sum(weight) from samples group by source order by source"
    )
    listed = store.snapshot().samples.to_pandas().groupby("source")["weight"]
    assert counted["rows"] == [[name, len(some), some.sum()] for name, some in listed]
    assert sql.answer(store, "select count(*) from samples", snapshot=1)["rows"] == [[150]]
    with pytest.raises(StoreError, match="has no snapshot 9"):
        sql.answer(store, "select 1", snapshot=9)


def test_an_empty_store_has_tables_without_rows(tmp_path: Path) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    store.add_view(VIEW)
    assert sql.answer(store, "select count(*) from samples")["rows"] == [[0]]
    assert sql.answer(store, f"select count(*) from {QUOTED}")["rows"] == [[0]]
    assert len(store.to_arrow()) == len(store.to_polars()) == store.dataset().count_rows() == 0


@pytest.mark.parametrize(
    "text",
    [
        "copy samples to '{store}/x.parquet'",
        "copy samples to '{part}'",
        "select * from read_parquet('{part}')",
        "from '{part}'",
        "from read_text('/etc/hostname')",
        "from glob('/*')",
        "from read_csv('https://example.com/x.csv')",
        "attach '{store}/x.db'",
        "export database '{store}/x'",
        "install httpfs",
        "set enable_external_access = true",
        "set temp_directory = '{store}'",
        "call enable_logging(storage = 'file', storage_path = '{store}/log')",
        "create persistent secret s (type s3, key_id 'a')",
        "from X",
        "selec",
        "select nope from samples",
        "select 1 from nowhere",
        "",
        "create table x as select 1",
        "drop view samples",
        "vacuum",
        "create table x as select 1; drop view samples; select * from samples where 1 = 'x'",
    ],
)
def test_sql_reaches_nothing_but_the_tables(store: FeatureStore, permafrost: Any, text: str, tmp_path: Path) -> None:
    X = vectors()  # noqa: F841
    before = files(store)
    part = next(name for name in before if "embeddings" in name and name.endswith(".parquet"))
    done = permafrost("sql", store.root.path, text.format(store=store.root.path, part=part), code=2, cwd=tmp_path)
    assert (
        done.stdout == ""
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("permafrost: the SQL cannot be answered: ")
    )
    assert files(store) == before and [path.name for path in tmp_path.iterdir()] == ["store"]


def test_two_tables_of_one_name_are_refused(store: FeatureStore) -> None:
    store.add_view(View("Samples", {}, 3, Request("toy", "V1")))
    with pytest.raises(DataError, match="several tables are called 'samples'"):
        sql.answer(store, "select * from samples")


def test_sql_prints_a_table_json_or_a_file(store: FeatureStore, permafrost: Any, tmp_path: Path) -> None:
    url = store.root.path
    done = permafrost("sql", url, f"select id, weight, embedding from {QUOTED} order by id")
    assert done.stdout.splitlines()[1].split()[:3] == ["0000", "0", "[1.11762,"]
    assert len(done.stdout.splitlines()) == 41
    assert done.stderr == "the first 40 of 302 rows; --out FILE or --json gives all\n"
    query = "select id, weight, 'nan'::float as none, date '2025-01-02' as day from samples order by id"
    told = answer(permafrost("sql", url, query, "--json"))
    assert told["columns"] == ["id", "weight", "none", "day"] and told["rows"][1] == ["0001", 0.25, None, "2025-01-02"]
    for out, read in (("a.parquet", pd.read_parquet), ("a.csv", pd.read_csv)):
        done = permafrost("sql", url, f"select * from {QUOTED} order by id", "--out", tmp_path / out, "--json")
        assert answer(done) == {"out": str(tmp_path / out), "rows": IMAGES + 2}
        frame = read(tmp_path / out)
        X = [json.loads(row) if isinstance(row, str) else row for row in frame["embedding"]]
        assert np.array_equal(np.array(X, np.float32), np.stack(list(store.to_pandas().sort_values("id")["embedding"])))


def test_views_are_found_without_being_named(store: FeatureStore, permafrost: Any) -> None:
    url = store.root.path
    for asked in ("show tables", "select table_name from information_schema.tables"):
        assert VIEW.name in permafrost("sql", url, asked).stdout
    assert sql.answer(store, f"select count(*) from query_table('{QUOTED}')")["rows"] == [[IMAGES + 2]]
    said = permafrost("sql", url, f"select * from {VIEW.name}-x", code=2).stderr
    assert f'views are named in double quotes, as "{VIEW.name}"' in said and said.count("\n") == 1


@pytest.mark.parametrize("out", ["a.txt", "gone/a.parquet", ".", "store/samples.parquet", "store/snapshots/9.parquet"])
def test_where_no_answer_can_be_written_one_line_says_so(
    store: FeatureStore, permafrost: Any, tmp_path: Path, out: str
) -> None:
    for command in (["sql", store.root.path, "select 1"], ["similar", store.root.path, "--id", "0001"]):
        done = permafrost(*command, "--out", tmp_path / out, code=2)
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"] and len(store.snapshot().samples) > IMAGES


def test_an_answer_that_breaks_off_leaves_no_file(store: FeatureStore, permafrost: Any, tmp_path: Path) -> None:
    broken = "select case when i = 200000 then error('oh') else 1 end from range(200001) t(i)"
    permafrost("sql", store.root.path, broken, "--out", tmp_path / "a.parquet", code=2)
    permafrost("sql", store.root.path, "select interval 1 day as d", "--out", tmp_path / "a.parquet", code=2)
    # Most readers refuse such a file.
    said = permafrost("sql", store.root.path, "select 1 as a, 2 as A", "--out", tmp_path / "a.parquet", code=2).stderr
    assert "several columns of the answer are called 'a'; name them with AS" in said
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("query", [f"select sum(embedding[1]) from {QUOTED}", "select count(distinct id) from samples"])
def test_a_damaged_file_is_told_of(store: FeatureStore, permafrost: Any, query: str) -> None:
    name = f"embeddings/{VIEW.name}/{parts.names(store.root, VIEW)[0]}" if "embedding" in query else "snapshots/000002"
    path = next(path for path in Path(store.root.path).rglob("*.parquet") if name in str(path))
    column = pq.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 9] ^= 1
    path.write_bytes(content)
    done = permafrost("sql", store.root.path, query, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "CRC" in done.stderr


# Nearest neighbours


def brute(number: int, count: int, among: list[int]) -> list[tuple[int, float]]:
    X = vectors().astype(float)
    lengths = np.linalg.norm(X, axis=1)
    cosine = X @ X[number] / np.where(lengths * lengths[number] == 0, 1, lengths * lengths[number])
    return [(n, cosine[n]) for n in sorted(among, key=lambda n: -cosine[n])[:count]]


def test_neighbours_are_the_nearest_by_cosine(anywhere: str) -> None:
    store = made(anywhere)
    for number in (0, 170, 299):
        asked = similar.of_sample(store, VIEW, f"{number:04d}")
        found = similar.nearest(store, VIEW, asked, count=5).to_pandas()
        expected = brute(number, 5, [n for n in range(IMAGES) if n != number])
        for rank, (n, cosine) in enumerate(expected, 1):
            some = found[found["rank"] == rank]
            assert sorted(some["id"]) == [f"{n:04d}"] + (["0300", "0301"] if n == 3 else [])
            assert np.allclose(some["similarity"], cosine, atol=1e-5)
        assert set(found["query"]) == {f"{number:04d}"} and found["rank"].max() == 5


def test_a_sample_is_no_neighbour_of_its_own_but_its_copies_are(store: FeatureStore) -> None:
    found = similar.nearest(store, VIEW, similar.of_sample(store, VIEW, "0300"), count=2).to_pandas()
    assert found["id"].tolist()[:2] == ["0003", "0301"] and found["rank"].tolist() == [1, 1, 2]
    assert np.allclose(found["similarity"][:2], 1)


def test_a_condition_and_zeros_and_more_than_there_are(store: FeatureStore) -> None:
    asked = similar.of_sample(store, VIEW, "0000")
    found = similar.nearest(store, VIEW, asked, count=4, where="source = 'B' and weight < 25").to_pandas()
    expected = brute(0, 4, list(range(1, 100, 2)))
    assert found["id"].tolist() == [f"{n:04d}" for n, _ in expected]
    everything = similar.nearest(store, VIEW, asked, count=10_000).to_pandas()
    assert len(everything) == IMAGES + 1 and everything["rank"].max() == IMAGES - 1
    assert everything.set_index("id").loc["0007", "similarity"] == 0
    assert everything["similarity"].is_monotonic_decreasing
    assert len(similar.nearest(store, VIEW, asked, where="false")) == 0
    assert set(similar.nearest(store, VIEW, similar.of_sample(store, VIEW, "0007"))["similarity"].to_pylist()) == {0}
    for bad in ("nope = 1", "id in (select * from read_text('/etc/hostname'))", "1) or (1"):
        with pytest.raises(DataError, match="the SQL cannot be answered"):
            similar.nearest(store, VIEW, asked, where=bad)


def test_sql_gives_the_same_neighbours(store: FeatureStore) -> None:
    # As the README has it.
    query = f"""
        select id, array_cosine_similarity(embedding, asked) as similarity
        from {QUOTED}, (select embedding as asked from {QUOTED} where id = '0042')
        where id <> '0042' and id <> '0007' order by similarity desc limit 20
    """
    told = sql.answer(store, query)["rows"]
    found = similar.nearest(store, VIEW, similar.of_sample(store, VIEW, "0042"), count=30).to_pylist()[:20]
    assert [row["id"] for row in found] == [name for name, _ in told]
    assert np.allclose([row["similarity"] for row in found], [value for _, value in told], atol=1e-6)


def test_images_are_embedded_as_the_view_does(tmp_path: Path, photos: Path, toy: Toy, permafrost: Any) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(photos)), store, [toy.request])
    before = files(store)
    red, blue = (draw(tmp_path / f"{name} [1].png", COLOURS[name]) for name in ("red", "blue"))
    url = store.root.path
    told = answer(permafrost("similar", url, blue, red, "--count", 8, "--json"))
    assert told["view"] == "toy-V1-penultimate" and files(store) == before
    names = [(row["query"], row["rank"], row["id"].split("/")[1]) for row in told["neighbours"]]
    assert names == [(str(path), n, path.name.split()[0]) for path in (blue, red) for n in range(1, 9)]
    done = permafrost("similar", url, blue, "--count", 2, "--where", "label <> 'blue'")
    assert done.stdout.splitlines()[0].split() == ["rank", "source", "id", "uri", "similarity"]
    assert len(done.stdout.splitlines()) == 3 and "blue/" not in done.stdout and done.stderr == ""
    permafrost("similar", url, blue, "--out", tmp_path / "near.parquet")
    table = pq.read_table(tmp_path / "near.parquet")
    assert table.schema.equals(similar.SCHEMA) and len(table) == 10
    (tmp_path / "broken.png").write_bytes(b"no image")
    for bad, why in (("broken.png", "not_an_image"), ("gone.png", "missing")):
        done = permafrost("similar", url, tmp_path / bad, code=2)
        assert done.stderr.count("\n") == 1 and bad in done.stderr and why in done.stderr
    assert files(store) == before


def test_a_sample_is_searched_without_torch(store: FeatureStore) -> None:
    program = "import sys; from pipeline import cli; sys.argv = ['x', *sys.argv[1:]]; import os; "
    program += "os._exit = lambda code: print(sorted({'torch', 'sklearn'} & set(sys.modules)), code); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "similar", store.root.path, "--id", "0001"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_what_cannot_be_searched_is_one_line(store: FeatureStore, permafrost: Any) -> None:
    url = store.root.path
    twice = pa.Table.from_pylist([{"source": "C", "id": "0001", "sha256": key(5), "status": "ok"}], samples.SCHEMA)
    store.publish("C", twice, "2025")
    for arguments, why in (
        ((), "name images, or one sample"),
        (("x.png", "--id", "0001"), "name images, or one sample"),
        (("--id", "nope"), "no sample has id 'nope'"),
        (("--id", "0001"), "say --source B or C"),
        (("--id", "0302"), "has no embedding of id '0302'"),
        (("--id", "0303"), "has no embedding of id '0303'"),
        (("--id", "0002", "--view", "nope"), "has no view nope"),
    ):
        done = permafrost("similar", url, *arguments, code=2)
        assert why in done.stderr and done.stderr.count("\n") == 1
    assert len(answer(permafrost("similar", url, "--id", "0001", "--source", "C", "--json"))["neighbours"]) >= 10


def test_a_part_that_compaction_removes_meanwhile_is_searched_all_the_same(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, keys = parts.scan, pa.chunked_array([[key(n) for n in range(IMAGES)]])
    scanned = listed(store.root, VIEW, keys)
    seen = [next(scanned)]
    folder = Path(store.root.path, "embeddings", VIEW.name)
    last = parts.names(store.root, VIEW)[1]
    shutil.move(folder / last, folder / f"2099{last}")
    seen += list(scanned)
    rows = np.concatenate([rows for rows, _ in seen])
    assert sorted(rows.tolist()) == list(range(IMAGES))
    assert np.array_equal(np.concatenate([X for _, X in seen])[np.argsort(rows)], vectors())


# Spark


def leaves(path: Path) -> list[Any]:
    file = pq.ParquetFile(path)
    return [file.schema.column(place) for place in range(len(file.schema))]


def test_spark_knows_the_types_and_encodings_of_every_file(store: FeatureStore, tmp_path: Path) -> None:
    """By ParquetSchemaConverter and the vectorised readers of Spark 3.5: its types, list layouts and encodings."""
    export(store, VIEW, tmp_path / "out.parquet", "parquet", wide=False)
    permitted = {"PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
    for path in [tmp_path / "out.parquet", *Path(store.root.path).rglob("*.parquet")]:
        meta = pq.read_metadata(path)
        chunks = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
        assert {encoding for chunk in chunks for encoding in chunk.encodings} <= permitted, path
        assert {chunk.compression for chunk in chunks} <= {"UNCOMPRESSED", "SNAPPY", "ZSTD"}, path
        for leaf in leaves(path):
            assert leaf.physical_type in ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE", "BYTE_ARRAY"), leaf
            assert leaf.logical_type.type in ("NONE", "STRING", "INT"), leaf
            assert leaf.path == leaf.name or leaf.path == "embedding.list.element", leaf


@pytest.mark.slow
def test_spark_reads_the_store(store: FeatureStore, tmp_path: Path) -> None:
    pyspark = pytest.importorskip("pyspark.sql")
    if not shutil.which("java"):
        pytest.skip("there is no Java")
    export(store, VIEW, tmp_path / "out.parquet", "parquet", wide=False)
    settings = {"spark.ui.enabled": "false", "spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    builder = pyspark.SparkSession.builder.master("local[1]").config(map=settings)
    session = builder.config("spark.sql.warehouse.dir", str(tmp_path / "warehouse")).getOrCreate()
    try:
        listing = session.read.parquet(f"{store.root.path}/samples.parquet")
        view = session.read.parquet(f"{store.root.path}/embeddings/{VIEW.name}/*.parquet").dropDuplicates(["sha256"])
        assert view.schema["embedding"].dataType.simpleString() == "array<float>"
        joined = {row["id"]: row["sha256"] for row in listing.join(view, "sha256").collect()}
        expected = store.to_pandas()
        assert joined == dict(zip(expected["id"], expected["sha256"], strict=True))
        read = {row["id"]: row["embedding"] for row in session.read.parquet(str(tmp_path / "out.parquet")).collect()}
        assert [read[name] for name in expected["id"]] == [vector.tolist() for vector in expected["embedding"]]
        assert read["0302"] is None
    finally:
        session.stop()
