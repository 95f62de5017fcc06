"""Which images a page shows side by side, and what it tells of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline import problems, thumbnails
from pipeline.atlas import Atlas
from pipeline.metrics import Predictions
from pipeline.problems import Problems
from pipeline.thumbnails import Thumbnails

MOST_SHOWN = 24
"""Pictures of a gallery."""
MOST_ODD = 14
LONGEST = 60
"""Characters of a label."""

Rows = NDArray[np.int64]
Item = tuple[str, list[int]]
"""What is told of some samples, and their places in the data set."""


def of_training(
    samples: pd.DataFrame, found: dict[str, tuple[Rows, Predictions]], wrong: Problems
) -> dict[str, list[Item]]:
    """Say which samples each gallery shows, and what it tells of them."""
    listed: dict[str, list[Item]] = {"pairs": pairs_of(wrong.near_duplicates)}
    listed["outliers"] = odd_ones(wrong.outliers)
    for name, (rows, said) in found.items():
        errors = wrong.label_errors
        mine = errors[errors["target"] == name] if len(errors) else errors
        likely = list(_first(mine, "likely_error")) if len(mine) else []
        listed[f"errors {name}"] = [(f"{cell(row.label)}, or {cell(row.predicted)}?", [row.Index]) for row in likely]
        listed[f"mistakes {name}"] = _mistakes(rows, said, {row.Index for row in likely})
    return listed


def odd_ones(table: pd.DataFrame) -> list[Item]:
    """The oddest images for a gallery, whether they lie far out or not."""
    some = table.head(MOST_ODD)
    told = [f"{far:.1f}{', far out' if out else ''}" for far, out in some[["distance", "outlier"]].to_numpy().tolist()]
    return [(said, [row]) for said, row in zip(told, some.index.tolist(), strict=True)]


def pairs_of(table: pd.DataFrame) -> list[Item]:
    """Pairs for a gallery."""
    some = table.groupby("kind", sort=False).head(MOST_SHOWN // max(table["kind"].nunique(), 1))
    told = np.where(some["kind"] == "near", some["similarity"].map("{:.3f}".format), some["kind"])
    return list(zip(told.tolist(), some[["first", "second"]].to_numpy().tolist(), strict=True))


def shown(listed: Iterable[list[Item]], atlas: Atlas) -> set[int]:
    """Places of all samples that a page shows."""
    return {*atlas.rows.tolist(), *(row for items in listed for _, rows in items for row in rows)}


def filled(items: list[Item], samples: pd.DataFrame, pictures: Thumbnails | None) -> list[dict[str, Any]]:
    """What a template draws: pictures, if any are wanted, names and what is told."""
    return [
        {
            "told": told,
            "names": [str(samples["id"].iloc[row]) for row in rows],
            "pictures": None
            if pictures is None
            else [thumbnails.data_uri(pictures[row]) if row in pictures else None for row in rows],
        }
        for told, rows in items
    ]


def cell(value: Any) -> str:
    """A label, cut where it is long, or a quantity."""
    if isinstance(value, float | np.floating):
        return problems.in_digits(float(value))
    text = str(value) or '""'
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _mistakes(rows: Rows, said: Predictions, others: set[int]) -> list[Item]:
    if said.classes is None:
        error = np.abs(said.predicted - said.y)
        order = [p for p in np.argsort(-error, kind="stable") if rows[p] not in others and error[p]][:MOST_SHOWN]
        return [(f"{cell(said.y[p])}, predicted {cell(said.predicted[p])}", [int(rows[p])]) for p in order]
    wrong = np.flatnonzero(said.y != said.predicted)
    sure = said.shares[wrong, said.predicted[wrong]] if said.shares is not None else np.zeros(len(wrong))
    order = [place for place in wrong[np.argsort(-sure, kind="stable")] if rows[place] not in others][:MOST_SHOWN]
    found = []
    for place in order:
        share = "" if said.shares is None else f" ({said.shares[place, said.predicted[place]]:.0%})"
        told = f"{cell(said.classes[said.y[place]])}, predicted {cell(said.classes[said.predicted[place]])}{share}"
        found.append((told, [int(rows[place])]))
    return found


def _first(table: pd.DataFrame, flag: str) -> Iterable[Any]:
    return table[table[flag]].head(MOST_SHOWN).itertuples()
