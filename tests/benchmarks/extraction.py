"""JPEG to Parquet: images/s beside a plain DataLoader loop, and beside what decoder and model do alone.

Run as ``python tests/benchmarks/extraction.py PHOTOS``; they are varied to as many JPEG files as are asked for. Each
figure comes from a process of its own: ours with an empty cache of compiled code, and once more with a warm one. A
plain loop is as fast at its 300th image as at its 4,000th, so it is given fewer of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

PLAIN = """
import json, sys, time
begun = time.time()
import numpy as np, pandas as pd, torch
from PIL import Image
from torchvision import models
name, files, out = sys.argv[1], sys.argv[3:], sys.argv[2]
transform = models.get_model_weights(name).IMAGENET1K_V1.transforms()
torch.manual_seed(0)
model = models.get_model(name, weights=None).eval()
head = [key for key, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))][-1]
model.set_submodule(head, torch.nn.Identity())
class Photos(torch.utils.data.Dataset):
    def __len__(self): return len(files)
    def __getitem__(self, place): return transform(Image.open(files[place]).convert("RGB"))
loader = torch.utils.data.DataLoader(Photos(), batch_size=32, num_workers=torch.get_num_threads())
vectors, started = [], time.time()
with torch.inference_mode():
    for batch in loader:
        vectors.append(model(batch).numpy())
frame = pd.DataFrame({"file": files, "embedding": list(np.concatenate(vectors))})
frame.to_parquet(out)
print(json.dumps({"start": started - begun, "rate": len(files) / (time.time() - started)}))
"""
FLOOR = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from features import backbones, images, reading
from features.views import Request
name, precision, files = sys.argv[1], sys.argv[2], sys.argv[3:]
backbone = backbones.load([Request.parse(name, "untrained", precision=precision)], compile="on", expected=len(files))
def pixels(file):
    return backbone.crop(images.decode(Path(file).read_bytes(), reduced=backbone.reduced).image)
begun = time.perf_counter()
with ThreadPoolExecutor(reading.THREADS) as pool:
    crops = list(pool.map(pixels, files))
decode = len(files) / (time.perf_counter() - begun)
batches = [np.stack(crops[at : at + backbone.forward.batch]) for at in range(0, len(crops), backbone.forward.batch)]
backbone.forward(batches[0])
begun = time.perf_counter()
for batch in batches:
    [output.cpu() for output in backbone.forward(batch)]
print(json.dumps({"decode": decode, "model": len(files) / (time.perf_counter() - begun)}))
"""
SAME = """
import json, sys
import numpy as np, torch
from pathlib import Path
from PIL import Image
from torchvision import models
from features.store import FeatureStore
name, store = sys.argv[1:3]
loaded = FeatureStore.open(store).load()
frame = loaded.samples.iloc[:: max(1, len(loaded.samples) // 64)]
transform = models.get_model_weights(name).IMAGENET1K_V1.transforms()
torch.manual_seed(0)
model = models.get_model(name, weights=None).eval()
head = [key for key, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))][-1]
model.set_submodule(head, torch.nn.Identity())
cosines = []
for place, uri in zip(frame.index, frame["uri"]):
    with torch.inference_mode():
        exact = model(transform(Image.open(uri).convert("RGB"))[None]).numpy()[0]
    found = loaded.embeddings[place]
    cosines.append(float(found @ exact / np.linalg.norm(found) / np.linalg.norm(exact)))
print(json.dumps({"cosine": min(cosines)}))
"""


def vary(photos: Path, folder: Path, count: int) -> list[str]:
    """Write so many JPEG files of the photographs' sizes, no two alike."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    chance, written = random.Random(0), []
    while len(written) < count:
        try:
            image = Image.open(chance.choice(files)).convert("RGB")
        except OSError:
            continue
        width, height = image.size
        left, top = chance.randrange(width // 10), chance.randrange(height // 10)
        image = image.crop((left, top, left + width - width // 10, top + height - height // 10)).resize((width, height))
        written.append(str(folder / f"{len(written):05d}.jpg"))
        image.save(written[-1], quality=90)
    return written


def told(program: str, *arguments: str, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    command = [python, "-c", program, *arguments]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def ours(name: str, folder: Path, store: Path, precision: str, cache: Path) -> dict[str, Any]:
    arguments = ["extract", str(folder), "--store", str(store), "--backbone", name, "--weights", "untrained"]
    begun = time.time()
    record = told(
        "from pipeline.cli import main; main()",
        *arguments,
        *("--precision", precision, "--json"),
        TORCHINDUCTOR_CACHE_DIR=str(cache),
    )
    return record | {"whole": time.time() - begun}


def main(
    photos: Path,
    images: int = 4000,
    plain: int = 320,
    backbone: Annotated[list[str] | None, typer.Option()] = None,
    precision: str = "auto",
) -> None:
    """Print a Markdown table."""
    print(
        "| backbone | precision | plain loop | ours | of the floor | decode alone | model alone | x plain "
        "| whole run, warm | cold | peak GiB | cosine |\n|---|---|" + "---:|" * 10
    )
    for name in backbone or ["resnet50", "resnet18", "vit_b_16"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "photos")
            folder.mkdir()
            files = vary(photos, folder, images)
            loop = told(PLAIN, name, f"{temporary}/plain.parquet", *files[:plain])
            cold, warm = (
                ours(name, folder, Path(temporary, run), precision, Path(temporary, "cache"))
                for run in ("cold", "warm")
            )
            spec = json.loads(next(Path(temporary, "warm").glob("embeddings/*/_view.json")).read_text())["spec"]
            floor = told(FLOOR, name, spec["precision"], *files[:2000], TORCHINDUCTOR_CACHE_DIR=f"{temporary}/cache")
            cosine = told(SAME, name, f"{temporary}/warm")["cosine"]
        rate, loop_whole = images / warm["seconds"]["elapsed"], loop["start"] + images / loop["rate"]
        least = 1 / (1 / floor["decode"] + 1 / floor["model"])
        print(
            f"| {name} | {spec['precision']} | {loop['rate']:.1f}/s | {rate:.1f}/s | {rate / least:.0%} "
            f"| {floor['decode']:.0f}/s | {floor['model']:.1f}/s | {rate / loop['rate']:.1f} "
            f"| {loop_whole / warm['whole']:.1f} x | {loop_whole / cold['whole']:.1f} x "
            f"| {warm['peak_memory_bytes'] / 2**30:.2f} | {cosine:.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
