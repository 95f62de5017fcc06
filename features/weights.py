"""A model's tensors: read from a file, the package or torchvision's hub, checked by name, and digested."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import OrderedDict
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from features.errors import BackboneError
from features.views import TINY_WEIGHTS, Request

_SCALE = "_scale"
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Classifiers halfway through googlenet and inception_v3, of use in training only."""


def member(name: str, wanted: str) -> models.Weights:
    """Look up one member of a model's weights enum."""
    enum = models.get_model_weights(name)
    if wanted not in enum.__members__:
        known = ", ".join(enum.__members__)
        raise BackboneError(f"{name} has no weights {wanted!r}; use {known}, a .pth or .safetensors file, or untrained")
    return enum[wanted]


def hub_file(weights: models.Weights) -> Path:
    """Where torchvision's hub keeps a file of weights once it has it."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)


def read(request: Request) -> dict[str, Tensor]:
    """Read the tensors that a request names, from a file, the package, or torchvision's hub."""
    if request.is_file:
        return read_file(Path(request.weights))
    if request.backbone == "tiny":
        if request.weights == "V1":
            raise BackboneError(
                "weights V1 of tiny are no longer in the package: what they embedded can be read and trained on, "
                "but for new images embed all of them with V2 (leave --weights away) and train on that view"
            )
        if request.weights != "V2":
            raise BackboneError(f"tiny has no weights {request.weights!r}; use V2, a file, or untrained")
        return read_file(TINY_WEIGHTS)
    weights = member(request.backbone, request.weights)
    if hub_file(weights).is_file():
        return read_file(hub_file(weights))
    try:
        # It says on the standard output, which belongs to the answer, what it downloads.
        with redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            f"weights {request.weights} of {request.backbone} cannot be fetched ({error}); pass --weights FILE, "
            f"put the file at {hub_file(weights)}, or use --backbone tiny"
        ) from None


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or one written by `torch.save`; undo what `quantised` did."""
    if not path.is_file():
        raise BackboneError(f"weight file {path} is not there; say where it is with --weights")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load and safetensors raise a dozen types for files that are not theirs.
    except Exception as error:
        first = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        raise BackboneError(f"weight file {path} is not a state dict: {first}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise BackboneError(f"weight file {path} is not a state dict (it holds {held}); save model.state_dict()")
    return _dequantised(state)


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round the weights of convolutions to int8, on a scale of its own for each output channel.

    Parameters
    ----------
    state : dict of str to torch.Tensor
        float32.

    Returns
    -------
    dict of str to torch.Tensor
        Weights of convolutions as int8 from -127 to 127, and beside each, under its name and ``_scale``, the float32
        of shape (channels, 1, 1, 1) to multiply it with. Everything else as it is.
    """
    rounded = dict(state)
    for key, tensor in state.items():
        if tensor.ndim == 4:
            scale = tensor.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / 127
            rounded |= {key: (tensor / scale).round().to(torch.int8), key + _SCALE: scale}
    return rounded


def _dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rounded = {key for key in state if state[key].dtype == torch.int8 and key + _SCALE in state}
    if not rounded:
        return state
    scales = {key + _SCALE for key in rounded}
    return {
        key: tensor * state[key + _SCALE] if key in rounded else tensor
        for key, tensor in state.items()
        if key not in scales
    }


def fit(model: nn.Module, state: dict[str, Tensor], head: str, origin: str) -> None:
    """Copy tensors into a model. All must fit exactly, save those of the classifying layer that was taken off.

    Parameters
    ----------
    model : torch.nn.Module
    state : dict of str to torch.Tensor
    head : str
        Name of the layer taken off.
    origin : str
        Where the tensors come from, for the error.

    Raises
    ------
    BackboneError
        Naming the tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    # Modules rename keys of older versions of themselves as they load, by the version that is kept beside the keys.
    tensors: OrderedDict[str, Tensor] = OrderedDict((_renamed(key), tensor) for key, tensor in state.items())
    tensors._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
    shapes = [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
    for key in shapes:
        del tensors[key]
    loaded = model.load_state_dict(tensors, strict=False)
    faults = {
        "missing": [key for key in loaded.missing_keys if key not in shapes and not _is_counter(key)],
        "unknown": [key for key in loaded.unexpected_keys if not key.startswith((f"{head}.", *AUXILIARY))],
        "of another shape": shapes,
    }
    if any(faults.values()):
        told = "; ".join(
            f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for what, keys in faults.items()
            if keys
        )
        raise BackboneError(f"weights {origin} do not fit this backbone: {told}")


def _renamed(key: str) -> str:
    """Undo a renaming in torchvision's densenets that came after their weights were published."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) over every tensor that the embedding depends on: its name, type, shape and bytes."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if _is_counter(key):
            continue
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def _is_counter(key: str) -> bool:
    """Whether a tensor only counts training steps; converted checkpoints often lack it."""
    return key.endswith("num_batches_tracked")
