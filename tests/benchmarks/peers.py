"""JPEG to Parquet by other packages, each as its own documentation has it, and by ours: images/s.

Run as ``python tests/benchmarks/peers.py PHOTOS --python timm=VENV/bin/python --python embetter=...``, a virtual
environment for each of ``timm img2vec_pytorch embetter thingsvision``, since they agree on nothing; one without is
looked for where this runs, and left out if it is not there or does not run. In each ``pip install pandas pyarrow`` too.

What is compared is the same network, the penultimate features of a resnet50 with random weights, so that none has to
be downloaded; timm's and embetter's is timm's resnet50, which computes the same. Theirs run in eager float32, since
that is what they do unless told otherwise; ours twice, once as it comes (bf16 where the CPU has units for it, compiled)
and once in float32. Each resizes as it likes: timm and torchvision to 224 pixels from the centre, img2vec all of the
image squashed. Batches are of 32, but embetter's of one, which it does not let one choose. thingsvision is given a
hollow TensorFlow, which it imports and has no use for here; it needs ``numpy<2 pandas<3``. Each writes its vectors to a
Parquet file, and is timed in a process of its own after it has loaded its model: theirs on the first of the files,
since a plain loop is as fast at its 300th image as at its 4,000th, ours on all with a warm cache of compiled code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from extraction import ours, told, vary

START = """
import json, sys, time
from functools import partial
import numpy as np, pandas as pd, torch
from PIL import Image
out, files = sys.argv[1], sys.argv[2:]
def rate(vectors_of):
    begun = time.time()
    vectors = np.asarray(vectors_of(), np.float32).reshape(len(files), -1)
    pd.DataFrame({"file": files, "embedding": list(vectors)}).to_parquet(out)
    print(json.dumps({"rate": len(files) / (time.time() - begun), "shape": vectors.shape}))
"""
PEERS = {
    "timm": """
import timm
from timm.data import create_transform, resolve_data_config
model = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
transform = create_transform(**resolve_data_config({}, model=model))
class Photos(torch.utils.data.Dataset):
    def __len__(self): return len(files)
    def __getitem__(self, place): return transform(Image.open(files[place]).convert("RGB"))
def vectors():
    loader = torch.utils.data.DataLoader(Photos(), batch_size=32, num_workers=torch.get_num_threads())
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch in loader])
rate(vectors)
""",
    "img2vec_pytorch": """
from pathlib import Path
from torchvision import models
place = Path(torch.hub.get_dir(), "checkpoints")
place.mkdir(parents=True, exist_ok=True)
torch.save(models.resnet50().state_dict(), place / Path(models.ResNet50_Weights.DEFAULT.url).name)
from img2vec_pytorch import Img2Vec
model = Img2Vec(model="resnet50", layer_output_size=2048)
def vectors():
    batches = [files[at : at + 32] for at in range(0, len(files), 32)]
    return np.concatenate([model.get_vec([Image.open(file).convert("RGB") for file in batch]) for batch in batches])
rate(vectors)
""",
    "embetter": """
import timm
timm.create_model = partial(lambda plain, *a, pretrained=True, **how: plain(*a, **how), timm.create_model)
from embetter.vision import ImageLoader, TimmEncoder
from sklearn.pipeline import make_pipeline
pipeline = make_pipeline(ImageLoader(), TimmEncoder("resnet50"))
rate(lambda: pipeline.fit_transform(files))
""",
    "thingsvision": """
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock
for name in ("tensorflow", *(f"tensorflow.keras{part}" for part in ("", ".applications", ".layers", ".models"))):
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset
model = get_extractor("resnet50", source="torchvision", device="cpu", pretrained=False)
def vectors():
    place = {"root": str(Path(files[0]).parent), "out_path": out + "-names"}
    data = ImageDataset(**place, backend="pt", transforms=model.get_transformations())
    batches = DataLoader(dataset=data, batch_size=32, backend="pt")
    return model.extract_features(batches=batches, module_name="avgpool", flatten_acts=True)
rate(vectors)
""",
}


def main(
    photos: Path,
    images: int = 4000,
    plain: int = 400,
    python: Annotated[list[str] | None, typer.Option(metavar="PACKAGE=INTERPRETER")] = None,
) -> None:
    """Print a Markdown table."""
    pythons = dict(pair.split("=", 1) for pair in python or [])
    print("| package | precision | images/s | ours x |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        rates = dict[tuple[str, str], float]()
        (folder := Path(temporary, "photos")).mkdir()
        (few := Path(temporary, "few")).mkdir()
        vary(photos, folder, images)
        files = vary(photos, few, plain)
        for precision in ("auto", "fp32"):
            for run in ("cold", "warm"):
                store = Path(temporary, f"{precision}-{run}")
                record = ours("resnet50", folder, store, precision, Path(temporary, "cache"))
            spec = json.loads(next(store.glob("embeddings/*/_view.json")).read_text())["spec"]
            rates["permafrost", spec["precision"]] = images / record["seconds"]["elapsed"]
        for name, program in PEERS.items():
            some = {"python": pythons.get(name, sys.executable), "TORCH_HOME": temporary}
            try:
                found = told(START + program, f"{temporary}/{name}.parquet", *files, **some)
            except subprocess.CalledProcessError:
                print(f"{name} does not run here", file=sys.stderr)
                continue
            assert found["shape"] == [plain, 2048], found
            rates[name, "fp32"] = found["rate"]
        for (name, precision), rate in rates.items():
            print(f"| {name} | {precision} | {rate:.1f} | {max(rates.values()) / rate:.1f} |")


if __name__ == "__main__":
    typer.run(main)
