"""The command line of heads: train one, compare many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli_store import JsonOption, StoreArgument
from pipeline.console import say_result

commands = typer.Typer()

TaskOption = Annotated[
    Literal["classification", "regression"] | None,
    typer.Option(help="What the target is.", show_default="read off the target"),
]
FoldsOption = Annotated[int, typer.Option(metavar="N", help="Folds of the cross-validation.")]
TuneOption = Annotated[bool, typer.Option("--tune", help="Search the head's settings inside each fold.")]
BalancedOption = Annotated[bool, typer.Option("--balanced", help="Give rare classes the weight of frequent ones.")]
LogOption = Annotated[bool, typer.Option("--log", help="Predict a quantity by its logarithm.")]
WhereOption = Annotated[str | None, typer.Option(metavar="SQL", help="Condition for the rows to train on.")]
TestWhereOption = Annotated[
    str | None, typer.Option(metavar="SQL", help="Condition for the rows of the test, never trained on.")
]
SplitOption = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that says train, val and test.")]
GroupsOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column whose values never stand in two folds.")
]
TimeOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of time; heads are scored on their future alone.")
]
LabelsOption = Annotated[
    str | None, typer.Option(metavar="TABLE", help="CSV, Parquet or JSON-lines table with labels.")
]
OnOption = Annotated[str, typer.Option(metavar="COLUMN", help="Column of that table that names the sample.")]
UnmatchedOption = Annotated[
    str, typer.Option(metavar="N|P%", help="How many of its rows may fit no sample, or contradict another.")
]
NearOption = Annotated[
    bool, typer.Option("--split-near-duplicates", help="Let near duplicates fall into different folds.")
]


@commands.command()
def train(
    store: StoreArgument,
    target: Annotated[
        list[str], typer.Option(metavar="COLUMN", help="Column of the samples to predict; again for more of them.")
    ],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory for the bundle; an older bundle is replaced.")],
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which view to read.", show_default="the only one")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|auto",
            help="logreg, ridge, linear_svm, knn, tree, rbf_svm, random_forest or hist_gradient_boosting; auto is the "
            "simplest within one standard error of the best.",
            show_default="logreg for classes, ridge for quantities",
        ),
    ] = None,
    tune: TuneOption = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Calibrate the probabilities.")] = False,
    balanced: BalancedOption = False,
    log: LogOption = False,
    task: TaskOption = None,
    folds: FoldsOption = 5,
    split: SplitOption = None,
    where: WhereOption = None,
    test_where: TestWhereOption = None,
    groups: GroupsOption = None,
    time: TimeOption = None,
    split_near_duplicates: NearOption = False,
    labels: LabelsOption = None,
    on: OnOption = "id",
    max_unmatched: UnmatchedOption = "10%",
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Read up to 1,000 images again, for the scores of pixels and no training."),
    ] = False,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Whether the report shows images.")] = True,
    with_joblib: Annotated[
        bool, typer.Option("--joblib", help="Write head.joblib too, for scikit-learn without permafrost.")
    ] = False,
    snapshot: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Train on an older listing.", show_default="the newest")
    ] = None,
    device: Annotated[str, typer.Option(help="For --controls: auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Cross-validate a head on stored embeddings, fit it, and save it as a bundle."""
    from features.store import FeatureStore
    from pipeline import console
    from pipeline.dataset import Selection
    from pipeline.train import train

    chosen = Selection(where, test_where, split, groups, time, labels, on, max_unmatched, not split_near_duplicates)
    with console.progress("folds") as progress:
        facts = train(
            FeatureStore.open(store),
            target,
            out,
            view=view,
            head=head,
            task=task,
            selection=chosen,
            folds=folds,
            tune=tune,
            balanced=balanced,
            calibrate=calibrate,
            log=log,
            with_controls=controls,
            with_images=images,
            with_joblib=with_joblib,
            snapshot=snapshot,
            device=device,
            progress=progress,
        )
    if as_json:
        say_result(facts | {"bundle": str(out)}, as_json, "")
    else:
        print_scores(facts, out)


@commands.command()
def compare(
    store: StoreArgument,
    target: Annotated[str, typer.Option(metavar="COLUMN", help="Column of the samples to predict.")],
    views: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Views to compare.", show_default="all")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Heads to compare.", show_default="all")
    ] = None,
    tune: TuneOption = False,
    balanced: BalancedOption = False,
    log: LogOption = False,
    task: TaskOption = None,
    folds: FoldsOption = 5,
    split: SplitOption = None,
    where: WhereOption = None,
    test_where: TestWhereOption = None,
    groups: GroupsOption = None,
    time: TimeOption = None,
    split_near_duplicates: NearOption = False,
    labels: LabelsOption = None,
    on: OnOption = "id",
    max_unmatched: UnmatchedOption = "10%",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the leaderboard as a page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Cross-validate heads on views side by side; rows of the test are not looked at."""
    from features.store import FeatureStore
    from pipeline import console, page
    from pipeline.compare import compare
    from pipeline.dataset import Selection

    chosen = Selection(where, test_where, split, groups, time, labels, on, max_unmatched, not split_near_duplicates)
    if html:
        page.require_writable(html)
    with console.progress("folds") as progress:
        facts = compare(
            FeatureStore.open(store),
            target,
            views=_names(views),
            names=_names(heads),
            task=task,
            selection=chosen,
            folds=folds,
            tune=tune,
            balanced=balanced,
            log=log,
            progress=progress,
        )
    if as_json:
        say_result(facts, as_json, "")
    else:
        _print_leaderboard(facts)
    if html:
        page.write(html, page.of_comparison(facts))


def print_scores(facts: dict[str, Any], out: Path) -> None:
    """Print what `train` found."""
    from pipeline import console, report

    for target in facts["targets"]:
        console.table(report.columns(target), report.score_rows(facts, target), report.title(facts, target))
        for finding in report.findings(target):
            print(f"note: {finding}")
        print()
    for note in report.notes(facts):
        print(f"note: {note}")
    print(f"bundle: {out}; its report: {out / 'report.html'}")


def _print_leaderboard(facts: dict[str, Any]) -> None:
    from pipeline import console, report

    console.table(*report.leaderboard(facts))
    for note in report.of_comparison(facts):
        print(f"note: {note}")


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text is not None else None
