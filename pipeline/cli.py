"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from features.errors import PermafrostError

app = typer.Typer(
    help="Frozen backbones, a Parquet feature store, and scikit-learn heads that are judged honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of images, or a CSV or Parquet table.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Directory or URL of a feature store.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that `train` wrote.")]
ImageOption = Annotated[str | None, typer.Option("--image", metavar="COLUMN", help="Image column of a table.")]
IdOption = Annotated[
    str | None, typer.Option("--id", metavar="COLUMN", help="Id column of a table.", show_default="the image column")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FILE|untrained",
        help="A torchvision weights member, a .pth or .safetensors file, or untrained.",
        show_default="IMAGENET1K_V1",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def extract(
    source: SourceArgument,
    store: Annotated[str, typer.Option(metavar="DIR", help="Feature store; made if it is not there.")],
    backbone: Annotated[str, typer.Option(metavar="NAME", help="See `permafrost backbones`.")],
    weights: WeightsOption = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NODE", help="Graph node to tap.", show_default="penultimate")
    ] = None,
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the view.", show_default="backbone-weights-layer")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--source", metavar="NAME", help="Name of the source.", show_default="its path")
    ] = None,
    image: ImageOption = None,
    id_column: IdOption = None,
    columns: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Columns in a folder's paths: '{year}/{site}/{name}'.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32: float32 without TF32.")] = "fp32",
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N samples by id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Embed the images of SOURCE that the store has not, and publish the listing."""
    from features import extract as extraction
    from features.sources import list_source
    from features.store import FeatureStore
    from features.views import Request

    request = Request.parse(backbone, weights, layer, precision)
    listed = list_source(source, name=name, image=image, id_column=id_column, columns=columns, limit=limit)
    feature_store = FeatureStore.open_or_new(store)
    if dry_run:
        record = extraction.preview(listed, feature_store, view or request.view_name)
        _print(record, as_json, "{listed:,} listed, {gone:,} gone, {to_open:,} to open; nothing was written")
        return
    from pipeline import console

    with console.progress("embedding") as progress:
        record = extraction.extract(listed, feature_store, request, view=view, device=device, progress=progress)
    _print(
        record,
        as_json,
        "{listed:,} listed, {opened:,} opened, {embedded:,} embedded, {failed:,} failed\n"
        "snapshot {snapshot} ({outcome}), view {view}",
    )


@app.command()
def train(
    store: StoreArgument,
    target: Annotated[str, typer.Option(metavar="COLUMN", help="Column of the samples to predict.")],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory for the bundle; an older bundle is replaced.")],
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which view to read.", show_default="the only one")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="logreg, linear_svm, rbf_svm, tree, random_forest, hist_gradient_boosting, knn or ridge.",
            show_default="logreg for classes, ridge for quantities",
        ),
    ] = None,
    task: Annotated[
        Literal["classification", "regression"] | None,
        typer.Option(help="What the target is.", show_default="read off the target"),
    ] = None,
    folds: Annotated[int, typer.Option(metavar="N", help="Folds of the cross-validation.")] = 5,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Condition for the rows to train on.")] = None,
    test_where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Condition for the rows of the test, never trained on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Cross-validate a head on stored embeddings, fit it, and save it as a bundle."""
    from features.store import FeatureStore
    from pipeline.train import train

    facts = train(
        FeatureStore.open(store),
        target,
        out,
        view=view,
        head=head,
        task=task,
        folds=folds,
        where=where,
        test_where=test_where,
    )
    if as_json:
        _print(facts | {"bundle": str(out)}, as_json, "")
    else:
        _print_scores(facts, out)


@app.command()
def predict(
    bundle: BundleArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE|STORE", help="New images, or a feature store.")],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="Where the predictions go.")],
    store: Annotated[
        str | None, typer.Option(metavar="DIR", help="Store to take embeddings from and add new ones to.")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="FILE", help="Where the weight file is now.")] = None,
    image: ImageOption = None,
    id_column: IdOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Predict every sample of SOURCE, or of a STORE from what it holds."""
    from features.sources import list_source
    from features.store import FeatureStore
    from pipeline import bundle as bundles
    from pipeline import console, predict

    predict.require_writable(out)
    trained = bundles.load(bundle)
    if FeatureStore.is_store(source):
        table = predict.predict_store(trained, FeatureStore.open(source))
    else:
        listed = list_source(source, image=image, id_column=id_column)
        reused = FeatureStore.open_or_new(store) if store else None
        with console.progress("embedding") as progress:
            table = predict.predict_source(
                trained, listed, store=reused, weights=weights, device=device, progress=progress
            )
    predict.write(table, out)
    failed = table["status"].to_pylist().count("failed")
    counts = {"out": str(out), "samples": len(table), "predicted": len(table) - failed, "failed": failed}
    _print(counts, as_json, "{predicted:,} of {samples:,} samples predicted, {failed:,} failed; see {out}")


@app.command()
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Say what is in a store."""
    from features.info import describe
    from features.store import FeatureStore
    from pipeline import console

    found = describe(FeatureStore.open(store))
    if as_json:
        _print(found, as_json, "")
        return
    print(f"{found['store']}, snapshot {found['snapshot']}; columns: {', '.join(found['columns']) or 'none'}\n")
    console.table(
        ["source", "samples", "failed", "last change"],
        [(name, of["samples"], of["failed"], of["changed"]) for name, of in found["sources"].items()],
    )
    print()
    console.table(
        ["view", "dim", "images", "samples covered", "MB"],
        [
            (name, of["dim"], of["images"], of["samples"], f"{of['bytes'] / 1e6:.1f}")
            for name, of in found["views"].items()
        ],
    )
    if found["failures"]:
        print()
        console.table(["failed because", "samples"], list(found["failures"].items()))


@app.command()
def backbones(as_json: JsonOption = False) -> None:
    """List every backbone, its default weights and what they cost and reach."""
    from features.backbones import catalogue
    from pipeline import console

    rows = catalogue()
    if as_json:
        _print(rows, as_json, "")
        return
    console.table(
        ["backbone", "weights", "dim", "M params", "GFLOPs", "ImageNet top-1 %", "on disk"],
        [
            (
                row["backbone"],
                row["weights"],
                row["dim"],
                f"{row['parameters']:.1f}",
                "-" if row["gflops"] is None else f"{row['gflops']:.2f}",
                "-" if row["accuracy"] is None else f"{row['accuracy']:.1f}",
                "yes" if row["on_disk"] else "no",
            )
            for row in rows
        ],
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where images, store and bundle go.")] = Path(
        "permafrost-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """Do the whole job on scikit-learn's handwritten digits, with the backbone in the package."""
    from pipeline import console
    from pipeline.demo import run

    with console.progress("embedding") as progress:
        facts, predictions = run(out, progress, console.say)
    if as_json:
        _print(facts | {"bundle": str(out / "bundle"), "predictions": str(predictions)}, as_json, "")
    else:
        _print_scores(facts, out / "bundle")


def _print(result: Any, as_json: bool, said: str) -> None:
    print(json.dumps(result) if as_json else said.format(**result))


def _print_scores(facts: dict[str, Any], out: Path) -> None:
    from pipeline import console, report

    title = f"{facts['target']} from {facts['view']['name']}, {facts['rows']['train']} training samples"
    console.table(["", facts["head"], "dummy"], report.score_rows(facts), title)
    for note in report.notes(facts):
        print(f"note: {note}")
    print(f"\nbundle: {out}")


def main() -> None:
    """Run the command line; the README lists the exit codes."""
    # Pillow warns of odd metadata, and of large images; neither says which file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        app()
    except PermafrostError as error:
        print(f"permafrost: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"permafrost: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
