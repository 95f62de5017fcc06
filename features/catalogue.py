"""Every backbone as a row of facts, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from features import backbones, weights
from features.layers import classifying_layer
from features.views import Request


class ParametersOnMeta(TorchFunctionMode):
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
    return [_row(name) for name in backbones.names()]


def _row(name: str) -> dict[str, Any]:
    member = Request.parse(name).weights
    with ParametersOnMeta():
        model = backbones.with_classifier(name, member)
    head = model.get_submodule(classifying_layer(model))
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
