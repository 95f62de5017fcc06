"""Make ``tiny``, the backbone that ships inside the package: ``python -m features.tiny TEACHER.pth PHOTOS/``.

A narrow network learns to give, for a crop of 128 pixels, the embedding that mobilenet_v2 gives for the same crop
of 192: knowledge distillation (Hinton, Vinyals and Dean 2015) with the teacher's outputs kept, so that the teacher
sees each crop once. No label is used. The loss is the squared distance between standardised embeddings, plus the
divergence between what the teacher's own classifying layer reads out of both.
"""

from __future__ import annotations

import json
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
from features.views import TINY_WEIGHTS

BATCH = 128
STUDENT_PX, TEACHER_PX = 128, 192
LEARNING_RATE = 4e-3
READ_OUT_SHARE = 1.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(
    teacher: Annotated[Path, typer.Argument(help="State dict of an ImageNet-trained mobilenet_v2.")],
    photos: Annotated[Path, typer.Argument(help="Folder of photographs; no label is read.")],
    out: Annotated[Path, typer.Option(help="Where the weights go; the log goes beside them.")] = TINY_WEIGHTS,
    seed: Annotated[int, typer.Option(help="Fixes crops, order and initial weights.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the kept crops.")] = 12,
    crops: Annotated[int, typer.Option(help="Crops of each photograph.")] = 8,
    smoke: Annotated[bool, typer.Option(help="One pass over two crops of 128 photographs.")] = False,
) -> None:
    """Distil TEACHER into a narrow network that fits into the package."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in images.EXTENSIONS)
    if smoke:
        files, crops, epochs = files[:: max(1, len(files) // 128)][:128], 2, 1
    torch.manual_seed(seed)
    started = time.time()
    seen, taught, read_out = keep_lessons(files, crops, teacher)
    print(f"{len(seen)} crops of {len(files)} photographs taught in {time.time() - started:.0f} s", flush=True)
    student, losses = distil(seen, taught, read_out, epochs)
    state = {
        key: tensor.half().contiguous()
        for key, tensor in student.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    out.write_bytes(save(state))
    log = {
        "photographs": len(files),
        "crops": len(seen),
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.time() - started),
        "teacher": weights.digest(load_teacher(teacher)[0]),
        "torch": torch.__version__,
        "loss": [round(loss, 4) for loss in losses],
    }
    out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


def load_teacher(path: Path) -> tuple[nn.Module, nn.Module]:
    """The teacher without its classifying layer, and that layer on its own."""
    state = weights.read_file(path)
    model, head = backbones.build("mobilenet_v2")
    weights.fit(model, state, head, origin=str(path))
    read_out = nn.Linear(1280, 1000)
    read_out.load_state_dict({"weight": state[f"{head}.weight"], "bias": state[f"{head}.bias"]})
    return model.eval().requires_grad_(False), read_out.requires_grad_(False)


def keep_lessons(files: list[Path], crops: int, teacher: Path) -> tuple[Tensor, Tensor, nn.Module]:
    """Crop the photographs and keep what the teacher makes of each crop.

    Returns
    -------
    seen : torch.Tensor
        uint8, shape (crops, 3, 128, 128): what the student will see.
    taught : torch.Tensor
        bfloat16, shape (crops, 1280): the teacher's embeddings.
    read_out : torch.nn.Module
        The teacher's classifying layer.
    """
    model, read_out = load_teacher(teacher)
    model = model.to(memory_format=torch.channels_last)
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(TEACHER_PX, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3, 0.05)], p=0.5),
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
            taught[rows] = model(_normalised(batch)).bfloat16()
    return seen, taught, read_out


def _pixels(path: Path) -> Tensor:
    pixels: Tensor = v2.functional.pil_to_tensor(images.decode(path.read_bytes()).image)
    return pixels


def _normalised(batch: Tensor) -> Tensor:
    scaled: Tensor = v2.functional.normalize(batch.float() / 255, list(MEAN), list(STD))
    return scaled.contiguous(memory_format=torch.channels_last)


def distil(seen: Tensor, taught: Tensor, read_out: nn.Module, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train the student on the kept lessons.

    Returns
    -------
    student : torch.nn.Module
    losses : list of float
        Mean loss of each epoch.
    """
    student, _ = backbones.build("tiny")
    student = student.to(memory_format=torch.channels_last).train()
    scale = taught.float().std(0).clamp(min=1e-3)
    steps = epochs * (len(seen) // BATCH)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for epoch in range(epochs):
        total, started = 0.0, time.time()
        order = torch.randperm(len(seen))[: steps // epochs * BATCH].reshape(-1, BATCH)
        for rows in order:
            batch, target = seen[rows], taught[rows].float()
            if torch.rand(()) < 0.5:
                batch = batch.flip(3)
            loss = _distance(student(_normalised(batch)), target, scale, read_out)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(order))
        rate = len(order) * BATCH / (time.time() - started)
        print(f"epoch {epoch + 1}/{epochs}: loss {losses[-1]:.4f}, {rate:.0f} crops/s", flush=True)
    return student.eval(), losses


def _distance(embedding: Tensor, target: Tensor, scale: Tensor, read_out: nn.Module) -> Tensor:
    apart = functional.mse_loss(embedding / scale, target / scale)
    said, meant = (functional.log_softmax(read_out(x), dim=1) for x in (embedding, target))
    divergence: Tensor = functional.kl_div(said, meant, log_target=True, reduction="batchmean")
    total: Tensor = apart + READ_OUT_SHARE * divergence
    return total


if __name__ == "__main__":
    typer.run(main)
