from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest

from features import parts, runs, samples, upkeep
from features.errors import PermafrostError, StoreError
from features.parts import Present
from features.store import FeatureStore
from test_verify import VIEW, add, age, key, publish


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    store.add_view(VIEW)
    return store


def first_coordinates(store: FeatureStore, *numbers: int) -> list[float | None]:
    found, vectors = parts.gather(store.root, VIEW, pa.chunked_array([[key(number) for number in numbers]]))
    return [float(vector[0]) if there else None for there, vector in zip(found, vectors, strict=True)]


def stored(store: FeatureStore) -> list[str]:
    return [sha256 for name in parts.names(store.root, VIEW) for sha256 in parts.read(store.root, VIEW, name)[0]]


def test_compaction_keeps_every_vector_once_and_the_first_of_doubles(store: FeatureStore) -> None:
    add(store, 1, 2, torch="2.8", numpy="2.0")
    add(store, 2, 3, value=9, torch="2.9", numpy="2.0")
    add(store, 4, 3, value=9, torch="2.8, 3.0", numpy="2.0")
    told = list[tuple[int, int]]()
    counts = upkeep.compact(store, lambda done, total: told.append((done, total)))
    assert counts == {"parts_before": 3, "parts_after": 1, "doubles": 2}
    (name,) = parts.names(store.root, VIEW)
    keys, vectors = parts.read(store.root, VIEW, name)
    assert dict(zip(keys, vectors[:, 1].tolist(), strict=True)) == {key(1): 0.5, key(2): 0.5, key(3): 9, key(4): 9}
    with parts.opened(store.root, VIEW, name) as (_, _, meta):
        assert meta["versions"] == {"torch": "2.8, 2.9, 3.0", "numpy": "2.0"}
    assert told[-1] == (6, 6) and upkeep.verify(store) == []


def test_compaction_fills_parts_and_then_has_nothing_left_to_do(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PART_BYTES", 0)
    full = add(store, *range(10_000, 11_500))
    for start in range(0, 5000, 500):
        add(store, *range(start, start + 500))
    assert upkeep.compact(store) == {"parts_before": 11, "parts_after": 4, "doubles": 0}
    after = parts.names(store.root, VIEW)
    sizes = [len(parts.read(store.root, VIEW, name)[0]) for name in after]
    assert after[0] == full and sizes == [1500, 2048, 2048, 904]
    assert first_coordinates(store, *range(5000)) == list(range(5000))
    assert upkeep.compact(store) == {"parts_before": 4, "parts_after": 4, "doubles": 0}
    assert parts.names(store.root, VIEW) == after


def test_a_row_is_dropped_only_for_one_that_is_written_anew(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PART_BYTES", 0)
    # A full part and its double: another compaction may be about to delete the first.
    full = add(store, *range(1500))
    add(store, 1, 5000)
    plan, merge = upkeep._to_merge(store.root, VIEW)[1], upkeep._rewrite
    assert upkeep.compact(store)["doubles"] == 1
    assert full not in parts.names(store.root, VIEW) and len(stored(store)) == 1501
    # What is gone by the time it is read is no reason to drop anything.
    assert merge(store.root, VIEW, plan, lambda key: True, lambda more: None) == (0, 0, 0)
    assert first_coordinates(store, *range(1500), 5000) == [*range(1500), 5000]


def test_compaction_never_washes_damage_away(store: FeatureStore) -> None:
    name = add(store, 1, 2)
    add(store, 3)
    path = Path(store.root.path, "embeddings", "v", name)
    content = path.read_bytes().replace(b'"versions"', b'"versionz"')
    path.write_bytes(content)
    with pytest.raises(StoreError, match=name):
        upkeep.compact(store)
    assert path.read_bytes() == content and len(parts.names(store.root, VIEW)) == 2


def test_everything_is_found_while_two_compactions_and_a_vacuum_run(store: FeatureStore) -> None:
    numbers = list(range(60))
    publish(store, *numbers)
    for number in numbers[:30]:
        add(store, number, number + 30)

    def disturb(work: int) -> None:
        for number in range(12):
            add(store, 100 + number, *numbers[number : number + 3])
            upkeep.vacuum(store, 1, timedelta()) if work == 0 else upkeep.compact(store)

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(disturb, work) for work in range(3)]
        while not all(job.done() for job in jobs):
            assert first_coordinates(store, *numbers) == numbers
            assert {key(number) for number in numbers} <= {k for _, ks, _ in parts.each(store.root, VIEW) for k in ks}
    for job in jobs:
        job.result()
    upkeep.compact(store)
    assert len(stored(store)) == len(set(stored(store))) and upkeep.verify(store) == []


def test_vacuum_removes_only_what_is_neither_referred_to_nor_young(store: FeatureStore) -> None:
    add(store, 1, 2, 3, torch="2.8")
    add(store, 4, 5)
    publish(store, 1, 4)
    store.pin(store.snapshot(), "bundle")
    publish(store, 2, 3)
    publish(store, 1, 3)
    reading = pa.Table.from_pylist([{"id": "p", "sha256": key(5)}], samples.READING)
    runs.keep(store.root, "A", reading)
    Path(store.root.path, "tmp", "left").write_text("")
    week = timedelta(days=7)
    assert set(upkeep.vacuum(store, 1, week).values()) == {0}
    age(store)
    add(store, 6, 7)
    runs.keep(store.root, "A", reading.slice(0, 0))
    assert upkeep.vacuum(store, 3, week) == {"snapshots": 0, "rows": 1, "parts": 0, "pending": 1, "tmp": 1}
    assert first_coordinates(store, *range(1, 8)) == [1, 2, 3, 4, None, 6, 7]
    age(store)
    # The first snapshot is pinned, the second goes.
    assert upkeep.vacuum(store, 1, week) == {"snapshots": 1, "rows": 3, "parts": 1, "pending": 1, "tmp": 0}
    assert sorted(stored(store)) == sorted(map(key, (1, 3, 4)))
    assert store.root.names("snapshots") == ["000001.parquet", "000001.pin", "000003.parquet"]
    with parts.opened(store.root, VIEW, parts.names(store.root, VIEW)[-1]) as (_, _, meta):
        assert meta["versions"] == {"torch": "2.8"}


def test_vacuum_heeds_what_a_run_has_read_and_what_it_publishes_meanwhile(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, 1, 2, 3)
    publish(store, 1)
    age(store)
    pending = runs.keep(store.root, "A", pa.Table.from_pylist([{"id": "2", "sha256": key(2)}], samples.READING))
    listed = upkeep.files

    def publish_meanwhile(*arguments: Any) -> list[str]:
        names = listed(*arguments)
        if len(names) == 1 and store.snapshot().number == 1 and arguments[1] == "pending":
            calls.append(1)
            if len(calls) == 2:
                publish(store, 1, 2)
                runs.drop(store.root, [pending])
        return names

    calls = list[int]()
    monkeypatch.setattr(upkeep, "files", publish_meanwhile)
    assert upkeep.vacuum(store, 1, timedelta(days=1))["rows"] == 1
    assert (first_coordinates(store, 1, 2, 3), len(calls)) == ([1, 2, None], 2)


def test_vacuum_keeps_its_hands_off_where_it_cannot_tell(store: FeatureStore) -> None:
    with pytest.raises(PermafrostError, match="at least 1"):
        upkeep.vacuum(store, 0, timedelta())
    add(store, 1)
    publish(store, 2)
    store.root.replace("snapshots/000001.parquet", b"PAR1")
    with pytest.raises(StoreError, match="000001"):
        upkeep.vacuum(store, 1, timedelta())
    assert stored(store) == [key(1)]


def test_upkeep_works_on_an_object_store() -> None:
    store = FeatureStore.open_or_new(f"memory://{uuid4().hex}")
    store.add_view(VIEW)
    publish(store, 1, 2)
    for number in (1, 2, 3):
        add(store, number)
    assert upkeep.compact(store)["parts_after"] == 1 and upkeep.verify(store) == []
    time.sleep(0.01)
    assert upkeep.vacuum(store, 1, timedelta())["rows"] == 1 and upkeep.verify(store) == []
    assert parts.add(store.root, VIEW, [key(1)], np.ones((1, 3), np.float32), Present(), {}) == 0


def test_grace_is_told_in_days_hours_or_minutes() -> None:
    expected = {"7d": timedelta(days=7), "12h": timedelta(hours=12), "30m": timedelta(minutes=30), "0": timedelta()}
    assert {text: upkeep.parse_grace(text) for text in expected} == expected
    for text in ("7", "-1d", "1w", "", "1.5h", "999999d"):
        with pytest.raises(PermafrostError, match="7d, 12h or 30m"):
            upkeep.parse_grace(text)
