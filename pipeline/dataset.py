"""A store and a question become matrices: which samples, in which order, with which labels, split how."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from features import parts, samples
from features.errors import DataError, ViewMismatch
from features.fill import alike
from features.store import FeatureStore, Snapshot
from features.views import View
from pipeline import blocks, streaming
from pipeline.blocks import Blocks
from pipeline.folds import SEED, Examples
from pipeline.groups import Groups, find
from pipeline.labels import MOST_UNMATCHED, join
from pipeline.targets import Target

MOST_SEEN = 20_000
"""Samples that stand for all where their embeddings do not fit in memory."""
TRAINED, VALIDATED, TESTED = frozenset({"train", "training"}), frozenset({"val", "valid", "validation"}), "test"


@dataclass(frozen=True)
class Selection:
    """Which samples count, and how they are split.

    Attributes
    ----------
    where : str, optional
        SQL condition over the samples' columns; all samples by default.
    test_where : str, optional
        SQL condition for the samples of the test; these are never trained on.
    split : str, optional
        Column with ``train``, ``val`` and ``test``, in the place of both conditions. Where nothing is called ``test``,
        the test is on ``val``; otherwise ``val`` is trained on, since folds take its part.
    groups : str, optional
        Column whose values must not be in two folds.
    time : str, optional
        Column by which the past is told from the future.
    labels : str, optional
        Table with further columns; see `pipeline.labels.join`.
    on, max_unmatched : str
    near_duplicates : bool
        Whether near duplicates must share a fold.

    Examples
    --------
    >>> from pathlib import Path
    >>> from pipeline.train import train
    >>> some = Selection(where="label != 'red'", test_where="split = 'test'")
    >>> facts = train(FeatureStore.open("store"), "label", Path("trained"), selection=some, folds=2)
    >>> facts["rows"]["train"], facts["rows"]["test"]
    (12, 6)
    """

    where: str | None = None
    test_where: str | None = None
    split: str | None = None
    groups: str | None = None
    time: str | None = None
    labels: str | None = None
    on: str = "id"
    max_unmatched: str = MOST_UNMATCHED
    near_duplicates: bool = True


@dataclass(frozen=True)
class Dataset:
    """Samples with their embeddings, in one order, and what is known of them together.

    Attributes
    ----------
    samples : pandas.DataFrame
        One row per sample, by `features.samples.SCHEMA`, with the sources' own columns and those of the labels.
    embeddings : dict of str to numpy.ndarray or Blocks
        By view; float32, shape (samples, dim).
    tested : numpy.ndarray
        bool, shape (samples,): kept for the test.
    groups : Groups
    times : numpy.ndarray or None
    left_out : dict of str to int
        How many samples are not here, by reason: ``failed``, ``not_embedded``, ``unlabelled``, ``without_time``,
        ``without_split``.
    labels : dict or None
        How the table with the labels fitted.
    places : numpy.ndarray
        int64, shape (samples,), ascending: which these are of the samples that were loaded.
    """

    samples: pd.DataFrame
    embeddings: dict[str, NDArray[np.float32] | Blocks]
    tested: NDArray[np.bool_]
    groups: Groups
    times: NDArray[Any] | None
    left_out: dict[str, int]
    labels: dict[str, Any] | None
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def streamed(self) -> bool:
        """Whether the embeddings are not in memory."""
        return any(isinstance(X, Blocks) for X in self.embeddings.values())

    def examples(self, target: Target, X: NDArray[np.float32] | Blocks, rows: NDArray[np.bool_]) -> Examples:
        """Some of the samples with one of their labels; `X` has a row for each sample."""
        if rows.all():
            return Examples(X, target.y, target.task, self.groups.of, self.times)
        times = None if self.times is None else self.times[rows]
        return Examples(X[rows], target.y[rows], target.task, self.groups.of[rows], times)

    def in_memory(self) -> Dataset:
        """The same with the embeddings in memory; where these were not, a random sample of it."""
        if not self.streamed:
            return self
        most = min(MOST_SEEN, *(streaming.bearable(X.dim) for X in self.embeddings.values() if isinstance(X, Blocks)))
        rows = np.sort(np.random.default_rng(SEED).permutation(len(self))[: max(1, most)])
        return replace(
            self,
            samples=self.samples.iloc[rows].reset_index(drop=True),
            embeddings={name: np.asarray(X[rows]) for name, X in self.embeddings.items()},
            tested=self.tested[rows],
            groups=replace(self.groups, of=self.groups.of[rows], alike=self.groups.alike[rows]),
            times=None if self.times is None else self.times[rows],
            places=self.places[rows],
        )

    def overlap(self) -> list[str]:
        """Ids of test samples of which the training set has a copy, a near duplicate, or one of the same group."""
        alike, of = self.groups.alike, self.groups.of
        known = np.isin(alike, alike[~self.tested]) | np.isin(of, of[~self.tested])
        return list(self.samples.loc[self.tested & known, "id"])


def load(
    store: FeatureStore,
    views: list[View],
    snapshot: Snapshot,
    targets: list[str],
    selection: Selection,
    stream: Callable[[int, int], bool] = lambda rows, dim: False,
    scratch: Path | None = None,
) -> Dataset:
    """Join samples, labels and embeddings; samples that any of the views lacks are left out.

    Parameters
    ----------
    store : FeatureStore
    views : list of View
    snapshot : Snapshot
    targets : list of str
        Columns.
    selection : Selection
    stream : callable, optional
        Told how many embeddings of how many numbers there are; says whether these go into a file instead of memory, and
        no near duplicates are sought.
    scratch : pathlib.Path, optional
        Folder for that file, which has no name and is gone however this process ends.

    Raises
    ------
    DataError
        If a condition cannot be run, a column is not there, or nothing is left to train on.
    """
    table, matched = snapshot.samples, None
    if selection.labels:
        table, matched = join(table, selection.labels, selection.on, selection.max_unmatched)
    for column, why in [
        *((target, "to train for") for target in targets),
        *((selection.groups, "for --groups"), (selection.time, "for --time"), (selection.split, "for --split")),
    ]:
        if column is not None and column not in samples.own_columns(table):
            own = ", ".join(samples.own_columns(table)) or "none"
            raise DataError(f"no column {column!r} {why}; the samples have {own}")
        if column is not None and why != "to train for" and pa.types.is_nested(table.schema.field(column).type):
            raise DataError(f"column {column!r} holds lists or the like, which is nothing {why}")
    frame = table.drop_columns(["version", "error"]).to_pandas()
    chosen, tested = _parts(table, frame, selection)
    ok = frame["status"].eq("ok").to_numpy()
    known = frame[targets].notna().any(axis=1).to_numpy() if targets else np.ones(len(frame), bool)
    timed = frame[selection.time].notna().to_numpy() if selection.time else np.ones(len(frame), bool)
    found, matrices = np.ones(len(frame), bool), dict[str, NDArray[np.float32] | Blocks]()
    asked = chosen & ok & known & timed
    wanted = table["sha256"] if asked.all() else table["sha256"].filter(pa.array(asked))
    for view in views:
        there = np.zeros(len(frame), bool)
        if stream(len(wanted), view.dim):
            file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
            there[asked], matrices[view.name] = blocks.write(store.root, view, wanted, file)
        else:
            there[asked], matrices[view.name] = parts.gather(store.root, view, wanted)
        found &= there
    left_out = {
        "failed": int((chosen & ~ok).sum()),
        "not_embedded": int((asked & ~found).sum()),
        "unlabelled": int((chosen & ok & ~known).sum()),
        "without_time": int((chosen & ok & known & ~timed).sum()),
        "without_split": int((frame[selection.split].isna()).sum()) if selection.split else 0,
    }
    usable = asked & found
    for part, use in ((usable & ~tested, "train on" if targets else "look at"), (usable & tested, "test on")):
        if not part.any() and (use != "test on" or tested.any() or selection.test_where is not None):
            told = left_out | {"for the test": int(tested.sum())}
            counted = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in told.items())
            raise DataError(f"no sample to {use}: of {int(chosen.sum())} chosen, {counted}")
    kept = frame if usable.all() else frame[usable].reset_index(drop=True)
    rows = (np.cumsum(asked) - 1)[usable]
    embeddings = {name: matrix if len(rows) == len(matrix) else matrix[rows] for name, matrix in matrices.items()}
    in_memory = [matrix for matrix in embeddings.values() if not isinstance(matrix, Blocks)]
    together = find(kept, in_memory, selection.groups, selection.near_duplicates)
    times = kept[selection.time].to_numpy() if selection.time else None
    return Dataset(kept, embeddings, tested[usable], together, times, left_out, matched, np.arange(len(kept)))


def _parts(table: pa.Table, frame: pd.DataFrame, selection: Selection) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which samples are chosen, and which of these are for the test."""
    everything, nothing = np.ones(len(frame), bool), np.zeros(len(frame), bool)
    chosen = select(table, selection.where) if selection.where is not None else everything
    if selection.split is None:
        tested = select(table, selection.test_where) if selection.test_where is not None else nothing
        return chosen | tested, tested
    if selection.test_where is not None:
        raise DataError("--split and --test-where both say what the test is; use one of them")
    told = frame[selection.split].astype("string").str.lower()
    foreign = sorted(set(told.dropna()) - TRAINED - VALIDATED - {TESTED})
    if foreign:
        raise DataError(f"column {selection.split!r} says {foreign[0]!r}; --split knows train, val and test")
    tested = told.eq(TESTED).fillna(False).to_numpy(bool)
    if not tested.any():
        tested = told.isin(VALIDATED).fillna(False).to_numpy(bool)
    return chosen & told.notna().to_numpy(), chosen & tested


def matching_view(store: FeatureStore, wanted: View) -> View:
    """The view of a store that has the fingerprint of another view.

    Raises
    ------
    ViewMismatch
        If there is none.
    """
    if view := alike(store, wanted):
        return view
    if view := store.view(wanted.name):
        view.require(wanted.spec, "use another store")
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
