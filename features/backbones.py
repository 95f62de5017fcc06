"""From a request to a frozen model with its own transform and the spec of what it computes.

A backbone is torchvision's builder, a set of weights, and the layer whose output is the embedding.
The classifying layer is taken off before the weights are loaded, so a checkpoint with another number of
classes fits, and what is left cannot return logits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.transforms._presets import ImageClassification

from features import images, weights
from features.errors import BackboneError
from features.views import PENULTIMATE, UNTRAINED, Request

SEED = 0
TINY_TRANSFORM = ImageClassification(crop_size=128, resize_size=144)

# As torchvision builds them for its published weights, but without the classifiers that only training reads.
_PUBLISHED_AS = {
    name: {"transform_input": True, "init_weights": False, "aux_logits": False}
    for name in ("googlenet", "inception_v3")
}


@dataclass(frozen=True)
class Backbone:
    """A frozen model on its device.

    Attributes
    ----------
    spec : dict
        Everything that decides an embedding's value; see `features.views.View`.
    dim : int
        Embedding size.
    transform : callable
        From an RGB image to the float32 tensor of shape (3, height, width) that the model reads.
    model : torch.nn.Module
        In evaluation mode, on `device`, without a classifying layer.
    device : torch.device
    """

    spec: dict[str, Any]
    dim: int
    transform: Callable[[Image.Image], Tensor]
    model: nn.Module
    device: torch.device

    def embed(self, batch: list[Tensor]) -> NDArray[np.float32]:
        """Embed one batch.

        Parameters
        ----------
        batch : list of torch.Tensor
            As `transform` gives them: float32, shape (3, height, width).

        Returns
        -------
        numpy.ndarray
            float32, shape (images, dim).
        """
        with torch.inference_mode(), _exact_float32():
            embedding = self.model(torch.stack(batch).to(self.device))
        vectors: NDArray[np.float32] = embedding.cpu().numpy()
        return vectors


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 products as such: neither TF32, which cuDNN takes by default, nor what the process has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load(request: Request, device: str = "auto") -> Backbone:
    """Build the model that a request names, load its weights and freeze it.

    Parameters
    ----------
    request : Request
    device : str
        ``auto`` (a GPU where there is one), or a torch device.

    Raises
    ------
    BackboneError
        For an unknown backbone, weights member, layer or device, and for weights that cannot be had or
        do not fit.
    """
    target = pick_device(device)
    # Random initialisation must neither depend on the caller's generator nor disturb it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, head = build(request.backbone, _member_for(request))
    if request.weights != UNTRAINED:
        weights.fit(model, weights.read(request), head, origin=request.weights)
    spec: dict[str, Any] = {
        "backbone": request.backbone,
        "weights": weights.digest(model),
        "layer": request.layer,
        "pooling": "the model's own" if request.layer == PENULTIMATE else "avg",
        "transform": describe(transform := transform_of(request)),
        "decode": images.POLICY,
        "precision": request.precision,
    }
    if request.layer != PENULTIMATE:
        model = tap(model, request.layer)
    model = model.eval().requires_grad_(False).to(target)
    height = width = transform.crop_size[0]
    with torch.inference_mode():
        dim = model(torch.zeros(1, 3, height, width, device=target)).shape[1]
    return Backbone(spec, dim, transform, model, target)


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
    model = _with_classifier(name, member or Request.parse(name).weights)
    head = classifying_layer(model)
    model.set_submodule(head, nn.Identity())
    return model, head


def _with_classifier(name: str, member: str) -> nn.Module:
    if name == "tiny":
        return models.mobilenet_v2(width_mult=0.5)  # type: ignore[no-any-return]
    options: dict[str, Any] = dict(_PUBLISHED_AS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = weights.member(name, member).meta["min_size"][0]
    return models.get_model(name, weights=None, **options)  # type: ignore[no-any-return]


def classifying_layer(model: nn.Module) -> str:
    """Name of the layer that turns an embedding into logits: the last linear or convolutional one."""
    *_, last = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return str(last)


def transform_of(request: Request) -> ImageClassification:
    """The transform that belongs to the weights, or to the default weights of the same model."""
    if request.backbone == "tiny":
        return TINY_TRANSFORM
    member = _member_for(request)
    transform = weights.member(request.backbone, member).transforms()
    if not isinstance(transform, ImageClassification):
        raise BackboneError(f"the transform of {request.backbone} {member} is of an unknown kind: {transform!r}")
    return transform


def _member_for(request: Request) -> str:
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


def tap(model: nn.Module, layer: str) -> nn.Module:
    """Cut a model after one graph node, averaging what is not yet one vector an image."""
    steps = [node.split(".") for node in get_graph_node_names(model)[1]]
    # The name of a module stands for the last node in it.
    nodes = sorted({".".join(parts[:depth]) for parts in steps for depth in range(1, len(parts) + 1)})
    if layer not in nodes:
        near = difflib.get_close_matches(layer, nodes, n=3) or nodes[-3:]
        raise BackboneError(f"layer {layer!r} is no node of this backbone; the nearest are {', '.join(near)}")
    cut = create_feature_extractor(model, return_nodes={layer: "embedding"}, suppress_diff_warning=True)
    return _Pooled(cut, layer)


class _Pooled(nn.Module):
    def __init__(self, cut: nn.Module, layer: str) -> None:
        super().__init__()
        self.cut = cut
        self.layer = layer

    def forward(self, batch: Tensor) -> Tensor:
        embedding = self.cut(batch)["embedding"]
        shape = tuple(embedding.shape[1:]) if isinstance(embedding, Tensor) else ()
        axes = _axes_to_average(shape)
        if axes is None:
            told = shape or "no tensor"
            raise BackboneError(f"layer {self.layer!r} gives neither a vector, tokens nor a map, but {told}")
        pooled: Tensor = embedding.mean(axes) if axes else embedding
        return pooled


def _axes_to_average(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which axes of a batch hold places in the image, by the shape of one image's output; None if that is not clear."""
    match shape:
        case (_,):
            return ()
        case (_, _):  # tokens, each a vector
            return (1,)
        # Inputs are square, so of three axes the two alike are height and width.
        case (channels, height, width) if height == width != channels:
            return (2, 3)
        case (height, width, channels) if height == width != channels:
            return (1, 2)
    return None


def pick_device(device: str) -> torch.device:
    """Resolve ``auto`` and check that an explicit device is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).cpu()
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device {device!r} is not here ({f'{error}'.splitlines()[0]}); use --device cpu") from None
    return target


class _ParametersOnMeta(TorchFunctionMode):
    """Builds models without memory for their parameters.

    `torch.device("meta")` would also catch the arithmetic by which torchvision's regnets find their widths.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def catalogue() -> list[dict[str, Any]]:
    """One row for every backbone, ``tiny`` first.

    Returns
    -------
    list of dict
        ``backbone``; ``weights``, the default; ``dim``, the embedding size; ``parameters`` in millions, without
        the classifying layer; ``gflops`` for one image and ``accuracy``, top-1 on ImageNet in per cent, both as
        torchvision states them; ``on_disk``, whether extraction needs no download.
    """
    return [_row(name) for name in names()]


def _row(name: str) -> dict[str, Any]:
    with _ParametersOnMeta():
        model = _with_classifier(name, Request.parse(name).weights)
    head = model.get_submodule(classifying_layer(model))
    member = Request.parse(name).weights
    row: dict[str, Any] = {
        "backbone": name,
        "weights": member,
        "dim": head.in_features if isinstance(head, nn.Linear) else head.in_channels,
        "parameters": (_count(model) - _count(head)) / 1e6,
        "gflops": None,
        "accuracy": None,
        "on_disk": True,
    }
    if name != "tiny":
        published = weights.member(name, member)
        row["gflops"] = published.meta["_ops"]
        row["accuracy"] = published.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        row["on_disk"] = weights.hub_file(published).is_file()
    return row


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
