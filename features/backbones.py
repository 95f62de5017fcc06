"""From requests to a frozen model with its own transform and the specs of what it computes.

A backbone is torchvision's builder, a set of weights, and the layers whose outputs are the embeddings.
The classifying layer is taken off before the weights are loaded, so a checkpoint with another number of
classes fits, and what is left cannot return logits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision import models

from features import forward, images, layers, transforms, weights
from features.errors import BackboneError
from features.forward import Forward, Frozen
from features.views import AUTO, PENULTIMATE, UNTRAINED, Request

SEED = 0

# As torchvision builds them for its published weights, but without the classifiers that only training reads.
_PUBLISHED_AS = {
    name: {"transform_input": True, "init_weights": False, "aux_logits": False}
    for name in ("googlenet", "inception_v3")
}


@dataclass(frozen=True)
class Backbone:
    """A frozen model, and what it is fed with.

    Attributes
    ----------
    specs : list of dict
        For each layer all that decides its embeddings' values; see `features.views.View`.
    dims : list of int
        Embedding size of each layer.
    precision : str
    crop : callable
        From an RGB image to what the model reads: uint8, shape (height, width, 3).
    forward : Forward
    """

    specs: list[dict[str, Any]]
    dims: list[int]
    precision: str
    crop: Callable[[Image.Image], NDArray[np.uint8]]
    forward: Forward

    @cached_property
    def pixels(self) -> str:
        """Alike for backbones that read the same pixels of every image."""
        return transforms.pixels_key(self.specs[0])

    @cached_property
    def reduced(self) -> bool:
        """Whether `features.images.REDUCED` is how images are decoded."""
        return bool(self.specs[0]["decode"] == images.REDUCED)

    def embed(self, pictures: list[Image.Image]) -> NDArray[np.float32]:
        """Embed a few images by the first layer: float32, shape (images, dim)."""
        vectors: NDArray[np.float32] = self.forward(np.stack([self.crop(image) for image in pictures]))[0].cpu().numpy()
        return vectors


def load(
    requests: list[Request],
    device: str = AUTO,
    decode: dict[str, Any] | None = None,
    compile: str = AUTO,
    expected: int = 0,
) -> Backbone:
    """Build the model that requests name, load its weights and freeze it.

    Parameters
    ----------
    requests : list of Request
        Of one model and precision; of each the layer and the pooling count.
    device : str
        ``auto`` (a GPU where there is one), or a torch device.
    decode : dict, optional
        The decode policy of a view that is there already.
    compile : str
        ``on``, ``off``, or ``auto``: where `expected` images pay for it.
    expected : int
        How many images there are to embed.

    Raises
    ------
    BackboneError
        For an unknown backbone, weights member, layer or device, and for weights that cannot be had or
        do not fit.
    """
    first, target = requests[0], pick_device(device)
    # Random initialisation must neither depend on the caller's generator nor disturb it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, head = build(first.backbone, transforms.member_for(first))
    if first.weights != UNTRAINED:
        weights.fit(model, weights.read(first), head, origin=first.weights)
    digest, transform = weights.digest(model), transforms.of(first)
    taps = [(request.layer, request.pooling) for request in requests]
    # Nothing ever asks for gradients, yet the parameters go on requiring them: otherwise torch copies a weight for each
    # image before it multiplies (`should_fold` in its matmul), which makes transformers three times as slow.
    tapped = layers.tap(model, taps).eval().to(target)
    side = transform.crop_size[0]
    dims, frozen = layers.sizes(tapped, side), Frozen(tapped, transform).to(target)
    precision = forward.best_precision(frozen, target, side) if first.precision == AUTO else first.precision
    frozen.use(forward.DTYPES[precision])
    common = {
        "backbone": first.backbone,
        "weights": digest,
        "transform": transforms.describe(transform),
        "decode": decode or transforms.decode_policy(transform),
        "precision": precision,
    }
    own = [{"layer": layer, "pooling": "the model's own" if layer == PENULTIMATE else how} for layer, how in taps]
    run = Forward(frozen, target, forward.BATCH.get(target.type, 32))
    if compile == "on" or (compile == AUTO and expected >= forward.COMPILE_FROM.get(target.type, expected + 1)):
        run.compile(side)
    return Backbone([common | each for each in own], dims, precision, partial(transforms.crop, transform), run)


def names() -> list[str]:
    """Every backbone: ``tiny`` first, then torchvision's classification models."""
    return ["tiny", *models.list_models(module=models)]


def build(name: str, member: str | None = None) -> tuple[nn.Module, str]:
    """Build a model, randomly initialised, and take its classifying layer off.

    Parameters
    ----------
    name : str
    member : str, optional
        Weights that it is built for; by default the model's default ones.

    Returns
    -------
    model : torch.nn.Module
        Its output is the embedding, shape (images, dim).
    head : str
        Name of the layer taken off.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise BackboneError(f"backbone {name!r} is unknown{hint} (`permafrost backbones` lists them all)")
    model = with_classifier(name, member or Request.parse(name).weights)
    head = layers.classifying_layer(model)
    model.set_submodule(head, nn.Identity())
    return model, head


def with_classifier(name: str, member: str) -> nn.Module:
    """Build a model whole, randomly initialised, for the input size of a member of its weights."""
    if name == "tiny":
        return models.mobilenet_v2()  # type: ignore[no-any-return]
    options: dict[str, Any] = dict(_PUBLISHED_AS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = weights.member(name, member).meta["min_size"][0]
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def pick_device(device: str) -> torch.device:
    """Resolve ``auto`` and check that an explicit device is there."""
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).cpu()
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device {device!r} is not here ({f'{error}'.splitlines()[0]}); use --device cpu") from None
    return target
