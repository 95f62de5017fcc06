"""What backbones are worth on small sets, beside raw pixels and HOG: scores as rows of a Markdown table.

Run as ``python tests/benchmarks/transfer.py DATA WEIGHTS STORES``, with scikit-image installed. DATA holds
``hymenoptera`` and ``caltech20``, folders of classes; ``signs``, a table with ``class`` and ``track``, whose frames
share a fold; and ``bccd``, a table with ``rbc``, a count, for which the score is R². Digits are scikit-learn's. WEIGHTS
holds ``mobilenet_v2-imagenet.pth`` and ``squeezenet1_1-imagenet.pth``; in STORES the embeddings are kept. Heads are the
default ones, near duplicates by any of the views share a fold, and all columns have the same folds. Pixels are those
of a 32 x 32 thumbnail; HOG (Dalal and Triggs 2005) is of 128 x 128 grey ones, in 9 directions, cells of 16 pixels and
blocks of two cells squared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from skimage.feature import hog

from features import reading
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import UNTRAINED, Request, named
from pipeline import dataset, targets
from pipeline.dataset import Selection
from pipeline.demo import write_digits
from pipeline.evaluate import held_out
from pipeline.folds import fold
from pipeline.heads import DEFAULT
from pipeline.tuning import Recipe

FOLDS = 5
SETS = {
    "hymenoptera": ("hymenoptera", "label", None),
    "caltech20": ("caltech20", "label", None),
    "signs": ("signs/labels.csv", "class", "track"),
    "bccd": ("bccd/labels.csv", "rbc", None),
    "digits": ("digits", "label", None),
}


def main(
    data: Annotated[Path, typer.Argument()],
    weights: Annotated[Path, typer.Argument()],
    stores: Annotated[Path, typer.Argument()],
    tiny: Annotated[Path | None, typer.Option(help="Weights in place of those in the package.")] = None,
) -> None:
    """Score every backbone and control on every set."""
    requests = [
        Request.parse("tiny", tiny and str(tiny)),
        Request.parse("tiny", UNTRAINED),
        *(Request.parse(name, str(weights / f"{name}-imagenet.pth")) for name in ("mobilenet_v2", "squeezenet1_1")),
    ]
    print(f"| set | {' | '.join(named(requests))} | pixels | HOG |", flush=True)
    for name, (source, target, groups) in SETS.items():
        folder = data / source
        if name == "digits":
            folder = stores / "sources/digits"
            write_digits(folder)
        store = FeatureStore.open_or_new(str(stores / name))
        extract(list_source(str(folder)), store, requests)
        print(f"| {name} | {' | '.join(_scores(store, requests, target, groups))} |", flush=True)


def _scores(store: FeatureStore, requests: list[Request], target: str, groups: str | None) -> list[str]:
    views = [store.views()[name] for name in named(requests)]
    loaded = dataset.load(store, views, store.snapshot(), [target], Selection(groups=groups))
    task = "regression" if target == "rbc" else "classification"
    (wanted,) = targets.read(loaded.samples, [target], task)
    described = list(loaded.embeddings.values()) + _described(loaded.samples["uri"].tolist())
    found = []
    for X in described:
        examples = loaded.examples(wanted, X, wanted.known)
        recipe = Recipe(wanted.task, DEFAULT[task])
        score = held_out(recipe, examples, fold(examples, FOLDS)).scores()["r2" if task == "regression" else "accuracy"]
        found.append(f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]")
    return found


def _described(files: list[str]) -> list[NDArray[np.float32]]:
    """Pixels and HOG of each image: float32, shape (images, 3,072) and (images, 1,764)."""
    measures = {"pixels": (_pixels, False), "hog": (_hog, False)}
    told = list(reading.read_all(files, lambda sha256: measures))
    return [np.stack([each.pixels[name] for each in told]).astype(np.float32) for name in measures]


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float32).ravel()


def _hog(image: Image.Image) -> NDArray[np.float32]:
    grey = np.asarray(image.convert("L").resize((128, 128), Image.Resampling.BICUBIC))
    found: NDArray[np.float32] = hog(grey, pixels_per_cell=(16, 16), cells_per_block=(2, 2), feature_vector=True)
    return found.astype(np.float32)


if __name__ == "__main__":
    typer.run(main)
