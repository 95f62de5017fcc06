"""Which layer of a model the embedding is taken from, and how places and tokens become one vector."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from features.errors import BackboneError
from features.views import PENULTIMATE

MAX_DIM = 2**17
"""So that a page of vectors stays far below what Parquet's page sizes can tell."""


def classifying_layer(model: nn.Module) -> str:
    """Name of the layer that turns an embedding into logits: the last linear or convolutional one."""
    *_, last = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return str(last)


def tap(model: nn.Module, taps: list[tuple[str, str]]) -> nn.Module:
    """Make a model give the embeddings of several layers in one forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        Without its classifying layer, so that its output is the penultimate layer's.
    taps : list of (str, str)
        Layer and pooling of each.

    Returns
    -------
    torch.nn.Module
        Its output is a tuple of tensors of shape (images, dim), one for each tap.

    Raises
    ------
    BackboneError
        If a layer is no node of the model's graph; the nearest names are told.
    """
    wanted = [layer for layer, _ in taps]
    if set(wanted) == {PENULTIMATE}:
        return _Tapped(model, taps)
    steps = get_graph_node_names(model)[1]
    nodes = [_last_node(layer, steps) for layer in wanted]
    cut = create_feature_extractor(model, {node: node for node in nodes}, suppress_diff_warning=True)
    return _Tapped(cut, taps, nodes)


def _last_node(layer: str, steps: list[str]) -> str:
    """The node that a name stands for: of a module it is the last one in it.

    Of two names that stand for one node torchvision's feature extractor would serve the first alone.
    """
    if layer == PENULTIMATE:
        return steps[-1]
    for node in reversed(steps):
        if f"{node}.".startswith(f"{layer}."):
            return node
    parts = [node.split(".") for node in steps]
    names = sorted({".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)})
    near = difflib.get_close_matches(layer, names, n=3) or names[-3:]
    raise BackboneError(f"layer {layer!r} is no node of this backbone; the nearest are {', '.join(near)}")


class _Tapped(nn.Module):
    def __init__(self, model: nn.Module, taps: list[tuple[str, str]], nodes: list[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        self.nodes = nodes

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        output = self.model(batch)
        found = [output] * len(self.taps) if self.nodes is None else [output[node] for node in self.nodes]
        return tuple(
            embedding.float() if layer == PENULTIMATE else pool(embedding, pooling, layer)
            for embedding, (layer, pooling) in zip(found, self.taps, strict=True)
        )


def pool(output: Tensor, pooling: str, layer: str) -> Tensor:
    """Reduce what a layer gives to one vector an image.

    Parameters
    ----------
    output : torch.Tensor
        Vectors (images, dim), tokens (images, tokens, dim), or a map, its channels first or last.
    pooling : str
        ``avg`` and ``max`` over places or tokens; ``gem``, their generalised mean with exponent 3 (Radenović, Tolias
        and Chum 2018); ``cls``, the first token; ``flatten``, all of it.
    layer : str
        Its name, for the error.

    Returns
    -------
    torch.Tensor
        float32, shape (images, dim).
    """
    shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
    axes = _places(shape)
    if axes is None:
        told = shape or "no tensor"
        raise BackboneError(f"layer {layer!r} gives neither a vector, tokens nor a map, but {told}")
    output = output.float()
    match pooling:
        case "flatten":
            return output.flatten(1)
        case "avg":
            return output.mean(axes) if axes else output
        case "max" if axes:
            return output.amax(axes)
        case "gem" if axes:
            return output.clamp(min=1e-6).pow(3).mean(axes).pow(1 / 3)
        case "cls" if axes == (1,):
            return output[:, 0]
    raise BackboneError(f"pooling {pooling!r} does not go with layer {layer!r}, which gives {shape} for an image")


def _places(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Which axes of a batch hold places in the image, by the shape of one image's output; None if that is not clear."""
    match shape:
        case (_,):
            return ()
        case (_, _):  # tokens, each a vector
            return (1,)
        # Inputs are square, so of three axes the two alike are height and width. Where all are alike, channels come
        # first: no torchvision model that has them last comes to that.
        case (_, height, width) if height == width:
            return (2, 3)
        case (height, width, channels) if height == width != channels:
            return (1, 2)
    return None


def sizes(model: nn.Module, side: int) -> list[int]:
    """Embedding size of each tap, for square inputs.

    Raises
    ------
    BackboneError
        If one is larger than `MAX_DIM`.
    """
    at = next(iter(model.parameters()))
    with torch.inference_mode():
        dims = [out.shape[1] for out in model(torch.zeros(1, 3, side, side, device=at.device, dtype=at.dtype))]
    if max(dims) > MAX_DIM:
        raise BackboneError(
            f"an embedding of {max(dims):,} values is too large to be stored (at most {MAX_DIM:,}); use --pooling avg"
        )
    return dims
