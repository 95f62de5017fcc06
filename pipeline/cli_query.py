"""Commands that ask a store: SQL over its samples and views, and the nearest neighbours of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.errors import DataError
from pipeline.cli_store import JsonOption, StoreArgument
from pipeline.console import say_result

commands = typer.Typer()


@commands.command()
def sql(
    store: StoreArgument,
    query: Annotated[str, typer.Argument(metavar="SQL", help="A select, as DuckDB reads it.")],
    snapshot: Annotated[
        int | None, typer.Option(metavar="N", help="Which state of the listing.", show_default="the newest")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the answer goes: a .parquet, .csv or .arrow file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a store in SQL: the table samples, and each view, joined with the samples, by its name."""
    from features.store import FeatureStore
    from pipeline import console
    from pipeline import sql as queries

    feature_store = FeatureStore.open(store)
    if out:
        written = queries.write(feature_store, query, out, snapshot)
        say_result({"out": str(out), "rows": written}, as_json, "{rows:,} rows in {out}")
    elif as_json:
        say_result(queries.answer(feature_store, query, snapshot), as_json, "")
    else:
        columns, rows, count = queries.show(feature_store, query, snapshot)
        console.table(columns, [tuple(map(console.short, row)) for row in rows])
        if count > len(rows):
            console.say(f"the first {len(rows)} of {count:,} rows; --out FILE or --json gives all")


@commands.command()
def similar(
    store: StoreArgument,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Images; paths or URLs.", show_default=False)
    ] = None,
    key: Annotated[str | None, typer.Option("--id", metavar="ID", help="A sample of the store instead.")] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="The source of --id.")] = None,
    view: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which view to search.", show_default="the only one")
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many images to find.")] = 10,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Condition for the samples to look at.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="FILE", help="Where the weight file is now.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.parquet", help="Where the answer goes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images of a store that are most alike, by the cosine of their embeddings."""
    from features.store import FeatureStore
    from pipeline import console
    from pipeline import similar as neighbours

    if bool(images) == (key is not None):
        raise DataError("name images, or one sample by --id")
    if out:
        neighbours.require_parquet(out)
    feature_store = FeatureStore.open(store)
    picked = feature_store.pick_view(view)
    if images:
        queries = neighbours.of_images(feature_store, picked, images, weights)
    else:
        queries = neighbours.of_sample(feature_store, picked, str(key), source)
    with console.progress("searching") as progress:
        found = neighbours.nearest(feature_store, picked, queries, count=count, where=where, progress=progress)
    if out:
        neighbours.write(found, out)
        say_result({"out": str(out), "rows": len(found)}, as_json, "{rows:,} rows in {out}")
    elif as_json:
        say_result({"view": picked.name, "neighbours": found.to_pylist()}, as_json, "")
    else:
        shown = found if len(queries.names) > 1 else found.drop_columns("query")
        rows = [tuple(row.values()) for row in shown.to_pylist()]
        console.table(shown.column_names, [(*row[:-1], f"{row[-1]:.4f}") for row in rows])
