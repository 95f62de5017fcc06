"""The command line: parse, call one function, print."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from features.errors import PermafrostError, SourceError, redacted
from pipeline import cli_heads, cli_query, cli_store
from pipeline.cli_heads import print_scores
from pipeline.cli_store import JsonOption
from pipeline.console import say_result

app = typer.Typer(
    help="Frozen backbones, a Parquet feature store, and scikit-learn heads that are judged honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_heads.commands)
app.add_typer(cli_store.commands)
app.add_typer(cli_query.commands)

CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")
"""Libraries whose errors tell of the network, and are no OSError."""

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images, a .tar shard, or a CSV, Parquet or JSON-lines table; a path or a URL.",
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that `train` wrote.")]
ImageOption = Annotated[list[str] | None, typer.Option("--image", metavar="COLUMN", help="Image column of a table.")]
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


@app.command()
def extract(
    source: SourceArgument,
    store: Annotated[str, typer.Option(metavar="DIR", help="Feature store; made if it is not there.")],
    backbone: Annotated[
        list[str], typer.Option(metavar="NAME", help="See `permafrost backbones`; again for more of them.")
    ],
    weights: WeightsOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE", help="Graph node to tap; again for more of them.", show_default="penultimate"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Of a layer's places or tokens: avg, max, gem, cls, flatten.", show_default="avg"),
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
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, or what the view has and the hardware is made for.")
    ] = "auto",
    compiled: Annotated[
        str, typer.Option("--compile", help="on, off, or where there are enough images to pay for it.")
    ] = "auto",
    device: DeviceOption = "auto",
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only shard I of N, counted from 0.")] = "0/1",
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file, whatever its size and mtime say.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Read again whatever failed.")] = False,
    allow_shrink: Annotated[
        bool, typer.Option("--allow-shrink", help="Accept a listing that lost more than half of its samples.")
    ] = False,
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|P%", help="Exit 3, having published, if more samples failed.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Stop after so long, keep what is done, and exit 7.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read; load and write nothing.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N samples by id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Embed the images of SOURCE that the store has not, and publish the listing."""
    from features import extract as extraction
    from features.shards import Shard
    from features.sources import list_source
    from features.store import FeatureStore
    from features.views import asked
    from pipeline import console

    deadline = time.monotonic() + max_seconds if max_seconds is not None else None
    requests = asked(backbone, weights, layer, precision, pooling)
    listed = list_source(
        source,
        name=name,
        image=_only(image),
        id_column=id_column,
        columns=columns,
        shard=Shard.parse(shard),
        limit=limit,
    )
    feature_store = FeatureStore.open_or_new(store)
    if dry_run:
        record = extraction.preview(listed, feature_store, requests, view)
        say_result(record, as_json, "{listed:,} listed, {gone:,} gone, {to_open:,} to open; nothing was written")
        return
    with console.stoppable(deadline) as stopped, console.progress("embedding") as progress:
        record = extraction.extract(
            listed,
            feature_store,
            requests,
            view=view,
            device=device,
            compile=compiled,
            rehash=rehash,
            retry_failed=retry_failed,
            allow_shrink=allow_shrink,
            max_failures=max_failures,
            stopped=stopped,
            progress=progress,
        )
    say_result(
        record,
        as_json,
        "{listed:,} listed, {opened:,} opened, {embedded:,} embedded, {failed:,} failed in {total_seconds:,.1f} s\n"
        f"snapshot {{snapshot}} ({{outcome}}), view {', '.join(record['views'])}"
        + ("\n{advice}" if record["advice"] else ""),
    )


@app.command()
def predict(
    bundle: BundleArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE|STORE", help="New images, or a feature store.")],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="Where the predictions go.")],
    store: Annotated[
        str | None, typer.Option(metavar="DIR", help="Store to take embeddings from and add new ones to.")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="FILE", help="Where the weight file is now.")] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=1, metavar="AUC", help="Exit 8, having predicted, if images can be told apart better."
        ),
    ] = None,
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

    predict.require_writable(out, source)
    trained = bundles.load(bundle)
    if FeatureStore.is_store(source):
        counts = predict.predict_store(trained, FeatureStore.open(source), out, watch=console.progress)
    else:
        listed = list_source(source, image=_only(image), id_column=id_column)
        reused = FeatureStore.open_or_new(store) if store else None
        counts = predict.predict_source(
            trained, listed, out, store=reused, weights=weights, device=device, watch=console.progress
        )
    told = "{predicted:,} of {samples:,} samples predicted, {failed:,} failed; see {out}"
    found = counts["drift"]
    say_result({"out": str(out)} | counts, as_json, told + ("\n" + predict.in_words(found) if found else ""))
    if max_drift is not None:
        predict.require_alike(found, max_drift)


@app.command()
def backbones(as_json: JsonOption = False) -> None:
    """List every backbone, its default weights and what they cost and reach."""
    from features.catalogue import catalogue
    from pipeline import console

    rows = catalogue()
    if as_json:
        say_result({"backbones": rows}, as_json, "")
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
        say_result(facts | {"bundle": str(out / "bundle"), "predictions": str(predictions)}, as_json, "")
    else:
        print_scores(facts, out / "bundle")


def _only(image: list[str] | None) -> str | None:
    if image and len(image) > 1:
        raise SourceError(
            f"a listing has one image column, and --image names {len(image)}; use a store for each, "
            "or pipeline.transformer.BackboneTransformer for several photos in a row"
        )
    return image[0] if image else None


def main() -> None:
    """Run the command line; the README lists the exit codes."""
    # A thread that waits by spinning burns whole time slices once others want its core. Read where torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Pillow warns of odd metadata, and of large images; neither says which file.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.showwarning = lambda message, *_: print(f"permafrost: {message}", file=sys.stderr)
    told = ""
    try:
        code = app(standalone_mode=False) or 0
    except KeyboardInterrupt:
        code, told = 130, "interrupted; finished parts are kept, run again to go on"
    except PermafrostError as error:
        code, told = error.exit_code, str(error)
    except OSError as error:
        code, told = 1, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; {_remedy(error)}"
    except Exception as error:
        if hasattr(error, "format_message"):  # The parser's own errors, by whatever library typer brings it.
            command = getattr(getattr(error, "ctx", None), "command_path", "permafrost")
            code, told = 2, f"{error.format_message()} See `{command} --help`."
        elif type(error).__module__.partition(".")[0] in CLIENTS:
            code, told = 1, f"the object store does not answer ({error}); check its endpoint and the credentials"
        else:
            raise
    if code == 130 and not told:
        told = "interrupted; what was finished before is as it was"
    if told:
        console_line = " ".join(redacted(told).split())
        print(f"permafrost: {console_line}", file=sys.stderr)
    sys.stdout.flush()
    reading = sys.modules.get("features.reading")
    hangs = reading and any(thread.name == reading.THREAD for thread in threading.enumerate())
    if hangs or "torch" not in sys.modules:
        # An interpreter that ends beside a thread in foreign code, or beside one that Arrow is just starting (one
        # process in some hundreds), aborts. Only torch has helpers that must be told of the end.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _remedy(error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "free space there and run again, finished parts are kept",
        errno.EDQUOT: "free some of the quota and run again, finished parts are kept",
        errno.EACCES: "check who may write there",
        errno.EROFS: "put it where it can be written",
    }
    return remedies.get(error.errno or 0, "run again, finished parts are kept")


if __name__ == "__main__":
    main()
