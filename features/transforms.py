"""What the weights ask of an image: resized and cropped here, as bytes; normalised inside the model.

Pillow resizes, as the published accuracies were measured; its decoder and its filters let other threads run.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torchvision.transforms import functional
from torchvision.transforms._presets import ImageClassification

from features import images, weights
from features.errors import BackboneError
from features.views import UNTRAINED, Request

TINY = ImageClassification(crop_size=128, resize_size=144)


def of(request: Request) -> ImageClassification:
    """The transform that belongs to the weights, or to the default weights of the same model."""
    if request.backbone == "tiny":
        return TINY
    member = member_for(request)
    transform = weights.member(request.backbone, member).transforms()
    if not isinstance(transform, ImageClassification):
        raise BackboneError(f"the transform of {request.backbone} {member} is of an unknown kind: {transform!r}")
    return transform


def member_for(request: Request) -> str:
    """The weights whose transform and input size hold: those asked for, or the default for a file and a control."""
    own = request.is_file or request.weights == UNTRAINED
    return Request.parse(request.backbone).weights if own else request.weights


def describe(transform: ImageClassification) -> dict[str, Any]:
    """The complete transform as plain JSON types."""
    return {
        "resize_size": list(transform.resize_size),
        "crop_size": list(transform.crop_size),
        "interpolation": transform.interpolation.value,
        "antialias": transform.antialias,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def crop(transform: ImageClassification, image: Image) -> NDArray[np.uint8]:
    """Resize and crop an image.

    Returns
    -------
    numpy.ndarray
        uint8, shape (height, width, 3).
    """
    resized = functional.resize(
        image, transform.resize_size, interpolation=transform.interpolation, antialias=transform.antialias
    )
    return np.asarray(functional.center_crop(resized, transform.crop_size))


def decode_policy(transform: ImageClassification) -> dict[str, Any]:
    """How images are decoded for a transform; see `features.images.REDUCED`."""
    small = 3 * max(transform.resize_size) <= images.REDUCED_SIDE
    return images.REDUCED if small else images.POLICY


def pixels_key(spec: dict[str, Any]) -> str:
    """Alike for specs that read the same pixels of every image."""
    return json.dumps([spec.get("transform"), spec["decode"]], sort_keys=True)
