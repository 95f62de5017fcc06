"""What heads say of an image, as a record of fixed size, and such records as columns.

A file of records can be written in any order of the rows, and read in the right one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import conformal, drift
from pipeline.audit import blamed_on_the_bundle
from pipeline.bundle import Bundle

Records = NDArray[np.void]


def layout(bundle: Bundle) -> np.dtype[np.void]:
    """The type of a record; all zeros stand for an image that nothing is known of.

    Returns
    -------
    numpy.dtype
        ``known``, ``oddity`` if the bundle has reference embeddings, and ``0``, ``1`` and so on for the targets:
        float32 probabilities of all classes, or the place of a class from heads that know none, or a quantity.
    """
    fields: list[Any] = [("known", bool)]
    if bundle.reference is not None:
        fields.append(("oddity", np.float64))
    for number, target in enumerate(bundle.facts["targets"]):
        classes = target["classes"]
        if classes is None:
            fields.append((f"{number}", np.float64))
        elif hasattr(bundle.heads[target["name"]], "predict_proba"):
            fields.append((f"{number}", np.float32, (len(classes),)))
        else:
            fields.append((f"{number}", np.int64))
    return np.dtype(fields)


def said(bundle: Bundle, X: NDArray[np.float32]) -> Records:
    """Ask the heads.

    Parameters
    ----------
    bundle : Bundle
    X : numpy.ndarray
        float32, shape (images, dim); at least one image, since estimators refuse a matrix without rows.

    Returns
    -------
    numpy.ndarray
        Shape (images,), of the type that `layout` tells.

    Raises
    ------
    BundleError
        If a head cannot say anything.
    """
    found = np.zeros(len(X), layout(bundle))
    found["known"] = True
    with blamed_on_the_bundle():
        if bundle.reference is not None:
            found["oddity"] = drift.oddity(X, bundle.reference)
        for number, target in enumerate(bundle.facts["targets"]):
            head, field = bundle.heads[target["name"]], found[f"{number}"]
            if field.ndim == 2:
                field[:] = head.predict_proba(X)
            else:
                told = head.predict(X)
                field[:] = told if target["classes"] is None else np.searchsorted(head.classes_, told)
    return found


def columns(bundle: Bundle, found: Records) -> dict[str, pa.Array]:
    """Records as columns, null where nothing is known.

    Returns
    -------
    dict of str to pyarrow.Array
        ``prediction``; for heads that know probabilities ``p_<class>``, float32, the largest of which is that of the
        prediction, and ``set``, the classes of the conformal set; for quantities the range from ``low`` to ``high``. Of
        several targets ``prediction_<target>``, ``p_<target>_<class>`` and so on. ``oddity`` is the share of training
        embeddings that lie less far from the others.
    """
    made: dict[str, pa.Array] = {}
    unknown, targets = ~found["known"], bundle.facts["targets"]
    for number, target in enumerate(targets):
        suffix = f"_{target['name']}" if len(targets) > 1 else ""
        made |= _of_target(bundle.heads[target["name"]], target, found[f"{number}"], unknown, suffix)
    if bundle.reference is not None:
        made["oddity"] = pa.array(found["oddity"], mask=unknown)
    return made


def _of_target(
    head: Any, target: dict[str, Any], values: NDArray[Any], unknown: NDArray[np.bool_], suffix: str
) -> dict[str, pa.Array]:
    misfit = (target.get("conformal") or {}).get("threshold")
    if target["classes"] is None:
        made = {f"prediction{suffix}": pa.array(values, mask=unknown)}
        if misfit is not None:
            ends = conformal.ranges(values, misfit, target["log"])
            for name, end in zip(("low", "high"), ends, strict=True):
                made[f"{name}{suffix}"] = pa.array(end, mask=unknown)
        return made
    places = values.argmax(axis=1) if values.ndim == 2 else values
    made = {f"prediction{suffix}": pa.array(head.classes_).take(pa.array(places, mask=unknown))}
    if values.ndim == 2:
        # Column by column, out of rows that lie far apart, would take ten times as long.
        by_class = np.ascontiguousarray(values.T)
        for name, shares in zip(target["classes"], by_class, strict=True):
            made[f"p{suffix}_{name}"] = pa.array(shares, mask=unknown)
        if misfit is not None:
            made[f"set{suffix}"] = _sets(conformal.sets(values.astype(float), misfit), target["classes"], unknown)
    return made


def _sets(chosen: NDArray[np.bool_], classes: list[Any], unknown: NDArray[np.bool_]) -> pa.ListArray:
    names = pa.array([str(name) for name in classes], pa.string())
    chosen = chosen & ~unknown[:, None]
    ends = np.cumsum(chosen.sum(axis=1), dtype=np.int32)
    members = names.take(pa.array(np.nonzero(chosen)[1]))
    return pa.ListArray.from_arrays(np.append(np.int32(0), ends), members, mask=pa.array(unknown))
