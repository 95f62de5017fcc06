"""Scores for people: the report that lies in every bundle."""

from __future__ import annotations

from typing import Any

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "r2": "R²",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
}


def score_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """One row per score: what was measured, the head's value, the dummy's.

    Parameters
    ----------
    facts : dict
        The content of `bundle.json`.
    """
    folds, test = facts["scores"]["cross_validation"], facts["scores"]["test"]
    rows = [
        (
            f"{NAMES[name]}, {facts['settings']['folds']} folds",
            _spread(folds["head"][name]),
            _spread(folds["dummy"][name]),
        )
        for name in folds["head"]
    ]
    if test:
        rows += [
            (f"{NAMES[name]}, test", number(test["head"][name]), number(test["dummy"][name])) for name in test["head"]
        ]
    return rows


def notes(facts: dict[str, Any]) -> list[str]:
    """What a reader of the scores must know: what was left out, and what may flatter."""
    left_out = {reason.replace("_", " "): count for reason, count in facts["rows"]["left_out"].items() if count}
    said = [f"{count} chosen samples are {reason} and were left out." for reason, count in left_out.items()]
    if copies := facts["rows"]["test_copies"]:
        said.append(f"{copies} test samples are copies of training samples, byte for byte: the test score flatters.")
    if facts["rows"]["train_copies"]:
        said.append(f"{facts['rows']['train_copies']} training samples are copies of others; copies share a fold.")
    if not facts["snapshot"]["pinned"]:
        said.append("The snapshot could not be pinned in the store, and a clean-up there may remove it.")
    return said


def markdown(facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    view, settings, rows = facts["view"], facts["settings"], facts["rows"]
    lines = [
        f"# {facts['target']} from {view['request']['backbone']}",
        "",
        f"A {facts['head']} head for {facts['task']}, fitted on all {rows['train']} training samples.",
        *([f"Tested on {rows['test']} samples that it was not fitted on."] if rows["test"] else []),
        *([f"Classes: {', '.join(map(str, facts['classes']))}."] if facts["classes"] else []),
        "",
        f"| score | {facts['head']} | dummy |",
        "| --- | ---: | ---: |",
        *(f"| {what} | {head} | {dummy} |" for what, head, dummy in score_rows(facts)),
        "",
        "Over folds: mean ± standard deviation. The dummy knows only the labels, and no image.",
        *([""] if notes(facts) else []),
        *(f"- {note}" for note in notes(facts)),
        "",
        "## How it was made",
        "",
        f"- view `{view['name']}`, fingerprint `{view['fingerprint']}`",
        f"- snapshot {facts['snapshot']['number']} of `{facts['store']}`, digest `{facts['snapshot']['digest']}`",
        f"- train: `{settings['where'] or 'all samples'}`; test: `{settings['test_where'] or 'none'}`",
        f"- {settings['folds']} folds, seed {settings['seed']}",
        f"- {', '.join(f'{library} {version}' for library, version in facts['versions'].items())}",
        f"- {facts['created']}",
    ]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """A score with the digits that matter."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _spread(score: dict[str, Any]) -> str:
    return f"{number(score['mean'])} ± {number(score['std'])}"
