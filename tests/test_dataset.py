from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from conftest import COLOURS, Toy, draw
from features.errors import DataError, PermafrostError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request
from pipeline import dataset, targets
from pipeline.dataset import Dataset, Selection

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
    ("values", "kind"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([0, 1, 2], "classification"),
        ([0.0, 1.0, 2.0], "classification"),
        (list(range(21)), "regression"),
        ([0.5, 1.0], "regression"),
    ],
)
def test_the_task_is_read_off_the_target(values: list[object], kind: str) -> None:
    assert targets.infer_kind(pd.Series(values)) == kind
    (target,) = targets.read(pd.DataFrame({"it": values}), ["it"])
    assert targets.kind(target.task) == kind and (target.task == "binary") == (
        kind == "classification" and len(set(values)) == 2
    )


def test_a_list_column_is_a_target_for_each_label() -> None:
    frame = pd.DataFrame({"tags": [["b", "a"], [], None, ["a"]]})
    a, b = targets.read(frame, ["tags"])
    assert (a.name, b.name, a.task) == ("a", "b", "binary")
    assert a.known.tolist() == b.known.tolist() == [True, True, False, True]
    assert a.y[a.known].tolist() == [True, False, True] and b.y[b.known].tolist() == [True, False, False]
    with pytest.raises(DataError, match="lists of column 'tags' are all empty"):
        targets.read(pd.DataFrame({"tags": [[], []]}), ["tags"])
    with pytest.raises(DataError, match="target 'a' is asked for twice"):
        targets.read(frame.assign(a=[0, 1, 0, 1]), ["tags", "a"])


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


def loaded(store: FeatureStore, *columns: str, near: bool = False, **options: Any) -> Dataset:
    chosen = Selection(near_duplicates=near, **options)
    return dataset.load(store, [store.pick_view()], store.snapshot(), list(columns), chosen)


def test_embeddings_meet_labels_by_content(store: FeatureStore) -> None:
    data = loaded(store, "kind")
    assert {reason: count for reason, count in data.left_out.items() if count} == {"failed": 1, "unlabelled": 1}
    X = data.embeddings["toy-V1-penultimate"]
    assert len(data) == 10 and X.dtype == np.float32
    place = {key: number for number, key in enumerate(data.samples["id"])}
    assert (X[place["copy.png"]] == X[place["0.png"]]).all()
    assert data.groups.of[place["copy.png"]] == data.groups.of[place["0.png"]]
    assert len(set(data.groups.of)) == 9 and (data.groups.copies, data.groups.near) == (1, 0)
    strongest = X.argmax(1)
    assert all(strongest[place[f"{n}.png"]] == n % 3 for n in range(10) if n != 3)


def test_rows_of_the_test_are_never_trained_on(store: FeatureStore) -> None:
    data = loaded(store, "kind", where="size < 8", test_where="size in (0, 1, 10)")
    assert sorted(data.samples["size"][~data.tested]) == [2, 4, 5, 6, 7]
    assert sorted(data.samples["size"][data.tested]) == [0, 1, 10]
    assert data.overlap() == []
    assert loaded(store, "kind", test_where="size = 10").overlap() == ["copy.png"]


def test_what_training_lacks_is_said(store: FeatureStore) -> None:
    with pytest.raises(DataError, match="the samples have kind, size"):
        loaded(store, "label")
    with pytest.raises(DataError, match="no column 'track' for --groups"):
        loaded(store, "kind", groups="track")
    with pytest.raises(DataError, match="no sample to train on: of 1 chosen, 1 failed"):
        loaded(store, "size", where="id = 'absent.png'")
    with pytest.raises(DataError, match="no sample to test on"):
        loaded(store, "size", test_where="size > 99")
    with pytest.raises(DataError, match=r"no view other; it has toy-V1-penultimate"):
        store.pick_view("other")


def test_groups_are_copies_and_what_shares_a_value(store: FeatureStore) -> None:
    data = loaded(store, "size", groups="kind")
    groups = dict(zip(data.samples["id"], data.groups.of, strict=True))
    assert groups["0.png"] == groups["2.png"] == groups["copy.png"] != groups["1.png"] == groups["5.png"]
    assert list(groups.values()).count(groups["3.png"]) == 1  # It has no kind.


def test_labels_from_a_table(store: FeatureStore, tmp_path: Path) -> None:
    rows = [(f"{number}.png", "xy"[number % 2], number) for number in range(10)]
    frame = pd.DataFrame([*rows, rows[0], ("1.png", "z", 1), ("other.png", "x", 0)], columns=["image", "kind", "new"])
    frame.to_csv(tmp_path / "labels.csv", index=False)
    table = str(tmp_path / "labels.csv")
    data = loaded(store, "kind", labels=table, on="image", max_unmatched="3")
    assert data.labels == {"table": table, "rows": 13, "unmatched": 1, "repeated": 1, "contradictory": 2}
    found = data.samples.set_index("id")
    assert sorted(found.index) == [f"{n}.png" for n in range(10) if n != 1]
    assert found["kind"].to_dict() == {f"{n}.png": "xy"[n % 2] for n in range(10) if n != 1}
    assert found.loc["4.png", "new"] == 4 and found.loc["4.png", "size"] == 4
    with pytest.raises(DataError, match=r"1 fit no sample by 'id', such as 'other.png', and 2 contradict"):
        loaded(store, "kind", labels=table, on="image")
    with pytest.raises(DataError, match="no column 'file' for --on; it has image, kind, new"):
        loaded(store, "kind", labels=table, on="file")
    with pytest.raises(PermafrostError, match="--max-unmatched 'some' is neither"):
        loaded(store, "kind", labels=table, on="image", max_unmatched="some")
    with pytest.raises(PermafrostError, match=r"absent\.csv is not there|No such file|cannot be read"):
        loaded(store, "kind", labels=str(tmp_path / "absent.csv"))


def test_a_split_column(store: FeatureStore, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"id": [f"{number}.png" for number in range(10)], "part": ["train"] * 6 + ["VAL", "val", "", ""]}
    )
    table = str(tmp_path / "parts.csv")
    frame.to_csv(table, index=False)
    data = loaded(store, "size", labels=table, split="part")
    assert data.samples["id"][data.tested].tolist() == ["6.png", "7.png"] and len(data) == 8
    frame.loc[8, "part"] = "test"
    frame.to_csv(table, index=False)
    data = loaded(store, "size", labels=table, split="part")
    assert data.samples["id"][data.tested].tolist() == ["8.png"] and len(data) == 9
    with pytest.raises(DataError, match="--split and --test-where both"):
        loaded(store, "size", labels=table, split="part", test_where="size = 1")
    with pytest.raises(DataError, match=r"column 'kind' says 'a'; --split knows train, val and test"):
        loaded(store, "size", split="kind")


def test_labels_fit_one_source(store: FeatureStore, tmp_path: Path) -> None:
    extract(list_source(str(tmp_path / "table.csv"), name="again"), store, [Request("toy", "V1")])
    pd.DataFrame({"id": ["0.png"], "kind": ["x"]}).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(DataError, match=r"1 ids of .*labels\.csv stand in two sources; join --on sha256"):
        loaded(store, "kind", labels=str(tmp_path / "labels.csv"))


def test_odd_columns_are_no_targets() -> None:
    with pytest.raises(DataError, match="'it' holds infinite values"):
        targets.read(pd.DataFrame({"it": [1.0, np.inf]}), ["it"])
    (flag,) = targets.read(pd.DataFrame({"it": [True, None, False]}), ["it"])
    assert flag.y.dtype == bool and flag.task == "binary"
