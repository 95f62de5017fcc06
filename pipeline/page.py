"""What was found, as pages: those of a bundle, of a comparison, and of a look at a store."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from features.errors import DataError
from features.guards import require_folder
from pipeline import charts, galleries, report, thumbnails
from pipeline.atlas import Atlas
from pipeline.duplicates import MOST_PAIRS
from pipeline.metrics import Predictions
from pipeline.problems import Problems
from pipeline.thumbnails import Thumbnails

MOST_LISTED = 100
"""Rows of a table of problems in `report.json`; the whole tables lie beside it."""
MOST_TARGETS = 12
"""That are drawn."""
MOST_IN_CARD = 30
"""Classes that the model card names."""
GREY = len(charts.COLOURS)

Rows = NDArray[np.int64]


def require_writable(out: Path) -> None:
    """Check, before the work, that a page may be written there.

    Raises
    ------
    DataError
        If it is a directory, or its folder is not there.
    """
    if out.is_dir():
        raise DataError(f"{out} is a directory; name a file with --html")
    require_folder(out.parent, "--html")


def write(out: Path, html: str) -> None:
    """Write a page, whole or not at all."""
    aside = out.with_name(f".{out.name}.tmp")
    try:
        aside.write_text(html, encoding="utf-8")
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def render(template: str, **known: Any) -> str:
    """Fill in a template of this package."""
    loader = jinja2.PackageLoader("pipeline")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    colours = [*charts.COLOURS, charts.GREY, *charts.STEPS]
    return environment.get_template(template).render(colours=colours, sheet_columns=thumbnails.COLUMNS, **known)


def of_training(
    facts: dict[str, Any],
    samples: pd.DataFrame,
    found: dict[str, tuple[Rows, Predictions]],
    problems: Problems,
    atlas: Atlas,
    pictures: Thumbnails | None,
) -> dict[str, bytes]:
    """Write what training found.

    Parameters
    ----------
    facts : dict
        The content of `bundle.json`.
    samples : pandas.DataFrame
    found : dict
        Of each target the places of the held-out samples, and what was said of them.
    problems : Problems
    atlas : Atlas
    pictures : dict of int to PIL.Image.Image, optional
        By place; what is missing is drawn as a gap. Without any the page shows none.

    Returns
    -------
    dict of str to bytes
        ``report.html``, ``report.json`` and ``MODEL_CARD.md``.
    """
    listed, errors = galleries.of_training(samples, found, problems), problems.label_errors
    targets = []
    for number, target in enumerate(facts["targets"]):
        said, drawn = found[target["name"]][1], number < MOST_TARGETS
        mine = errors[errors["target"] == target["name"]] if len(errors) else errors
        classes = report.class_rows(target)
        targets.append(
            {
                "name": target["name"],
                "metric": report.NAMES[target["metric"]],
                "lead": report.lead(target),
                "heads": report.columns(target),
                "rows": report.score_rows(facts, target),
                "findings": report.findings(target),
                "curve": report.curve(target),
                "charts": _charts(target, said) if drawn else [],
                "classes": classes,
                "worst": classes[:MOST_IN_CARD],
                "doubted_by": target["doubted_by"],
                "quantity": target["task"] == "regression",
                "mistakes": galleries.filled(listed[f"mistakes {target['name']}"], samples, pictures) if drawn else [],
                "errors": galleries.filled(listed[f"errors {target['name']}"], samples, pictures) if drawn else [],
                "error_count": int(mine["likely_error"].sum()) if len(mine) else 0,
            }
        )
    counts = problems.counts()
    known = {
        "title": f"{', '.join(facts['target'])} from {facts['view']['request']['backbone']}",
        "facts": facts,
        "verdict": report.verdict(facts),
        "clear": all(map(report.clear, facts["targets"])),
        "notes": report.notes(facts),
        "targets": targets,
        "command": report.command(facts),
        "made": report.made(facts),
        "map": chart_of(atlas, samples, pictures, *_told(found, len(samples))),
        "pairs": galleries.filled(listed["pairs"], samples, pictures),
        "pair_count": f"{counts['near_duplicates']:,}{' or more' if counts['near_duplicates'] >= MOST_PAIRS else ''}",
        "looked_for_pairs": facts["settings"]["near_duplicates"] and not facts["settings"]["streaming"],
        "with_images": pictures is not None,
        "outliers": galleries.filled(listed["outliers"], samples, pictures),
        "outlier_count": counts["outliers"],
    }
    told = facts | {name: known[name] for name in ("verdict", "notes", "command")} | {"listed": _listed(problems)}
    told["findings"] = {target["name"]: target["findings"] for target in targets}
    told["confused"] = {name: confused(said) for name, (_, said) in found.items() if said.classes is not None}
    return {
        "report.html": render("report.html", **known).encode(),
        "report.json": (json.dumps(told, indent=1, allow_nan=False) + "\n").encode(),
        "MODEL_CARD.md": render("card.md", **known).encode(),
    }


def of_comparison(facts: dict[str, Any]) -> str:
    """Draw a leaderboard, as a page."""
    heads, rows, title = report.leaderboard(facts)
    scores = [(f"{row['head']}, {row['view']}", row["scores"][facts["metric"]]) for row in facts["leaderboard"]]
    figure = charts.ladder([*scores, ("dummy", facts["dummy"][facts["metric"]])], report.NAMES[facts["metric"]])
    drawn = [] if figure is None else [_chart("Scores on held-out samples, with 95% intervals.", figure)]
    notes = report.of_comparison(facts)
    return render("compare.html", title=title, heads=heads, rows=rows, charts=drawn, notes=notes, map=None)


def of_store(
    facts: dict[str, Any],
    samples: pd.DataFrame,
    clusters: list[list[galleries.Item]],
    pairs: pd.DataFrame,
    odd: pd.DataFrame,
    atlas: Atlas,
    names: NDArray[Any],
    pictures: Thumbnails | None,
) -> str:
    """Draw what a look at a store found, as a page; `names` tells each sample's cluster."""
    return render(
        "explore.html",
        title=f"What is in {facts['store']}",
        facts=facts,
        clusters=[
            {"name": f"cluster {number}", "rows": rows, "items": galleries.filled(items, samples, pictures)}
            for number, (rows, items) in enumerate(zip(facts["clusters"], clusters, strict=True), 1)
        ],
        pairs=galleries.filled(galleries.pairs_of(pairs), samples, pictures),
        outliers=galleries.filled(galleries.odd_ones(odd), samples, pictures),
        with_images=pictures is not None,
        map=chart_of(atlas, samples, pictures, names.tolist(), names),
    )


def chart_of(
    atlas: Atlas, samples: pd.DataFrame, pictures: Thumbnails | None, told: Sequence[str], values: NDArray[Any] | None
) -> dict[str, Any]:
    """The map: points with their colours, what is told of each, and the sheet of their pictures.

    Parameters
    ----------
    told : sequence of str
        Of every sample.
    values : numpy.ndarray or None
        What colours them, of every sample: labels as strings (None for none), or floats.
    """
    colours, key = _colours(values, atlas.rows)
    points = [
        (round(1000 * float(x)), round(640 * float(1 - y)), colour)
        for (x, y), colour in zip(atlas.places, colours, strict=True)
    ]
    return {
        "points": points,
        "key": key,
        "told": [f"{samples['id'].iloc[row]}{told[row] and ': '}{told[row]}" for row in atlas.rows],
        "sheet": None if pictures is None else thumbnails.sheet([pictures.get(row) for row in atlas.rows.tolist()]),
    }


def confused(found: Predictions) -> list[tuple[str, str, int]]:
    """Truth, prediction and number of rows, for each pair of classes that occurs."""
    assert found.classes is not None
    pairs, counts = np.unique(np.stack([found.y, found.predicted]), axis=1, return_counts=True)
    names = [str(name) for name in found.classes]
    return [(names[y], names[said], int(count)) for (y, said), count in zip(pairs.T, counts, strict=True)]


def _charts(target: dict[str, Any], said: Predictions) -> list[dict[str, Any]]:
    metric = report.NAMES[target["metric"]]
    scores = {name: values.get(target["metric"]) for name, values in target["cross_validation"].items()}
    rows = [(report.CONTROLS.get(name, target["head"]), score) for name, score in scores.items() if score]
    drawn = [("Held-out scores beside the controls, with 95% intervals.", charts.ladder(rows, metric))]
    if said.classes is None:
        drawn.append(("Held-out predictions by the truth.", charts.against_truth(said, target["log"])))
        drawn.append(("Their errors.", charts.residuals(said)))
    else:
        of = "" if len(said.classes) <= charts.MOST_IN_MATRIX else f", the {charts.MOST_IN_MATRIX} with most mistakes"
        drawn.append((f"Held-out samples by truth and prediction{of}.", charts.confusion(said)))
        drawn.append(("ROC curves.", charts.roc(said)))
        drawn.append(("Precision-recall curves.", charts.precision_recall(said)))
        drawn.append(("Classes by recall.", charts.recalls(said)))
        caption = (
            "Reliability: below the line the head is surer than it is right. Larger points stand for more samples."
        )
        drawn.append((caption, charts.reliability(target["reliability"])))
    drawn.append(("Learning curve.", charts.learning_curve(target["learning_curve"], metric)))
    return [_chart(caption, figure) for caption, figure in drawn if figure is not None]


def _chart(caption: str, figure: Any) -> dict[str, Any]:
    return {"caption": caption, "svg": Markup(charts.svg(figure))}


def _told(found: dict[str, tuple[Rows, Predictions]], count: int) -> tuple[list[str], NDArray[Any] | None]:
    """Of every sample what each target's truth and prediction are; and the first target's truth."""
    told, values = [""] * count, None
    for name, (rows, said) in found.items():
        of = said.classes
        y = said.y if of is None else of[said.y].astype(str)
        if values is None:
            values = np.full(count, np.nan) if of is None else np.full(count, None, dtype=object)
            values[rows] = y
        predicted = said.predicted if of is None else of[said.predicted]
        for row, truth, other in zip(rows.tolist(), y, predicted, strict=True):
            mine = (
                galleries.cell(truth)
                if galleries.cell(truth) == galleries.cell(other)
                else f"{galleries.cell(truth)}, predicted {galleries.cell(other)}"
            )
            told[row] += f"{told[row] and '; '}{f'{name} ' if len(found) > 1 else ''}{mine}"
    return told, values


def _colours(values: NDArray[Any] | None, rows: Rows) -> tuple[list[int], list[tuple[str, int]]]:
    """The number of each row's colour, and what the colours mean."""
    if values is None:
        return [0] * len(rows), []
    if values.dtype == object:
        names, counts = np.unique([name for name in values[rows] if name is not None], return_counts=True)
        kept = sorted(names[np.argsort(-counts, kind="stable")][: len(charts.COLOURS)].tolist(), key=_as_people_count)
        place = {name: number for number, name in enumerate(kept)}
        key = [(galleries.cell(name), number) for name, number in place.items()]
        if len(names) > len(kept) or any(name is None for name in values[rows]):
            key.append(("others, or not scored", GREY))
        return [place.get(values[row], GREY) for row in rows], key
    there = values[rows][np.isfinite(values[rows])]
    ends = np.unique(np.quantile(there, (0, 0.25, 0.5, 0.75, 1))) if len(there) else there
    steps = [f"{galleries.cell(low)} to {galleries.cell(high)}" for low, high in itertools.pairwise(ends)]
    number = np.clip(np.searchsorted(ends, values[rows], side="right") - 1, 0, max(len(steps) - 1, 0))
    number = np.where(np.isnan(values[rows]), GREY, number + GREY + 1)
    key = [(name, GREY + 1 + place) for place, name in enumerate(steps)]
    return number.tolist(), [*key, *([("not scored", GREY)] if len(there) < len(rows) else [])]


def _listed(problems: Problems) -> dict[str, Any]:
    errors, far = problems.label_errors, problems.outliers
    tables = {
        "label_errors": errors[errors["likely_error"]] if len(errors) else errors,
        "outliers": far[far["outlier"]],
        "near_duplicates": problems.near_duplicates.drop(columns=["first", "second"]),
    }
    return {name: json.loads(table.head(MOST_LISTED).to_json(orient="records")) for name, table in tables.items()}


def _as_people_count(name: str) -> list[Any]:
    """A key by which "cluster 10" comes after "cluster 9"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
