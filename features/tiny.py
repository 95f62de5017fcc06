"""Make ``tiny``, the backbone that ships inside the package: ``python -m features.tiny TEACHER.pth PHOTOS/``.

An ImageNet-trained mobilenet_v2 learns to do with 128 pixels what it does with 224: the student starts as a copy of
the teacher and is taught to give, for a crop of a photograph at the smaller size, the embedding that the teacher gives
for the same crop at the larger one. This is knowledge distillation (Hinton, Vinyals and Dean 2015) of features, from
outputs that are kept, so that the teacher sees each crop once. No label is used. In the end convolutions are rounded to
int8.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from features import backbones, images, weights
from features.errors import ImageError, PermafrostError, SourceError
from features.views import file_sha256

BATCH = 64
STUDENT_PX, TEACHER_PX = 128, 224
LEARNING_RATE = 1e-4
LAST_NORM, LIFT = "features.18.1", 1.0
"""Before the last ReLU6 everything is raised by so much, so that no value of an embedding is zero for almost all images
of a set: the scaler of a head would blow up the one image for which it is not."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(
    teacher: Annotated[Path, typer.Argument(help="State dict of an ImageNet-trained mobilenet_v2.")],
    photos: Annotated[Path, typer.Argument(help="Folder of photographs; no label is read.")],
    out: Annotated[Path, typer.Option(help="Where the weights go, .safetensors; the log goes beside them.")],
    seed: Annotated[int, typer.Option(help="Fixes crops and order.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the kept crops.")] = 1,
    crops: Annotated[int, typer.Option(min=1, max=BATCH, help="Crops of each photograph.")] = 2,
    smoke: Annotated[bool, typer.Option(help="One pass over two crops of 128 photographs.")] = False,
) -> None:
    """Distil TEACHER into a network for small images that fits into the package."""
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise SourceError(f"--out {out} must be a .safetensors file in a folder that is there")
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in images.EXTENSIONS)
    if smoke:
        files, crops, epochs = files[:: max(1, len(files) // 128)][:128], 2, 1
    if len(files) * crops < BATCH:
        raise SourceError(f"{photos} has {len(files)} photographs; {BATCH // crops} are the least")
    torch.manual_seed(seed)
    started = time.time()
    model = load_teacher(teacher)
    seen, taught = keep_lessons(files, crops, model)
    print(f"{len(seen)} crops of {len(files)} photographs taught in {time.time() - started:.0f} s", flush=True)
    student, losses = distil(seen, taught, model, epochs)
    state = weights.quantised(student.state_dict())
    out.write_bytes(save({key: tensor.contiguous() for key, tensor in state.items()}))
    log = {
        "photographs": len(files),
        "crops": len(seen),
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.time() - started),
        "teacher": file_sha256(teacher),
        "torch": torch.__version__,
        "loss": [round(loss, 4) for loss in losses],
    }
    out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


def load_teacher(path: Path) -> nn.Module:
    """The teacher without its classifying layer, and with `LIFT`."""
    model, head = backbones.build("mobilenet_v2")
    weights.fit(model, weights.read_file(path), head, origin=str(path))
    norm = model.get_submodule(LAST_NORM)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.bias.data += LIFT
    model = model.eval().to(memory_format=torch.channels_last)
    return model.requires_grad_(False)


def keep_lessons(files: list[Path], crops: int, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Crop the photographs and keep what the teacher makes of each crop.

    Returns
    -------
    seen : torch.Tensor
        uint8, shape (crops, 3, 128, 128): what the student will see.
    taught : torch.Tensor
        bfloat16, shape (crops, 1280): the teacher's embeddings.
    """
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(TEACHER_PX, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3)], p=0.5),
            v2.RandomGrayscale(p=0.1),
        ]
    )
    seen = torch.empty(len(files) * crops, 3, STUDENT_PX, STUDENT_PX, dtype=torch.uint8)
    taught = torch.empty(len(files) * crops, 1280, dtype=torch.bfloat16)
    for start in range(0, len(files), BATCH // crops):
        part = files[start : start + BATCH // crops]
        batch = torch.stack([augment(_pixels(path)) for path in part for _ in range(crops)])
        rows = slice(start * crops, start * crops + len(batch))
        seen[rows] = v2.functional.resize(batch, [STUDENT_PX, STUDENT_PX], antialias=True)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            taught[rows] = teacher(_normalised(batch)).bfloat16()
    return seen, taught


def _pixels(path: Path) -> Tensor:
    try:
        pixels: Tensor = v2.functional.pil_to_tensor(images.decode(path.read_bytes()).image)
    except (ImageError, OSError) as error:
        raise SourceError(f"photograph {path} cannot be used ({error}); take it out") from None
    return pixels


def _normalised(batch: Tensor) -> Tensor:
    scaled: Tensor = v2.functional.normalize(batch.float() / 255, list(MEAN), list(STD))
    return scaled.contiguous(memory_format=torch.channels_last)


def distil(seen: Tensor, taught: Tensor, teacher: nn.Module, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train a copy of the teacher on the kept lessons.

    Batch normalisation keeps the teacher's statistics: in some files they are folded into the convolutions, and those
    of a batch would make another network of it. Weights end halfway between the teacher's and the trained ones, which
    keeps what few photographs would unteach (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").

    Returns
    -------
    student : torch.nn.Module
    losses : list of float
        Mean squared distance of standardised embeddings, for each epoch.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    scale = taught.float().std(0).clamp(min=1e-3)
    steps = epochs * (len(seen) // BATCH)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for epoch in range(epochs):
        total, started = 0.0, time.time()
        order = torch.randperm(len(seen))[: steps // epochs * BATCH].reshape(-1, BATCH)
        for rows in order:
            batch = seen[rows].flip(3) if torch.rand(()) < 0.5 else seen[rows]
            loss = functional.mse_loss(student(_normalised(batch)) / scale, taught[rows].float() / scale)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(order))
        rate = len(order) * BATCH / (time.time() - started)
        print(f"epoch {epoch + 1}/{epochs}: loss {losses[-1]:.4f}, {rate:.0f} crops/s", flush=True)
    with torch.no_grad():
        for own, taught_by in zip(student.parameters(), teacher.parameters(), strict=True):
            own.lerp_(taught_by, 0.5)
    return student, losses


if __name__ == "__main__":
    try:
        typer.run(main)
    except PermafrostError as error:
        sys.exit(f"features.tiny: {error}")
