from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from conftest import COLOURS, Toy, draw
from features.errors import DataError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from pipeline import dataset

SECRETS = pa.table({"content": ["root"]})
LISTING = pa.table({"id": ["a", "b", "c"], "label": ["x", "y", None], "n": [1, 2, 3]})


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("label = 'x'", [0]),
        ("n >= 2 and label is not null", [1]),
        ("id in ('a', 'c')", [0, 2]),
        ("n between 2 and 3", [1, 2]),
    ],
)
def test_a_condition_selects_rows(condition: str, chosen: list[int]) -> None:
    assert np.flatnonzero(dataset.select(LISTING, condition)).tolist() == chosen


@pytest.mark.parametrize(
    "condition",
    [
        "label = (select content from read_text('/etc/passwd'))",
        "label in (select column0 from '/etc/passwd')",
        "label in (select * from read_csv('/etc/passwd'))",
        "label in (select file from glob('/etc/*'))",
        "label in (select content from SECRETS)",
        "label in (select content from read_text('https://example.com'))",
        "1 = 1; copy samples to '/tmp/stolen.csv'",
        "true) union select * from duckdb_secrets() where (true",
        "label in (select name from duckdb_secrets())",
        "label = getenv('HOME')",
        "no_such_column = 1",
        "count(*) > 1",
        "label =",
        "",
    ],
)
def test_a_condition_reaches_nothing_but_the_samples(condition: str) -> None:
    assert SECRETS is not None
    with pytest.raises(DataError) as caught:
        dataset.select(LISTING, condition)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([0, 1, 2], "classification"),
        ([0.0, 1.0, 2.0], "classification"),
        (list(range(21)), "regression"),
        ([0.5, 1.0], "regression"),
    ],
)
def test_the_task_is_read_off_the_target(values: list[object], task: str) -> None:
    assert dataset.infer_task(pd.Series(values)) == task


@pytest.fixture
def store(tmp_path: Path, toy: Toy) -> FeatureStore:
    """Twelve images of a table: one not there, one unlabelled, one a copy of another."""
    random = np.random.default_rng(0)
    for number in range(11):
        draw(tmp_path / f"{number}.png", list(COLOURS.values())[number % 3], random)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    names = [*(f"{number}.png" for number in range(10)), "copy.png", "absent.png"]
    frame = pd.DataFrame({"file": names, "kind": [*"ab" * 6], "size": range(12)})
    frame.loc[3, "kind"] = None
    frame.to_csv(tmp_path / "table.csv", index=False)
    opened = FeatureStore.open_or_new(str(tmp_path / "store"))
    extract(list_source(str(tmp_path / "table.csv")), opened, [toy.request])
    return opened


def loaded(store: FeatureStore, target: str, **options: str) -> dataset.Split:
    return dataset.load(store, store.pick_view(), store.snapshot(), target, **options)  # type: ignore[arg-type]


def test_embeddings_meet_labels_by_content(store: FeatureStore) -> None:
    split = loaded(store, "kind")
    assert split.left_out == {"failed": 1, "not_embedded": 0, "unlabelled": 1}
    assert len(split.train) == 10 and split.train.X.dtype == np.float32
    rows = split.train.samples.set_index("id")
    place = {key: number for number, key in enumerate(rows.index)}
    assert (split.train.X[place["copy.png"]] == split.train.X[place["0.png"]]).all()
    assert split.train.groups[place["copy.png"]] == split.train.groups[place["0.png"]]
    assert len(set(split.train.groups)) == 9
    strongest = split.train.X.argmax(1)
    assert all(strongest[place[f"{n}.png"]] == n % 3 for n in range(10) if n != 3)


def test_rows_of_the_test_are_never_trained_on(store: FeatureStore) -> None:
    split = loaded(store, "kind", where="size < 8", test_where="size in (0, 1, 10)")
    assert split.test is not None
    assert sorted(split.train.samples["size"]) == [2, 4, 5, 6, 7]
    assert sorted(split.test.samples["size"]) == [0, 1, 10]
    assert split.test_copies == 0
    assert loaded(store, "kind", test_where="size = 10").test_copies == 1


def test_what_training_lacks_is_said(store: FeatureStore) -> None:
    with pytest.raises(DataError, match="the samples have kind, size"):
        loaded(store, "label")
    with pytest.raises(DataError, match="no sample to train on: of 1 chosen, 1 failed"):
        loaded(store, "size", where="id = 'absent.png'")
    with pytest.raises(DataError, match="no sample to test on"):
        loaded(store, "size", test_where="size > 99")
    with pytest.raises(DataError, match=r"no view other; it has toy-V1-penultimate"):
        store.pick_view("other")
