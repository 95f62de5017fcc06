"""What may be wrong with the data: labels that look mistaken, images unlike all others, images that are there twice."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from pipeline.duplicates import Pairs
from pipeline.folds import SEED
from pipeline.metrics import Predictions

NEIGHBOURS = 5
MOST_NEIGHBOURS = 5_000
"""Embeddings among which neighbours are sought."""
FAR = 3.0
"""Interquartile ranges beyond the third quartile from which Tukey (1977) calls a value far out."""
DEVIATIONS = 5.0
"""Robust standard deviations of the residuals beyond which a quantity looks mistaken."""

Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Problems:
    """Tables of what to look at, the most suspicious first.

    Attributes
    ----------
    label_errors : pandas.DataFrame
        A row for each target and held-out sample: ``target, source, id, uri, label, predicted`` (as text), ``p_label``
        (of classes) or ``error`` (of quantities), ``quality`` (0 to 1) and whether it is a ``likely_error``; the index
        is the sample's place in the data set.
    outliers : pandas.DataFrame
        A row for each sample: ``source, id, uri, distance, outlier``; the index as above.
    near_duplicates : pandas.DataFrame
        A row for each pair: ``first_source, first_id, second_source, second_id, similarity, kind``, and the places
        ``first`` and ``second``.
    """

    label_errors: pd.DataFrame
    outliers: pd.DataFrame
    near_duplicates: pd.DataFrame

    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {
            "label_errors": int(self.label_errors["likely_error"].sum()) if len(self.label_errors) else 0,
            "outliers": int(self.outliers["outlier"].sum()),
            "near_duplicates": len(self.near_duplicates),
        }

    def files(self) -> dict[str, bytes]:
        """The tables as Parquet, by file name."""
        tables = {
            "label_errors": self.label_errors,
            "outliers": self.outliers,
            "near_duplicates": self.near_duplicates.drop(columns=["first", "second"]),
        }
        return {f"{name}.parquet": as_parquet(frame) for name, frame in tables.items()}


def as_parquet(frame: pd.DataFrame) -> bytes:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink, compression="zstd")
    return bytes(sink.getvalue())


def label_errors(
    samples: pd.DataFrame, target: str, rows: NDArray[np.int64], found: Predictions, log: bool = False
) -> pd.DataFrame:
    """Rank the labels by how little the heads that were fitted without them believe them.

    For classes confident learning (Northcutt, Jiang and Chuang 2021), for quantities the residuals by their robust
    standard deviation; both as cleanlab scores them.

    Parameters
    ----------
    samples : pandas.DataFrame
    target : str
    rows : numpy.ndarray
        int64, shape (scored,): places of the predictions among the samples.
    found : Predictions
        Held out, with probabilities where there are classes.
    log : bool
        Whether residuals are those of logarithms.
    """
    with warnings.catch_warnings():
        # Of tqdm, in notebooks without widgets; no bar is shown.
        warnings.filterwarnings("ignore", "IProgress not found")
        import cleanlab  # noqa: F401

    of = samples.iloc[rows]
    table = pd.DataFrame({"target": target, "source": of["source"], "id": of["id"], "uri": of["uri"]}).set_index(rows)
    if found.classes is None:
        y, predicted = (np.log(values) if log else values for values in (found.y, found.predicted))
        table["label"], table["predicted"] = (list(map(in_digits, each)) for each in (found.y, found.predicted))
        table["error"] = found.predicted - found.y
        table["quality"], table["likely_error"] = _quality_of_quantities(y, predicted)
        # Far from all others, every quality is 0.
        order = np.argsort(-np.abs(y - predicted), kind="stable")
        return table.iloc[order].sort_values(["likely_error", "quality"], ascending=[False, True], kind="stable")
    assert found.shares is not None
    table["label"] = pd.Series(found.classes[found.y], table.index).astype(str)
    table["predicted"] = pd.Series(found.classes[found.predicted], table.index).astype(str)
    table["p_label"] = found.shares[np.arange(len(found)), found.y]
    table["quality"], table["likely_error"] = _quality_of_classes(found.y, found.shares)
    return table.sort_values(["likely_error", "quality", "id"], ascending=[False, True, True])


def _quality_of_classes(y: NDArray[np.int64], shares: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    # A head may never have seen a class of the fold, and rows of a confident joint must not be empty.
    shares = np.clip(shares, 1e-9, 1)
    shares = shares / shares.sum(axis=1, keepdims=True)
    quality = get_label_quality_scores(y, shares, method="normalized_margin")
    return quality, np.asarray(find_label_issues(y, shares, n_jobs=1), bool)


def _quality_of_quantities(y: Floats, predicted: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    from cleanlab.regression.rank import get_label_quality_scores

    residual = np.abs(y - predicted)
    spread = 1.4826 * float(np.median(residual))
    unit = spread if spread > 0 else 1.0
    quality = get_label_quality_scores(y / unit, predicted / unit, method="residual")
    return np.asarray(quality, float), (residual > DEVIATIONS * unit) & (spread > 0)


def in_digits(value: float) -> str:
    """A quantity with the digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def outliers(samples: pd.DataFrame, X: Matrix) -> pd.DataFrame:
    """Rank images by the mean distance to their nearest neighbours (Angiulli and Pizzuti 2002).

    Parameters
    ----------
    samples : pandas.DataFrame
    X : numpy.ndarray
        float32, shape (samples, dim).
    """
    table = samples[["source", "id", "uri"]].reset_index(drop=True)
    # Copies of an image would be its neighbours.
    first = np.flatnonzero(~samples["sha256"].duplicated().to_numpy())
    scaled = (X - X.mean(axis=0)) / (X.std(axis=0) + 1e-6)
    among = np.sort(np.random.default_rng(SEED).permutation(first)[:MOST_NEIGHBOURS])
    count = min(NEIGHBOURS + 1, len(among))
    distance = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(scaled[among]).kneighbors(scaled)[0]
    # The nearest of those that are among them is themselves.
    own = np.isin(samples["sha256"].to_numpy(), samples["sha256"].to_numpy()[among])
    table["distance"] = np.where(own, distance[:, 1:].sum(axis=1), distance[:, :-1].sum(axis=1)) / max(count - 1, 1)
    low, high = np.quantile(table["distance"], (0.25, 0.75))
    table["outlier"] = table["distance"] > high + FAR * (high - low)
    return table.sort_values(["distance", "id"], ascending=[False, True])


def near_duplicates(samples: pd.DataFrame, found: Pairs) -> pd.DataFrame:
    """List pairs of samples with one image: those with the same bytes, then `found`, the most similar first."""
    codes = pd.factorize(samples["sha256"])[0]
    first = np.unique(codes, return_index=True)[1][codes]
    again = np.flatnonzero(first != np.arange(len(samples)))
    same = Pairs(first[again], again, np.ones(len(again), np.float32))
    return pd.concat([pairs(samples, same, "same bytes"), pairs(samples, found, "near")])


def pairs(samples: pd.DataFrame, found: Pairs, kind: str) -> pd.DataFrame:
    """Pairs with the names of their samples."""
    table = pd.DataFrame({"first": found.first, "second": found.second, "similarity": found.similarity, "kind": kind})
    for side in ("first", "second"):
        of = samples.iloc[table[side].to_numpy()]
        table[f"{side}_source"], table[f"{side}_id"] = of["source"].to_numpy(), of["id"].to_numpy()
    return table
