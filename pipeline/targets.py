"""Columns of the samples become what heads are fitted to: labels of two or more classes, or quantities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.errors import DataError

Task = Literal["binary", "multiclass", "regression"]
Kind = Literal["classification", "regression"]
"""What a user says of a target; its classes are counted here."""
MOST_INTEGER_CLASSES = 20
"""Integers with more distinct values than this are taken for quantities."""


@dataclass(frozen=True)
class Target:
    """One thing to predict, and for which rows it is known.

    Attributes
    ----------
    name : str
        Its column, or the label that a list column has or has not.
    task : str
        ``binary``, ``multiclass`` or ``regression``.
    y : numpy.ndarray
        Shape (rows,): strings, integers or booleans for classes, float64 for quantities; anything where not `known`.
    known : numpy.ndarray
        bool, shape (rows,).
    """

    name: str
    task: Task
    y: NDArray[Any]
    known: NDArray[np.bool_]


def kind(task: Task) -> Kind:
    """Whether a task is about classes or quantities."""
    return "regression" if task == "regression" else "classification"


def read(frame: pd.DataFrame, names: list[str], asked: Kind | None = None) -> list[Target]:
    """Targets of samples; a list column gives one binary target for each label in it.

    Parameters
    ----------
    frame : pandas.DataFrame
    names : list of str
        Columns of it.
    asked : str, optional
        ``classification`` or ``regression``; by default read off each column: floats, and integers of more than 20
        values, are quantities.

    Raises
    ------
    DataError
        If a column holds no quantities where they were asked for.
    """
    targets: list[Target] = []
    for name in names:
        column = frame[name]
        known = column.notna().to_numpy()
        if pd.api.types.is_float_dtype(column) and np.isinf(column[known].to_numpy(np.float64)).any():
            raise DataError(f"column {name!r} holds infinite values; leave them out with --where")
        if _holds_lists(column[known]):
            targets += _labels_of(column, known)
        else:
            # Booleans beside missing values come as objects.
            values = column[known].infer_objects()
            told = asked or infer_kind(values)
            y = _filled(_quantities(values) if told == "regression" else _classes(values), known)
            targets.append(Target(name, _task(told, y[known]), y, known))
    names_found = [target.name for target in targets]
    doubled = [name for name in names_found if names_found.count(name) > 1]
    if doubled:
        raise DataError(f"target {doubled[0]!r} is asked for twice; name each once")
    return targets


def infer_kind(column: pd.Series[Any]) -> Kind:
    """Tell classes from quantities by the type and the number of distinct values."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return "classification"
    # Integers beside missing values arrive as floats.
    whole = bool((column == column.round()).all())
    return "classification" if whole and column.nunique() <= MOST_INTEGER_CLASSES else "regression"


def _task(told: Kind, y: NDArray[Any]) -> Task:
    if told == "regression":
        return "regression"
    return "binary" if len(np.unique(y)) == 2 else "multiclass"


def _holds_lists(values: pd.Series[Any]) -> bool:
    return values.dtype == object and bool(len(values)) and isinstance(values.iloc[0], np.ndarray | list)


def _labels_of(column: pd.Series[Any], known: NDArray[np.bool_]) -> list[Target]:
    sets = [{str(label) for label in labels} for labels in column[known]]
    labels = sorted(set().union(*sets))
    if not labels:
        raise DataError(f"the lists of column {column.name!r} are all empty; there is nothing to learn")
    return [
        Target(label, "binary", _filled(np.array([label in own for own in sets]), known), known) for label in labels
    ]


def _filled(values: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[Any]:
    y = np.zeros(len(known), values.dtype)
    y[known] = values
    return y


def _quantities(labels: pd.Series[Any]) -> NDArray[np.float64]:
    try:
        return labels.to_numpy(np.float64)
    except (TypeError, ValueError):
        raise DataError(
            f"column {labels.name!r} holds {str(labels.iloc[0])!r}, which is no quantity; leave out --log and --task"
        ) from None


def _classes(labels: pd.Series[Any]) -> NDArray[Any]:
    if pd.api.types.is_float_dtype(labels) and bool((labels == labels.round()).all()):
        return labels.to_numpy(np.int64)
    if pd.api.types.is_float_dtype(labels):
        return labels.map(str).to_numpy(dtype=np.str_)
    if pd.api.types.is_numeric_dtype(labels):
        return labels.to_numpy()
    # Not as Python's strings, of which there would be one for each row.
    codes, names = pd.factorize(labels.astype(str))
    return np.asarray(names, dtype=np.str_)[codes]
