"""JPEG to Parquet, or to the nearest that they offer, by other packages: images/s with a resnet50 as it comes.

Run as ``python tests/benchmarks/peers.py PHOTOS`` where ``timm img2vec_pytorch embetter thingsvision`` are installed;
what is not is left out. Weights are random, so that none needs a download. Each runs in a process of its own, timed
after it has loaded its model; ours is what extraction.py measures.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from extraction import told, vary

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
from pathlib import Path
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


def main(photos: Path, images: int = 256) -> None:
    """Print a Markdown table."""
    print("| package | images/s | hours for a million |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "photos")
        folder.mkdir()
        files = vary(photos, folder, images)
        for name, program in PEERS.items():
            try:
                found = told(START + program, f"{temporary}/{name}.parquet", *files, TORCH_HOME=temporary)
            except subprocess.CalledProcessError:
                print(f"{name} does not run here", file=sys.stderr)
                continue
            print(f"| {name} | {found['rate']:.1f} | {1e6 / found['rate'] / 3600:.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
