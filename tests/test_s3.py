from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import SECRET, Toy, answer, serving
from features.extract import extract
from features.files import Root
from features.locations import read
from features.sources import list_source
from features.store import FeatureStore

TINY = ("--backbone", "tiny", "--json")
COMMAND = [sys.executable, "-m", "pipeline.cli", "extract"]


@pytest.fixture
def few(photos: Path) -> Path:
    """Eight of the photos, here."""
    shutil.rmtree(photos / "test")
    for path in sorted(photos.rglob("*.png"))[8:]:
        path.unlink()
    return photos


def put(local: Path, url: str) -> str:
    fs, path = fsspec.url_to_fs(url)
    for file in (path for path in local.rglob("*") if path.is_file()):
        fs.pipe_file(f"{path}/{file.relative_to(local)}", file.read_bytes())
    return url


def contents(url: str) -> bytes:
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    return b"".join(fs.cat_file(name) for name in fs.find(path))


def test_a_store_and_a_source_on_s3_give_what_local_ones_do(
    few: Path, bucket: str, permafrost: Any, tmp_path: Path
) -> None:
    source, store = put(few, f"{bucket}/photos"), f"{bucket}/deep/store"
    permafrost("extract", few, "--store", tmp_path / "store", *TINY)
    done = [permafrost("extract", source, "--store", store, *TINY) for _ in range(2)]
    first, again = map(answer, done)
    assert (first["embedded"], again["opened"], again["outcome"]) == (8, 0, "unchanged")
    local, remote = (FeatureStore.open(str(url)).load() for url in (tmp_path / "store", store))
    assert remote.ids.tolist() == local.ids.tolist()
    assert np.array_equal(remote.embeddings, local.embeddings)
    assert remote.samples[["sha256", "label", "split"]].equals(local.samples[["sha256", "label", "split"]])
    assert SECRET.encode() not in contents(store)
    assert not any(SECRET in run.stdout + run.stderr for run in done)


def test_tables_and_tars_may_lie_on_s3(few: Path, bucket: str, toy: Toy, tmp_path: Path) -> None:
    with tarfile.open(few / "set.tar", "w") as tar:
        tar.add(few / "train", "train")
    names = [str(path.relative_to(few)) for path in sorted(few.rglob("*.png"))]
    (few / "t.csv").write_text("\n".join(["image", *names, "gone.png"]))
    source = put(few, f"{bucket}/set")
    fs, path = fsspec.url_to_fs(source)
    fs.pipe_file(f"{path}/empty.png", b"")
    fs.pipe_file(f"{path}/marker.png/", b"")
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    whole = extract(list_source(source), store, [toy.request])
    assert [whole[count] for count in ("listed", "embedded", "failed")] == [17, 8, 1]
    table = extract(list_source(f"{source}/t.csv"), store, [toy.request])
    assert [table[count] for count in ("listed", "embedded", "failed")] == [9, 0, 1]
    shard = list_source(f"{source}/set.tar").listing.to_pylist()
    assert {row["id"]: read(row["uri"]) for row in shard} == {name: (few / name).read_bytes() for name in names}
    told = {row["id"]: row["error"].split(":")[0] for row in store.snapshot().samples.to_pylist() if row["error"]}
    assert told == {"empty.png": "empty", "gone.png": "missing"}
    again = [extract(list_source(url), store, [toy.request])["opened"] for url in (source, f"{source}/t.csv")]
    assert again == [0, 1]  # The missing one is looked for again.


@pytest.mark.slow
def test_two_processes_at_once_both_end_well(few: Path, bucket: str) -> None:
    command = [*COMMAND, str(few), "--store", f"{bucket}/store", *TINY]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    loaded = FeatureStore.open(f"{bucket}/store").load()
    assert loaded.ids.tolist() == sorted(str(path.relative_to(few)) for path in few.rglob("*.png"))


def test_of_many_who_create_one_file_one_succeeds(bucket: str) -> None:
    roots = [Root.of(f"{bucket}/race") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(5):
            made = list(pool.map(lambda n, name=f"f{attempt}": roots[n].create(name, b"%d" % n), range(8)))
            assert made.count(True) == 1
            assert roots[0].read(f"f{attempt}") == b"%d" % made.index(True)


def test_only_the_keys_of_a_part_are_fetched(bucket: str, toy: Toy, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore.open_or_new(f"{bucket}/store")
    keys = [f"{number:064x}" for number in range(3000)]
    from features.parquet import encode_part

    content = encode_part(keys, np.ones((3000, 512), np.float32), {})
    store.root.create("part.parquet", content)
    fetched: list[int] = []
    plain = type(store.root.fs).cat_file

    def counted(self: Any, *arguments: Any, **options: Any) -> bytes:
        found: bytes = plain(self, *arguments, **options)
        fetched.append(len(found))
        return found

    monkeypatch.setattr(type(store.root.fs), "cat_file", counted, raising=False)
    with store.root.open_native("part.parquet", ["sha256"]) as file:
        assert pq.ParquetFile(file).read(["sha256"])["sha256"].to_pylist() == keys
    assert sum(fetched) < len(content) / 10
    with store.root.open_native("part.parquet") as file:
        assert file.read() == content


@pytest.mark.parametrize(
    "what", ["no key", "refused", "nobody there", pytest.param("no bucket", marks=pytest.mark.slow)]
)
def test_what_cannot_be_reached_is_one_line_and_an_exit_code(
    few: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path
) -> None:
    server = serving(tmp_path / "log", INITIAL_NO_AUTH_ACTION_COUNT="0") if what == "refused" else iter([""])
    if what == "refused":
        monkeypatch.setenv("AWS_ENDPOINT_URL", next(server))
    if what == "nobody there":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if what == "no key":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    place = f"s3://no-{uuid.uuid4().hex}" if what == "no bucket" else bucket
    for source, store in ((f"{place}/photos", str(tmp_path / "store")), (str(few), f"{place}/store")):
        done = subprocess.run([*COMMAND, source, "--store", store, *TINY], capture_output=True, text=True, timeout=120)
        assert (done.returncode in (1, 2, 5), "Traceback" in done.stderr) == (True, False), done.stderr
        assert [line for line in done.stderr.splitlines() if not line.startswith("embedding")][1:] == []
        assert SECRET not in done.stdout + done.stderr
    for _ in server:
        pass
