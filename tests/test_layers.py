from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import COLOURS, draw
from features import backbones, images, layers, transforms, weights
from features.catalogue import ParametersOnMeta, catalogue
from features.errors import BackboneError
from features.views import UNTRAINED, Request

GIANT = 60.0
"""Millions of parameters."""


@pytest.mark.parametrize(
    ("shape", "pooling", "expected"),
    [
        ((2, 5), "avg", lambda x: x),
        ((2, 5), "flatten", lambda x: x),
        ((2, 7, 5), "avg", lambda x: x.mean(1)),
        ((2, 7, 5), "cls", lambda x: x[:, 0]),
        ((2, 7, 5), "max", lambda x: x.max(1).values),
        ((2, 7, 5), "flatten", lambda x: x.reshape(2, 35)),
        ((2, 5, 3, 3), "avg", lambda x: x.mean((2, 3))),
        ((2, 5, 3, 3), "max", lambda x: x.amax((2, 3))),
        ((2, 5, 3, 3), "gem", lambda x: (x.clamp(1e-6) ** 3).mean((2, 3)) ** (1 / 3)),
        ((2, 3, 3, 5), "avg", lambda x: x.mean((1, 2))),
        ((2, 3, 3, 3), "avg", lambda x: x.mean((2, 3))),
        ((2, 5, 3, 3), "flatten", lambda x: x.reshape(2, 45)),
        ((2, 5, 3, 3), "cls", None),
        ((2, 5), "max", None),
    ],
)
def test_places_and_tokens_become_one_vector(shape: tuple[int, ...], pooling: str, expected: Any) -> None:
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if expected is None:
        with pytest.raises(BackboneError, match=rf"pooling '{pooling}' does not go with layer 'x'"):
            layers.pool(output, pooling, "x")
    else:
        found = layers.pool(output.bfloat16(), pooling, "x")
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected(output.bfloat16().float()), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "squeezenet1_0"])
def test_several_layers_in_one_pass_are_those_of_passes_of_their_own(name: str) -> None:
    node = {"resnet18": "layer2", "vit_b_32": "encoder.layers.encoder_layer_3", "squeezenet1_0": "features.7"}[name]
    requests = [
        Request.parse(name, UNTRAINED, precision="fp32"),
        Request.parse(name, UNTRAINED, node, "fp32"),
        Request.parse(name, UNTRAINED, node, "fp32", "max"),
    ]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    together = backbones.load(requests)
    outputs = together.forward(pictures)
    for place, request in enumerate(requests):
        alone = backbones.load([request])
        assert alone.specs == [together.specs[place]] and alone.dims == [together.dims[place]]
        assert torch.allclose(outputs[place], alone.forward(pictures)[0], rtol=1e-4, atol=1e-5)
    assert [request.view_name.split("-")[2:] for request in requests][1:] == [[node], [node, "max"]]


@pytest.mark.parametrize("layers_asked", [["layer4", "layer4.1"], ["layer4.1", "layer4.1.relu_1", "layer4"]])
def test_layers_within_layers_do_not_hide_each_other(layers_asked: list[str]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    outputs = backbones.load([fp32("resnet18", layer) for layer in layers_asked]).forward(pictures)
    for layer, output in zip(layers_asked, outputs, strict=True):
        assert torch.equal(output, backbones.load([fp32("resnet18", layer)]).forward(pictures)[0])


def fp32(name: str, layer: str, pooling: str | None = None) -> Request:
    return Request.parse(name, UNTRAINED, layer, "fp32", pooling)


def test_an_embedding_too_large_for_a_page_is_refused() -> None:
    with pytest.raises(BackboneError, match="802,816 values is too large to be stored"):
        backbones.load([fp32("resnet18", "conv1", "flatten")])


def test_pooling_is_for_layers() -> None:
    with pytest.raises(BackboneError, match="--layer NODE"):
        Request.parse("resnet18", pooling="max")
    with pytest.raises(BackboneError, match="use avg, max, gem, cls, flatten"):
        Request.parse("resnet18", layer="layer2", pooling="mean")


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_is_what_the_catalogue_says(name: str) -> None:
    (row,) = [row for row in ROWS if row["backbone"] == name]
    request = Request.parse(name)
    transform = transforms.of(request)
    described = transforms.describe(transform)
    assert len(described["mean"]) == 3 and described["crop_size"] == [transform.crop_size[0]]
    with ParametersOnMeta():
        whole, _ = backbones.with_classifier(name, request.weights), torch.manual_seed(0)
    head, seen = layers.classifying_layer(whole), list[tuple[int, ...]]()
    whole = whole.to("meta").eval()
    whole.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    batch = torch.zeros(2, 3, *(2 * transform.crop_size), device="meta")
    whole(batch)
    whole.set_submodule(head, nn.Identity())
    (vectors,) = layers.tap(whole, [("penultimate", "avg")])(batch)
    # Squeezenets classify a map before they pool it.
    assert tuple(vectors.shape) == (2, row["dim"]) and tuple(seen[0][:2]) == (2, row["dim"])
    if name != "tiny":
        member = weights.member(name, request.weights)
        assert member.meta["num_params"] / 1e6 > row["parameters"] > 0


ROWS = catalogue()


@pytest.mark.slow
@pytest.mark.parametrize("name", [row["backbone"] for row in ROWS[1:] if row["parameters"] < GIANT])
def test_backbones_give_what_their_classifying_layer_reads(name: str, tmp_path: Path) -> None:
    """In the precision that the hardware is made for, against the untouched model on what its own transform gives."""

    file = draw(tmp_path / "one.png", COLOURS["blue"], np.random.default_rng(4))
    request = Request.parse(name, UNTRAINED)
    torch.manual_seed(backbones.SEED)
    model = backbones.with_classifier(name, transforms.member_for(request)).eval()
    layer, seen = model.get_submodule(layers.classifying_layer(model)), list[torch.Tensor]()
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(transforms.of(request)(Image.open(file).convert("RGB"))[None])
    exact = seen[0].numpy().reshape(1, seen[0].shape[1], -1).mean(2)
    found = backbones.load([request]).embed([images.decode(file.read_bytes()).image])
    assert float((found @ exact.T).item() / np.linalg.norm(found) / np.linalg.norm(exact)) >= 0.9995
