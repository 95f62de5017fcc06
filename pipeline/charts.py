"""What the scores are of, drawn: SVG that stands in a page, in the page's own colours and type."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from pipeline.metrics import Predictions

BLUE, ORANGE, GREY = "#3b82c4", "#e0793a", "#8a8f98"
COLOURS = (BLUE, ORANGE, "#3a9d6e", "#a06cc4", "#d1495b", "#b59a2b", "#4cb3b8", "#c46ca0", "#7a8a3b", "#8c6d5a")
"""Which can be told apart on white and on near black."""
STEPS = ("#5b4ea1", "#2f8fb0", "#3fb37f", "#d9a92c")
"""Of quantities, from low to high."""
# Matplotlib knows no colour of the page around it, so one that nothing else has stands for it.
PAGE = "#010203"
MOST_IN_MATRIX = 20
MOST_CURVES = len(COLOURS)
MOST_POINTS = 400
"""Of a curve, and of a scatter; more cannot be seen."""
SHADES = LinearSegmentedColormap.from_list("shades", [(0.23, 0.51, 0.77, 0.0), (0.23, 0.51, 0.77, 0.85)])

Axes = Any


def svg(figure: Figure) -> str:
    """A figure as an SVG element whose text stays text."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "permafrost"}), warnings.catch_warnings():
        # The page has a font for every script, whatever matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(
            drawn := io.StringIO(),
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace(PAGE, "currentColor")


def confusion(found: Predictions) -> Figure:
    """How often each class was taken for which; of many classes those with the most mistakes."""
    assert found.classes is not None
    wrong = found.y != found.predicted
    mistakes = np.bincount(np.r_[found.y[wrong], found.predicted[wrong]], minlength=len(found.classes))
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_IN_MATRIX])
    place = np.full(len(found.classes), -1)
    place[shown] = np.arange(len(shown))
    inside = (place[found.y] >= 0) & (place[found.predicted] >= 0)
    counts = np.zeros((len(shown), len(shown)), int)
    np.add.at(counts, (place[found.y[inside]], place[found.predicted[inside]]), 1)
    names = [_short(name) for name in found.classes[shown]]
    side = 2.2 + 0.3 * len(shown)
    figure, axes = _axes(side + 0.6, side)
    members = np.bincount(found.y, minlength=len(found.classes))[shown]
    axes.imshow(counts / np.maximum(members, 1)[:, None], cmap=SHADES, vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=PAGE, size=8)
    turned = {"rotation": 90} if max(map(len, names)) > 3 and len(names) > 2 else {}
    axes.set_xticks(range(len(names)), names, size=8, **turned)
    axes.set_yticks(range(len(names)), names, size=8)
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="truth")
    return figure


def roc(found: Predictions) -> Figure | None:
    """ROC curves: of the second of two classes, or of each of a few against the rest."""
    if not (scored := _against_the_rest(found)):
        return None
    figure, axes = _axes(3.6, 3.4)
    for (name, truth, score), colour in zip(scored, COLOURS, strict=False):
        false, true, _ = roc_curve(truth, score)
        axes.plot(_thin(false), _thin(true), color=colour, lw=1.5, label=_short(name, 14))
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(frameon=False, fontsize=7, labelcolor=PAGE, loc="lower right", ncols=1 + len(scored) // 6)
    return figure


def precision_recall(found: Predictions) -> Figure | None:
    """Precision-recall curves of the same classes."""
    if not (scored := _against_the_rest(found)):
        return None
    figure, axes = _axes(3.6, 3.4)
    for (_, truth, score), colour in zip(scored, COLOURS, strict=False):
        precision, recall, _ = precision_recall_curve(truth, score)
        axes.step(_thin(recall[::-1]), _thin(precision[::-1]), color=colour, lw=1.5, where="post")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    return figure


def _against_the_rest(found: Predictions) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Class, whether each row is of it, and how much it seems to be."""
    assert found.classes is not None
    scored: list[tuple[str, NDArray[Any], NDArray[Any]]] = []
    if found.margins is not None:
        scored = [(str(found.classes[1]), found.y == 1, found.margins)]
    elif found.shares is not None and 2 < len(found.classes) <= MOST_CURVES:
        scored = [(str(name), found.y == place, found.shares[:, place]) for place, name in enumerate(found.classes)]
    return [each for each in scored if 0 < each[1].sum() < len(found)]


def recalls(found: Predictions) -> Figure | None:
    """How many of many classes have which recall."""
    assert found.classes is not None
    if len(found.classes) <= MOST_CURVES:
        return None
    members = np.bincount(found.y, minlength=len(found.classes))
    hits = np.bincount(found.y[found.y == found.predicted], minlength=len(found.classes))
    figure, axes = _axes(4.2, 3)
    axes.hist(hits[members > 0] / members[members > 0], bins=np.linspace(0, 1, 21), color=BLUE)
    axes.set(xlabel="recall", ylabel="classes", xlim=(0, 1))
    return figure


def against_truth(found: Predictions, log: bool) -> Figure:
    """Quantities as predicted, by what they truly are."""
    figure, axes = _axes(3.6, 3.4)
    some = np.random.default_rng(0).permutation(len(found))[: 2 * MOST_POINTS]
    y, predicted = found.y[some], found.predicted[some]
    ends = float(min(y.min(), predicted.min())), float(max(y.max(), predicted.max()))
    axes.plot(ends, ends, color=GREY, lw=1, ls=":")
    axes.scatter(y, predicted, s=9, color=BLUE, alpha=0.6, linewidths=0)
    axes.set(xlabel="truth", ylabel="predicted")
    if log:
        axes.set(xscale="log", yscale="log")
    return figure


def residuals(found: Predictions) -> Figure:
    """How far predictions are off."""
    figure, axes = _axes(3.6, 3.4)
    axes.hist(found.predicted - found.y, bins=30, color=BLUE)
    axes.axvline(0, color=GREY, lw=1, ls=":")
    axes.set(xlabel="error of the prediction", ylabel="samples")
    return figure


def reliability(bins: list[dict[str, Any]]) -> Figure | None:
    """How often the head was right, by how sure it was."""
    if not bins:
        return None
    figure, axes = _axes(3.6, 3.4)
    rows = np.array([each["rows"] for each in bins])
    sure, right = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    axes.plot(sure, right, color=BLUE, lw=1)
    axes.scatter(sure, right, s=12 + 120 * rows / rows.max(), color=BLUE, alpha=0.8, linewidths=0)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.03), ylim=(0, 1.03))
    return figure


def learning_curve(points: list[dict[str, Any]], metric: str) -> Figure | None:
    """A metric by the number of examples that the head was fitted on."""
    points = [point for point in points if point["value"] is not None]
    if len(points) < 2:
        return None
    figure, axes = _axes(3.6, 3.4)
    rows, values = [point["rows"] for point in points], [point["value"] for point in points]
    low, high = ([point["value"] if point[end] is None else point[end] for point in points] for end in ("low", "high"))
    axes.fill_between(rows, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(rows, values, color=BLUE, marker="o", ms=4, lw=1.5)
    axes.set(xlabel="examples", ylabel=metric)
    axes.set_xlim(left=0)
    return figure


def ladder(rows: Sequence[tuple[str, dict[str, Any]]], metric: str) -> Figure | None:
    """Scores with their intervals, one below the other; the first stands out."""
    rows = [(name, score) for name, score in rows if score["value"] is not None]
    if not rows:
        return None
    figure, axes = _axes(5.2, 0.8 + 0.28 * len(rows))
    for place, (_, score) in enumerate(rows):
        colour = BLUE if place == 0 else GREY
        if score["low"] is not None:
            axes.plot([score["low"], score["high"]], [place, place], color=colour, lw=3, alpha=0.5)
        axes.plot(score["value"], place, "o", color=colour, ms=6)
    axes.set_yticks(range(len(rows)), [_short(name, 60) for name, _ in rows], size=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=metric)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PAGE)
    axes.spines[["left", "bottom"]].set_alpha(0.4)
    axes.tick_params(colors=PAGE, labelsize=8, length=3)
    axes.xaxis.label.set(color=PAGE, size=9)
    axes.yaxis.label.set(color=PAGE, size=9)
    axes.grid(color=GREY, alpha=0.2, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _thin(values: NDArray[Any]) -> NDArray[Any]:
    if len(values) <= MOST_POINTS:
        return values
    return np.asarray(values[np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).astype(int))])


def _short(name: object, most: int = 24) -> str:
    text = str(name)
    # Between two dollars matplotlib would read TeX.
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
