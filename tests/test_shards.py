from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Toy, draw
from features import samples
from features.errors import SourceError
from features.extract import extract
from features.shards import ALL, Shard
from features.sources import list_source
from features.store import FeatureStore

STORES = count()
IDS = [f"{number:02d}.png" for number in range(12)]
PINNED = {2: [0, 0, 1, 0, 0], 7: [2, 0, 2, 0, 6], 1000: [982, 788, 743, 876, 144]}
shards = st.integers(1, 6).flatmap(lambda n: st.builds(Shard, st.integers(0, n - 1), st.just(n)))


def held(shard: Shard, ids: list[str]) -> set[str]:
    return {key for key, here in zip(ids, shard.holds(pa.chunked_array([ids], pa.string())), strict=True) if here}


@given(st.lists(st.text(), unique=True, max_size=50), st.integers(1, 40))
def test_each_id_is_in_exactly_one_shard(ids: list[str], n: int) -> None:
    together = [key for index in range(n) for key in held(Shard(index, n), ids)]
    assert sorted(together) == sorted(ids)


@given(st.sets(st.text(), max_size=30), st.sets(st.text(), max_size=30), shards)
def test_more_ids_move_none(ids: set[str], more: set[str], shard: Shard) -> None:
    assert held(shard, sorted(ids | more)) & ids == held(shard, sorted(ids))


def test_an_id_stays_in_its_shard_for_ever() -> None:
    ids = ["a.png", "train/red/00.png", "é", "", "日本/1.jpg"]
    found = {n: [next(i for i in range(n) if key in held(Shard(i, n), ids)) for key in ids] for n in (2, 7, 1000)}
    assert found == PINNED


def test_shards_are_about_equal() -> None:
    ids = [f"{number}.png" for number in range(4000)]
    assert all(900 < len(held(Shard(index, 4), ids)) < 1100 for index in range(4))


@given(shards, shards, st.lists(st.text(), unique=True, min_size=1, max_size=50))
def test_a_shard_covers_another_only_if_it_holds_all_of_it(one: Shard, other: Shard, ids: list[str]) -> None:
    if one.covers(other):
        assert held(other, ids) <= held(one, ids)
    many = [str(number) for number in range(600)]
    assert one.covers(other) == (held(other, many) <= held(one, many))
    assert ALL.covers(one)


@given(shards)
def test_a_shard_is_read_as_it_is_written(shard: Shard) -> None:
    assert Shard.parse(str(shard)) == shard


@pytest.mark.parametrize("text", ["", "1", "4/4", "5/4", "-1/4", "0/0", "1/", "/4", "a/b", "0/4/2", " 0/4", "0.5/4"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="must be i/n"):
        Shard.parse(text)


def test_the_command_line_refuses_a_shard_that_is_none(photos: Path, permafrost: Any, tmp_path: Path) -> None:
    options = ("--store", tmp_path / "store", "--backbone", "tiny", "--shard", "2/2")
    done = permafrost("extract", photos, *options, code=2)
    assert done.stderr.count("\n") == 1
    assert "'2/2'" in done.stderr


def test_shards_add_up_to_the_whole(photos: Path, tmp_path: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    whole = FeatureStore.open_or_new(str(tmp_path / "whole"))
    records = [extract(list_source(str(photos), shard=Shard(i, 3)), store, [toy.request]) for i in (2, 0, 1)]
    assert sum(record["embedded"] for record in records) == 24
    assert min(record["embedded"] for record in records) > 0
    extract(list_source(str(photos)), whole, [toy.request])
    assert store.snapshot().samples.equals(whole.snapshot().samples)
    assert extract(list_source(str(photos)), store, [toy.request])["opened"] == 0


def test_a_shard_lets_go_of_its_own_samples_only(photos: Path, tmp_path: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    whole = list_source(str(photos))
    extract(whole, store, [toy.request])
    gone = sorted(whole.listing["id"].to_pylist())[::3]
    for name in gone:
        (photos / name).unlink()
    draw(photos / "new.png", (1, 2, 3))
    for index in range(2):
        extract(list_source(str(photos), shard=Shard(index, 2)), store, [toy.request])
    assert store.snapshot().samples["id"].to_pylist() == list_source(str(photos)).listing["id"].to_pylist()


# What is published: when it was listed, which shard, whether whole, and which ids the source had then.
listings = st.tuples(st.integers(0, 5), shards, st.booleans(), st.sets(st.sampled_from(IDS)))


@given(st.lists(listings, max_size=7))
@settings(max_examples=150, deadline=None)
def test_in_whatever_order_shards_are_published_the_newest_listing_of_each_sample_counts(published: list[Any]) -> None:
    store = FeatureStore.open_or_new(f"memory://shards-{next(STORES)}")
    start = datetime.now(UTC) - timedelta(days=1)
    model: dict[str, int] = {}
    heeded: dict[str, int] = {}  # When each id was last listed, there or not.
    for number, (hour, shard, whole, ids) in enumerate(published):
        mine = sorted(held(shard, sorted(ids)))
        columns: dict[str, Any] = dict.fromkeys(samples.SCHEMA.names, [None] * len(mine))
        columns |= {"id": mine, "source": ["s"] * len(mine), "version": [str(number)] * len(mine)}
        rows = pa.table(columns, schema=samples.SCHEMA)
        store.publish("s", rows, (start + timedelta(hours=hour)).isoformat(), whole, shard)
        within = {key for key in held(shard, IDS) if heeded.get(key, -1) <= hour}
        before = dict(model)
        model |= dict.fromkeys(within & set(mine), number)
        if whole:
            model = {key: value for key, value in model.items() if key not in within or key in mine}
        # A listing that changes nothing leaves no trace.
        if whole and model != before:
            heeded |= dict.fromkeys(within, hour)
    found = store.snapshot().samples
    assert found["id"].to_pylist() == sorted(model)
    assert dict(zip(found["id"].to_pylist(), map(int, found["version"].to_pylist()), strict=True)) == model


def test_a_clock_that_was_ahead_does_not_freeze_a_shard(tmp_path: Path, photos: Path, toy: Toy) -> None:
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    source = list_source(str(photos), shard=Shard(0, 2))
    extract(source, store, [toy.request])
    rows = store.snapshot().samples
    ahead = (datetime.now(UTC) + timedelta(days=9)).isoformat()
    store.publish(source.name, rows.slice(1), ahead, True, Shard(0, 2))
    assert store.publish(source.name, rows, datetime.now(UTC).isoformat(), True, ALL)[1] == "published"
    assert store.snapshot().samples.equals(rows)
