from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conftest import Toy
from features import parts, samples, verify
from features.extract import extract
from features.parquet import decode, encode
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request, View

VIEW = View("v", {"backbone": "toy"}, 3, Request("toy", "V1"))
LONG_AGO = "20200101T000000000000Z"


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    store.add_view(VIEW)
    return store


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def add(store: FeatureStore, *numbers: int, value: float = 0.5, **versions: str) -> str:
    """Write a part whether its keys are there or not."""
    vectors = np.array([[number, value, 1] for number in numbers], np.float32)
    return parts.write(store.root, VIEW, [key(number) for number in numbers], vectors, versions)


def publish(store: FeatureStore, *numbers: int) -> None:
    rows = [{"source": "A", "id": str(number), "sha256": key(number), "status": "ok"} for number in numbers]
    store.publish("A", pa.Table.from_pylist(rows, samples.SCHEMA), datetime.now(UTC).isoformat())
    store.refresh_listing()


def age(store: FeatureStore) -> None:
    """Make everything in a store look written long ago; what has a digest in its name keeps it."""
    for path in sorted(Path(store.root.path).rglob("*")):
        if path.parent.name == "v" and path.suffix == ".parquet":
            path.rename(path.with_name(f"{LONG_AGO}-{path.name.partition('-')[2]}"))
        elif path.parent.name == "pending":
            first, _, last = path.name.split("-")
            path.rename(path.with_name(f"{first}-{LONG_AGO}-{last}"))
        elif path.parent.name == "tmp":
            os.utime(path, (0, 0))
        elif path.parent.name == "snapshots" and path.suffix == ".parquet":
            table, meta = decode(path.read_bytes())
            path.write_bytes(encode(table, meta | {"created": "2020-01-01T00:00:00+00:00"}))


@pytest.mark.parametrize("what", ["embeddings/v/*.parquet", "snapshots/000001.parquet", "snapshots/000002.parquet"])
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(store: FeatureStore, what: str) -> None:
    add(store, *range(40))
    publish(store, *range(20))
    publish(store, *range(40))
    assert verify.verify(store) == []
    (file,) = Path(store.root.path).glob(what)
    content = file.read_bytes()
    places = [*range(0, len(content), 1 + len(content) // 100), *range(len(content) - 12, len(content))]
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        found = verify.verify(store)
        assert found and any(file.stem in line for line in found), f"byte {place}: {found}"
        assert not any("\n" in line for line in found), f"byte {place}: {found}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("store.json", "{"),
        ("embeddings/v/_view.json", "[1]"),
        ("embeddings/v/_view.json", None),
        ("snapshots/000001.pin", '{"digest": "other"}'),
        ("snapshots/000007.pin", '{"digest": "of one that is gone"}'),
        ("pending/0-0-0.parquet", "PAR1"),
        ("samples.parquet", "PAR1"),
    ],
)
def test_damage_to_any_other_file_is_found(store: FeatureStore, name: str, content: str | None) -> None:
    add(store, 1)
    publish(store, 1)
    path = Path(store.root.path, name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    (line,) = verify.verify(store)
    assert line.startswith(f"{name}: ")


def test_vectors_and_keys_that_no_run_writes_are_found(store: FeatureStore) -> None:
    sick = [add(store, 1, value=float("nan")), add(store, 2, value=float("inf"))]
    sick.append(parts.write(store.root, VIEW, ["no digest"], np.ones((1, 3), np.float32), {}))
    sick.append(parts.write(store.root, VIEW, [key(3)], np.ones((1, 4), np.float32), {}))
    assert [name in line for name, line in zip(sick, verify.verify(store), strict=True)] == [True] * 4


def test_a_listing_that_lags_is_only_a_problem_when_no_run_can_still_be_at_it(store: FeatureStore) -> None:
    publish(store, 1)
    old = store.root.read("samples.parquet")
    publish(store, 1, 2)
    store.root.replace("samples.parquet", old)
    assert verify.verify(store) == []
    age(store)
    assert "samples.parquet: is behind snapshot 2" in verify.verify(store)[-1]


def test_real_stores_verify_clean_also_while_a_run_fills_them(tmp_path: Path, photos: Path, toy: Toy) -> None:
    old = Path(shutil.copytree(Path(__file__).with_name("formats") / "1" / "store", tmp_path / "old"))
    assert verify.verify(FeatureStore.open(str(old))) == []
    store = FeatureStore.open_or_new(str(tmp_path / "new"))

    extract(list_source(str(photos)), store, [toy.request])

    def run() -> None:
        for number in range(5):
            extract(list_source(str(photos), name=f"s{number}"), store, [toy.request])
            publish(store, *range(number + 1))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        while not running.done():
            assert verify.verify(store) == []
    running.result()
    assert verify.verify(store) == []
