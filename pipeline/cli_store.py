"""Commands on a store: what is in it, whether it is sound, and how it is kept small and carried away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from features.errors import StoreError
from pipeline.console import say_result

commands = typer.Typer()

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Directory or URL of a feature store.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@commands.command()
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Say what is in a store."""
    from features.info import describe
    from features.store import FeatureStore
    from pipeline import console

    found = describe(FeatureStore.open(store))
    if as_json:
        say_result(found, as_json, "")
        return
    kept = found["snapshots"]
    print(f"{found['store']}, snapshot {found['snapshot']}; columns: {', '.join(found['columns']) or 'none'}")
    print(f"{kept['kept']} snapshots, {kept['bytes'] / 1e6:.1f} MB, {kept['pinned']} of them pinned by a bundle")
    if found["pending"]:
        print(f"{found['pending']} pending files of runs that have not ended; the next run goes on from them")
    print()
    console.table(
        ["source", "samples", "failed", "last change"],
        [(name, of["samples"], of["failed"], of["changed"]) for name, of in found["sources"].items()],
    )
    print()
    console.table(
        ["view", "dim", "images", "samples covered", "lacking", "parts", "MB"],
        [
            (name, of["dim"], of["images"], of["samples"], of["lacking"], of["parts"], f"{of['bytes'] / 1e6:.1f}")
            for name, of in found["views"].items()
        ],
    )
    if found["failures"]:
        print()
        console.table(["failed because", "samples"], list(found["failures"].items()))


@commands.command()
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read everything in a store again, and say what is damaged."""
    from features import upkeep
    from features.store import FeatureStore

    problems = upkeep.verify(FeatureStore.open(store))
    if as_json:
        say_result({"store": store, "problems": problems}, as_json, "")
    if problems:
        raise StoreError(problems[0] if len(problems) == 1 else f"{len(problems)} problems: " + " | ".join(problems))
    if not as_json:
        print("everything is as it was written")


@commands.command()
def compact(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Merge small parts into large ones, and drop doubles."""
    from features import upkeep
    from features.store import FeatureStore
    from pipeline import console

    with console.progress("compacting") as progress:
        counts = upkeep.compact(FeatureStore.open(store), progress)
    say_result(counts, as_json, "{parts_before:,} parts are {parts_after:,} now; {doubles:,} doubles dropped")


@commands.command()
def vacuum(
    store: StoreArgument,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Newest snapshots to keep, whatever their age.")] = 10,
    grace: Annotated[str, typer.Option(metavar="TIME", help="Nothing younger is removed: 7d, 12h, 30m.")] = "7d",
    as_json: JsonOption = False,
) -> None:
    """Remove old snapshots that no bundle was trained on, and embeddings that no snapshot refers to any more."""
    from features import upkeep
    from features.store import FeatureStore

    counts = upkeep.vacuum(FeatureStore.open(store), keep, upkeep.parse_grace(grace))
    say_result(
        counts,
        as_json,
        "removed {snapshots:,} snapshots, {rows:,} embeddings, {parts:,} parts, {pending:,} pending and {tmp:,} "
        "temporary files",
    )


@commands.command()
def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the table goes.")],
    format: Annotated[Literal["parquet", "csv", "arrow"], typer.Option(help="What is written.")] = "parquet",
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which view to read.", show_default="the only one")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="One column per dimension instead of a list.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write samples and embeddings as one flat table."""
    from features import export as exporting
    from features.store import FeatureStore

    feature_store = FeatureStore.open(store)
    rows = exporting.export(feature_store, feature_store.pick_view(view), out, format, wide)
    say_result({"out": str(out), "rows": rows}, as_json, "{rows:,} rows in {out}")


@commands.command()
def explore(
    store: StoreArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the page and its tables.")],
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which view to read.", show_default="the only one")
    ] = None,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Condition for the samples to look at.")] = None,
    clusters: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many clusters.", show_default="by the silhouette")
    ] = None,
    mirrored: Annotated[
        bool, typer.Option("--mirrored", help="Read every image again, and find mirror images too.")
    ] = False,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Whether the page shows images.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Draw what is in a store, without labels: clusters, odd images, doubles and a map."""
    from features.store import FeatureStore
    from pipeline import console
    from pipeline.explore import explore

    with console.progress("reading") as progress:
        facts = explore(
            FeatureStore.open(store),
            out,
            view=view,
            where=where,
            clusters=clusters,
            mirrored=mirrored,
            with_images=images,
            progress=progress,
        )
    told = {"out": str(out), "count": len(facts["clusters"])} | facts
    seen = "{seen:,} of {samples:,} images, drawn at random," if facts["streamed"] else "{samples:,} images"
    said = seen + " in {count} clusters, {outliers:,} unlike all others, {near_duplicates:,} pairs of doubles"
    say_result(told, as_json, said + "; see {out}/report.html")
