"""Scores in words and rows, as reports show them and the command line prints them."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "r2": "R²",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "mean_average_precision": "mean average precision",
    "mean_roc_auc": "mean ROC AUC",
}
CONTROLS = {"dummy": "dummy", "file": "file alone", "pixels": "raw pixels", "untrained": "untrained backbone"}
MOST_SENTENCES = 3
DEFAULTS = {
    "head": None,
    "task": None,
    "folds": 5,
    "tune": False,
    "balanced": False,
    "calibrate": False,
    "log": False,
    "controls": False,
    "streaming": False,
    "split": None,
    "where": None,
    "test_where": None,
    "groups": None,
    "time": None,
    "labels": None,
    "on": "id",
    "max_unmatched": "10%",
}
"""Settings that are options of `permafrost train`, and what they are where nothing is said."""


def columns(target: dict[str, Any]) -> list[str]:
    """Heads of the columns of `score_rows`."""
    return ["", target["head"], *(CONTROLS[name] for name in target["cross_validation"] if name != "head")]


def score_rows(facts: dict[str, Any], target: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per score of a target: what was measured, the head's value and interval, those of its controls."""
    rows = []
    for where, found in ((f"{facts['settings']['folds']} folds", target["cross_validation"]), ("test", target["test"])):
        for metric in found["head"] if found else []:
            cells = [_cell(found[who].get(metric)) if who in found else "" for who in target["cross_validation"]]
            rows.append((f"{NAMES[metric]}, {where}", *cells))
    return rows


def title(facts: dict[str, Any], target: dict[str, Any]) -> str:
    """What was learnt from what."""
    return f"{target['name']} from {facts['view']['name']}, {target['rows']['train']:,} training samples"


def notes(facts: dict[str, Any]) -> list[str]:
    """What a reader of all the scores must know: what was left out, and what may flatter."""
    rows = facts["rows"]
    left_out = {reason.replace("_", " "): count for reason, count in rows["left_out"].items() if count}
    said = [f"{count:,} chosen samples are {reason} and were left out." for reason, count in left_out.items()]
    if labels := facts["labels"]:
        odd = {name: labels[name] for name in ("unmatched", "repeated", "contradictory") if labels[name]}
        told = ", ".join(f"{count:,} {name}" for name, count in odd.items())
        said += [f"Of {labels['rows']:,} rows of {labels['table']}: {told}."] if odd else []
    if rows["copies"]:
        said.append(f"{rows['copies']:,} samples are copies of others, byte for byte; copies share a fold.")
    if rows["near_duplicates"]:
        kept = "; the column of the groups says which share a fold" if facts["settings"]["groups"] else ""
        kept = kept or ("; these share a fold" if facts["settings"]["near_duplicates"] else "")
        said.append(f"{rows['near_duplicates']:,} samples are near duplicates of others{kept}.")
    if facts["settings"]["streaming"]:
        said.append(
            "The embeddings were read block by block: no near duplicates were sought, and all but the scores and the "
            f"tables of classes is told of {rows['seen']:,} random samples."
        )
    if rows["test_in_the_past"]:
        said.append("Some of the test comes before some of the training set in time: it is no test of the future.")
    if rows["overlap"]:
        some = ", ".join(rows["overlapping"]) + (" …" if rows["overlap"] > len(rows["overlapping"]) else "")
        said.append(
            f"The training set has a copy, a near duplicate or a member of the group of {rows['overlap']:,} of "
            f"{rows['test']:,} test samples ({some}): the test score flatters."
        )
    for metric, score in (facts["together"] or {}).items():
        said.append(f"All {len(facts['targets'])} labels together: {NAMES[metric]} {_cell(score)}.")
    found = facts["problems"]
    if found["label_errors"]:
        said.append(
            f"{found['label_errors']:,} labels are doubted by heads fitted without them; label_errors.parquet lists "
            "them. The weaker the head, the more of these are its own mistakes."
        )
    if found["outliers"]:
        said.append(f"{found['outliers']:,} images lie far from all others; outliers.parquet lists them.")
    if not facts["snapshot"]["pinned"]:
        said.append("The snapshot could not be pinned in the store, and a clean-up there may remove it.")
    return said


def findings(target: dict[str, Any]) -> list[str]:
    """What the scores of one target mean."""
    metric, said = NAMES[target["metric"]], []
    if target["settings"] or len({each["head"] for each in target["chosen"]}) > 1:
        in_folds = Counter(_setting(each) for each in target["chosen"])
        told = ", ".join(f"{setting} ({count})" for setting, count in in_folds.most_common())
        said.append(f"Chosen: {_setting(target)}; within the folds: {told}.")
    judged = {name: gain for name, gain in target["better_than"].items() if "refused" not in gain}
    beaten_by = [name for name, gain in judged.items() if gain["low"] is None or gain["low"] <= 0]
    for name in beaten_by:
        verdict = "Negative transfer: the head" if name in ("pixels", "untrained") else "The head"
        gain = _cell(judged[name], sign=True)
        said.append(f"{verdict} does not clearly beat {_control(name)} ({metric} {gain}{_on(target, judged[name])}).")
    said += [
        f"{metric} is {_cell(judged[name], sign=True)} above {_control(name)}{_on(target, judged[name])}."
        for name in ("pixels", "untrained")
        if name in judged and name not in beaten_by
    ]
    said += [
        f"No score for {_control(name)}: {gain['refused']}."
        for name, gain in target["better_than"].items()
        if "refused" in gain
    ]
    if target["random_split"] and target["random_split"]["instead_of"] is not None:
        random, value = target["random_split"]["value"], target["random_split"]["instead_of"]
        said.append(
            f"A random split, which tears groups and near duplicates apart, would say {metric} {number(random)}, "
            f"{random - value:+.4f}: what is alike would be on both sides."
        )
    if gain := target["doubling"]:
        more = "More labels would help" if (gain["low"] or 0) > 0 else "More labels may not help"
        said.append(f"{more}: the last doubling of the examples brought {metric} {_cell(gain, sign=True)}.")
    if "ece" in target["uncalibrated"]:
        before, after = target["uncalibrated"]["ece"], target["cross_validation"]["head"]["ece"]
        said.append(f"Calibration brought the calibration error from {_cell(before)} to {_cell(after)}.")
    if sets := target["conformal"]:
        what = "ranges are wide" if target["task"] == "regression" else "sets hold"
        unit = "" if target["task"] == "regression" else " classes"
        said.append(
            f"Conformal {what} {number(sets['size'])}{unit} on average to cover {sets['level']:.0%}; "
            f"held out they covered {sets['coverage']:.1%}"
            + (f", in the test {sets['test_coverage']:.1%}." if "test_coverage" in sets else ".")
        )
    return said


def clear(target: dict[str, Any]) -> bool:
    """Whether a head clearly beats every control."""
    judged = [gain for gain in target["better_than"].values() if "refused" not in gain]
    return all((gain["low"] or 0) > 0 for gain in judged)


def verdict(facts: dict[str, Any]) -> str:
    """What came of it, in one sentence; in one for each of a few targets."""
    if len(facts["targets"]) > MOST_SENTENCES:
        count = sum(clear(target) for target in facts["targets"])
        return f"Of {len(facts['targets'])} targets {count} are clearly told better than by every control."
    said = []
    for target in facts["targets"]:
        metric, scores = target["metric"], target["cross_validation"]
        dummy = scores["dummy"][metric]
        gains = {name: gain for name, gain in target["better_than"].items() if "refused" not in gain}
        lost = [_control(name) for name, gain in gains.items() if (gain["low"] or 0) <= 0]
        beaten = f"does not clearly beat {' or '.join(lost)}" if lost else "clearly beats every control"
        tested = f", and {_cell(target['test']['head'][metric])} in the test" if target["test"] else ""
        said.append(
            f"From {facts['view']['name']} {target['head']} reaches {NAMES[metric]} {_cell(scores['head'][metric])} "
            f"for {target['name']} on held-out samples{tested}; it {beaten} (dummy {number(dummy['value'])})."
        )
    return " ".join(said)


def lead(target: dict[str, Any]) -> str:
    """What a head was fitted and tested on."""
    rows = target["rows"]
    tested = f"; tested on {rows['test']:,} that it was not fitted on" if rows["test"] else ""
    return (
        f"A {target['head']} head, fitted on all {rows['train']:,} training samples ({rows['independent']:,} of them "
        f"independent){tested}."
    )


def curve(target: dict[str, Any]) -> list[tuple[str, str]]:
    """Points of the learning curve: how many examples, and what they brought."""
    return [(f"{point['rows']:,}", _cell(point)) for point in target["learning_curve"]]


def class_rows(target: dict[str, Any]) -> list[tuple[str, ...]]:
    """Class, samples, precision, recall and F1, the worst first."""
    measures = ("precision", "recall", "f1")
    worst = sorted(target["per_class"], key=lambda row: row["f1"] or 0)
    return [(f"{row['class']}", f"{row['rows']:,}", *(number(row[key]) for key in measures)) for row in worst]


def made(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the scores depend on."""
    view, snapshot = facts["view"], facts["snapshot"]
    return [
        ("view", f"{view['name']}, fingerprint {view['fingerprint']}"),
        ("snapshot", f"{snapshot['number']} of {facts['store']}, digest {snapshot['digest']}"),
        *(
            (name.replace("_", " "), f"{value}")
            for name, value in facts["settings"].items()
            if name in ("folds", "seed") or (value is not None and value != DEFAULTS.get(name, True))
        ),
        ("versions", ", ".join(f"{library} {version}" for library, version in facts["versions"].items())),
        ("made", facts["created"]),
    ]


def command(facts: dict[str, Any]) -> str:
    """The command that does the same again, from the same snapshot."""
    settings = facts["settings"]
    words = ["permafrost", "train", facts["store"], "--snapshot", str(facts["snapshot"]["number"])]
    words += ["--view", facts["view"]["name"]]
    for name in facts["target"]:
        words += ["--target", name]
    for name, default in DEFAULTS.items():
        if settings[name] != default:
            words += [f"--{name.replace('_', '-')}", *([] if settings[name] is True else [str(settings[name])])]
    if not settings["near_duplicates"]:
        words.append("--split-near-duplicates")
    return shlex.join([*words, "--out", "BUNDLE"])


def leaderboard(facts: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]], str]:
    """Columns, rows and title of what `permafrost compare` found."""
    metric = facts["metric"]
    rows: list[tuple[str, ...]] = [
        (
            str(place),
            row["view"],
            row["head"],
            _cell(row["scores"][metric]),
            "" if place == 1 else _cell(row["behind"]),
            ("clearly" if row["clear"] else "perhaps not") if place > 1 else "",
            f"{row['fit_seconds']:.2f}",
            f"{row['predict_seconds'] * 1e6:,.0f}",
        )
        for place, row in enumerate(facts["leaderboard"], 1)
    ]
    heading = ["", "view", "head", NAMES[metric], "behind the best", "worse", "fit s", "predict µs"]
    independent = facts["rows"]["independent"]
    counted = f"{facts['rows']['train']:,} samples, {independent:,} of them independent"
    return heading, rows, f"{facts['target']}: {counted}, {facts['settings']['folds']} folds"


def of_comparison(facts: dict[str, Any]) -> list[str]:
    """What a reader of a leaderboard must know."""
    metric, board = facts["metric"], facts["leaderboard"]
    alike = sum(not row["clear"] for row in board)
    said = [f"The dummy has {NAMES[metric]} {_cell(facts['dummy'][metric])}."]
    if len(board) > 1:
        said.append(f"{alike} of {len(board)} cannot be told from the best by these samples.")
        said.append(f"Being picked as the best of {len(board)} flatters it by about {facts['flatters']:.4f}.")
    return said


def number(value: float | None) -> str:
    """A score with the digits that matter."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _cell(score: dict[str, Any] | None, sign: bool = False) -> str:
    if score is None:
        return ""
    value, low, high = (score[name] for name in ("value", "low", "high"))
    if value is None:
        return "undefined"
    shown = f"{value:+.4f}" if sign and abs(value) < 10 else number(value)
    return shown if low is None else f"{shown} [{_short(low)}, {_short(high)}]"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def _on(target: dict[str, Any], gain: dict[str, Any]) -> str:
    """On which samples, where a control has not all of them."""
    if gain.get("rows", target["rows"]["train"]) == target["rows"]["train"]:
        return ""
    return f", on {gain['rows']:,} samples, where the head has {_cell(gain['head'])}"


def _setting(chosen: dict[str, Any]) -> str:
    told = " ".join(f"{name}={value}" for name, value in chosen["settings"].items())
    return f"{chosen['head']} {told}".strip()


def _control(name: str) -> str:
    return {
        "dummy": "the dummy",
        "file": "what the files' sides, bytes and formats tell",
        "pixels": "raw pixels",
        "untrained": "the same backbone untrained",
    }[name]
