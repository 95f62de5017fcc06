"""How a frozen model runs: its precision, its compilation, the shape of its batches, and its device."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torchvision.transforms._presets import ImageClassification

from features.errors import BackboneError

BATCH = {"cpu": 32, "cuda": 128}
COMPILE_FROM = {"cpu": 2_000, "cuda": 20_000}
"""So many images pay for the compilation."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
DRIFT = 2.5e-4
"""How far from 1 the cosine to float32 may be for drawn images, half of what is allowed for any image."""


class Frozen(nn.Module):
    """A model behind its normalisation: uint8 of shape (images, height, width, 3) to tuples of float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, transform: ImageClassification, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(transform.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(3, 1, 1), persistent=False)
        self.model = model
        self.use(dtype)
        self.eval()

    def use(self, dtype: torch.dtype) -> None:
        """Compute in another precision, once.

        What is rounded before the first convolution is rounded alike all over a plain background, and does not average
        out; so that layer and its input stay in float32.
        """
        convolutions = ((name, layer) for name, layer in self.model.named_modules() if isinstance(layer, nn.Conv2d))
        first = next(convolutions, None) if dtype != torch.float32 else None
        kept = copy.deepcopy(first[1]) if first else None
        self.model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = torch.float32 if first else dtype
        if first and kept:
            self.model.set_submodule(first[0], _InFloat32(kept, dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Embed a batch; bytes in this order are channels_last already."""
        batch = images.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(self.std)
        return tuple(self.model(batch.to(self.dtype)))


class _InFloat32(nn.Module):
    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer.to(memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, batch: Tensor) -> Tensor:
        output: Tensor = self.layer(batch).to(self.dtype)
        return output


@dataclass
class Forward:
    """A frozen model on its device.

    Attributes
    ----------
    frozen : torch.nn.Module
    device : torch.device
    batch : int
        Images at once; halved whenever the device has not enough memory.
    compiled : callable or None
        The same as `frozen`, for whole batches only.
    """

    frozen: nn.Module
    device: torch.device
    batch: int
    compiled: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def __call__(self, images: NDArray[np.uint8]) -> list[Tensor]:
        """Embed images; a GPU may still be at it when this returns.

        Parameters
        ----------
        images : numpy.ndarray
            uint8, shape (images, height, width, 3).

        Returns
        -------
        list of torch.Tensor
            float32, shape (images, dim), on the device: one for each layer.
        """
        while True:
            try:
                starts = range(0, len(images), self.batch)
                batches = [self._run(images[start : start + self.batch]) for start in starts]
                return [torch.cat(outputs) for outputs in zip(*batches, strict=True)]
            except torch.OutOfMemoryError:
                self._require_more_than_one()
            # Out of the handler, whose traceback holds on to what was computed.
            self._halve()
            if self.compiled is not None:
                self.compile(images.shape[1])

    def _require_more_than_one(self) -> None:
        if self.batch == 1:
            raise BackboneError(f"{self.device} has not enough memory for one image; use --device cpu") from None

    def _halve(self) -> None:
        self.batch //= 2
        torch.cuda.empty_cache()

    def _run(self, images: NDArray[np.uint8]) -> list[Tensor]:
        count = len(images)
        if self.compiled is not None and count < self.batch:
            # Another shape would be compiled anew.
            images = np.concatenate([images, np.zeros((self.batch - count, *images.shape[1:]), np.uint8)])
        batch = torch.from_numpy(images)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        with torch.inference_mode(), _exact_float32():
            run = self.frozen if self.compiled is None else self.compiled
            return [output[:count] for output in run(batch)]

    def compile(self, side: int) -> None:
        """Compile for whole batches; if that fails, say so and go on without.

        Parameters
        ----------
        side : int
            Of the images in pixels.
        """
        # Beside the weights, since what lies in the folder for temporary files is compiled again after a restart.
        # Importing torchvision has set the variable to that folder.
        if os.environ.get(_CACHE) in (None, default_cache_dir()):
            os.environ[_CACHE] = str(Path(torch.hub.get_dir()).with_name("compiled"))
        # It warns of compilers for GPUs where there is no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.compiled = None
        while True:
            frozen = torch.compile(self.frozen, dynamic=False)
            example = torch.zeros(self.batch, side, side, 3, dtype=torch.uint8, device=self.device)
            try:
                # Given as an option of `torch.compile`, freezing comes too late for a fifth of the speed.
                with torch.inference_mode(), _exact_float32(), inductor.patch(freezing=True):
                    frozen(example)
                self.compiled = frozen
                return
            except torch.OutOfMemoryError:
                self._require_more_than_one()
            # Compilers fail in as many ways as there are machines without one.
            except Exception as error:
                first = f"{error}".strip().splitlines()[:1] or [type(error).__name__]
                warnings.warn(f"the model could not be compiled and runs slower ({first[0]})", stacklevel=2)
                return
            self._halve()


_flags = RLock()
"""Held while float32 is made exact, since those flags are the process's, and a second model may be loading."""


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 products as such: neither TF32, which cuDNN takes by default, nor what the process has allowed."""
    with _flags:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def best_precision(frozen: Frozen, device: torch.device, side: int) -> str:
    """``bf16`` where the hardware has units for it and the model bears it, else ``fp32``.

    Some models lose too much in sixteen bits: mobilenet_v2's first layers, for one. So a few images drawn from a seed
    are embedded in both, and every layer that is asked for has to come out alike.
    """
    if not _has_bf16(device):
        return "fp32"
    images = _drawn(16, side).to(device)
    with torch.inference_mode(), _exact_float32():
        exact = frozen(images)
        # A copy, since weights that were rounded stay so.
        short = copy.deepcopy(frozen)
        short.use(torch.bfloat16)
        rounded = short(images)
    drift = [1 - F.cosine_similarity(a, b).min().item() for a, b in zip(exact, rounded, strict=True)]
    return "bf16" if all(each <= DRIFT for each in drift) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _drawn(count: int, side: int) -> Tensor:
    """Draw images with detail at all scales, as photographs have it: uint8, shape (count, side, side, 3)."""
    generator = torch.Generator().manual_seed(0)
    total: Any = 0
    for cells in (2, 4, 8, 16, 32, 64, 128):
        grid = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        total = total + F.interpolate(grid, (side, side), mode="bilinear") * (4 / cells) ** 0.5
    total = total - total.amin((1, 2, 3), keepdim=True)
    drawn: Tensor = (total / total.amax((1, 2, 3), keepdim=True) * 255).byte().permute(0, 2, 3, 1)
    return drawn
