"""A store and a target become a matrix: which samples, in which order, with which labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from features import parts, samples
from features.errors import DataError, ViewMismatch
from features.store import FeatureStore, Snapshot
from features.views import View

Task = Literal["classification", "regression"]
MOST_INTEGER_CLASSES = 20
"""Integers with more distinct values than this are taken for quantities."""


@dataclass(frozen=True)
class Dataset:
    """Samples with their embeddings and labels.

    Attributes
    ----------
    samples : pandas.DataFrame
        One row per sample, by `features.samples.SCHEMA` and with the sources' own columns.
    X : numpy.ndarray
        float32, shape (samples, dim).
    y : numpy.ndarray
        Labels, shape (samples,): strings, integers or booleans for classes, float64 for quantities.
    groups : numpy.ndarray
        int64, shape (samples,): equal for samples that must not be separated, which are copies of one image.
    """

    samples: pd.DataFrame
    X: NDArray[np.float32]
    y: NDArray[Any]
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Split:
    """What to train on, and what is kept for the test.

    Attributes
    ----------
    train : Dataset
    test : Dataset or None
    task : str
        ``classification`` or ``regression``.
    left_out : dict of str to int
        How many of the chosen samples are in neither part, by reason: ``failed``, ``not_embedded``, ``unlabelled``.
    test_copies : int
        Test samples whose very bytes are in the training set too.
    """

    train: Dataset
    test: Dataset | None
    task: Task
    left_out: dict[str, int]
    test_copies: int


def load(
    store: FeatureStore,
    view: View,
    snapshot: Snapshot,
    target: str,
    *,
    where: str | None = None,
    test_where: str | None = None,
    task: Task | None = None,
) -> Split:
    """Join samples, labels and embeddings.

    Parameters
    ----------
    store : FeatureStore
    view : View
    snapshot : Snapshot
    target : str
        Column with the labels.
    where : str, optional
        SQL condition over the samples' columns; all samples by default.
    test_where : str, optional
        SQL condition for the samples of the test; these are never trained on.
    task : str, optional
        By default read off the target: floats, and integers of more than 20 values, are quantities.

    Raises
    ------
    DataError
        If a condition cannot be run, the target is no column, or nothing is left to train on.
    """
    table = snapshot.samples
    if target not in samples.own_columns(table):
        raise DataError(
            f"no column {target!r} to train for; the samples have {', '.join(samples.own_columns(table)) or 'none'}"
        )
    frame = table.to_pandas()
    tested = select(table, test_where) if test_where is not None else np.zeros(len(frame), bool)
    chosen = (select(table, where) if where is not None else np.ones(len(frame), bool)) | tested
    found = np.zeros(len(frame), bool)
    found[chosen], matrix = parts.gather(store.root, view, table["sha256"].filter(pa.array(chosen)))
    rows = np.where(found, np.cumsum(chosen) - 1, -1)
    ok, labelled = frame["status"].eq("ok").to_numpy(), frame[target].notna().to_numpy()
    left_out = {
        "failed": int((chosen & ~ok).sum()),
        "not_embedded": int((chosen & ok & (rows < 0)).sum()),
        "unlabelled": int((chosen & ok & (rows >= 0) & ~labelled).sum()),
    }
    usable = chosen & ok & (rows >= 0) & labelled
    task = task or infer_task(frame.loc[usable, target])

    def part(mask: NDArray[np.bool_]) -> Dataset:
        kept = frame[mask].reset_index(drop=True)
        y = _quantities(kept[target]) if task == "regression" else _classes(kept[target])
        return Dataset(kept, matrix[rows[mask]], y, pd.factorize(kept["sha256"])[0].astype(np.int64))

    train = part(usable & ~tested)
    if not len(train):
        raise DataError(f"no sample to train on: of {int(chosen.sum())} chosen, {_told(left_out, int(tested.sum()))}")
    test = part(usable & tested) if test_where is not None else None
    if test is not None and not len(test):
        raise DataError(f"no sample to test on: --test-where chose {int(tested.sum())}, none usable")
    copies = 0 if test is None else int(test.samples["sha256"].isin(train.samples["sha256"]).sum())
    return Split(train, test, task, left_out, copies)


def matching_view(store: FeatureStore, wanted: View) -> View:
    """The view of a store that has the fingerprint of another view.

    Raises
    ------
    ViewMismatch
        If there is none.
    """
    views = store.views()
    for view in views.values():
        if view.fingerprint == wanted.fingerprint:
            return view
    if wanted.name in views:
        views[wanted.name].require(wanted.spec)
    raise ViewMismatch(f"store {store.root.path} has no view with the embeddings that {wanted.name!r} stands for")


def select(table: pa.Table, condition: str) -> NDArray[np.bool_]:
    """Which rows of the listing satisfy an SQL condition.

    The condition is a user's text, so it runs where it can reach nothing but these rows: no file, no network, no
    other table, no variable of this process, and no way to change that.

    Raises
    ------
    DataError
        If the condition is not one, names an unknown column, or reaches for anything else.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "lock_configuration": "true",
    }
    number = "permafrost_row"
    numbered = table.append_column(number, pa.array(np.arange(len(table))))
    try:
        with duckdb.connect(":memory:", config=settings) as connection:
            chosen = connection.from_arrow(numbered).filter(condition).project(number).fetchnumpy()[number]
    except duckdb.Error as error:
        raise DataError(f"condition {condition!r} is refused: {f'{error}'.splitlines()[0]}") from None
    mask = np.zeros(len(table), bool)
    mask[np.asarray(chosen, dtype=np.int64)] = True
    return mask


def infer_task(target: pd.Series[Any]) -> Task:
    """Tell classes from quantities by the type and the number of distinct values."""
    if pd.api.types.is_bool_dtype(target) or not pd.api.types.is_numeric_dtype(target):
        return "classification"
    # Integers beside missing values arrive as floats.
    whole = bool((target == target.round()).all())
    return "classification" if whole and target.nunique() <= MOST_INTEGER_CLASSES else "regression"


def _quantities(labels: pd.Series[Any]) -> NDArray[np.float64]:
    try:
        y = labels.to_numpy(np.float64)
    except (TypeError, ValueError):
        raise DataError(
            f"column {labels.name!r} holds {str(labels.iloc[0])!r}, which is no quantity; use --task classification"
        ) from None
    if not np.isfinite(y).all():
        raise DataError(f"column {labels.name!r} holds infinite values; leave them out with --where")
    return y


def _classes(labels: pd.Series[Any]) -> NDArray[Any]:
    if pd.api.types.is_float_dtype(labels) and bool((labels == labels.round()).all()):
        return labels.to_numpy(np.int64)
    if pd.api.types.is_float_dtype(labels):
        return labels.map(str).to_numpy(dtype=np.str_)
    if pd.api.types.is_numeric_dtype(labels):
        return labels.to_numpy()
    return labels.astype(str).to_numpy(dtype=np.str_)


def _told(left_out: dict[str, int], tested: int) -> str:
    return ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in (left_out | {"for the test": tested}).items()
    )
