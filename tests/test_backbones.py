from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from conftest import COLOURS, draw, stored
from features import backbones, forward, images, layers, weights
from features.catalogue import catalogue
from features.errors import BackboneError, ViewMismatch
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore
from features.views import PENULTIMATE, UNTRAINED, Request, View

SHIPPED = {"mobilenet_v2": "mobilenet_v2-imagenet.pth", "squeezenet1_1": "squeezenet1_1-imagenet.pth"}
REFERENCE = ["mobilenet_v2", "squeezenet1_1", "resnet18", "vit_b_16", "convnext_tiny", "efficientnet_b0"]
LARGE = ("vit_b_16", "convnext_tiny")


def weights_for(name: str, testdata: Path | None) -> str:
    return str(testdata / "weights" / SHIPPED[name]) if testdata and name in SHIPPED else UNTRAINED


@pytest.fixture(autouse=True)
def hardware_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing here is tried in two precisions; that is for test_forward."""
    monkeypatch.setattr(forward, "_has_bf16", lambda _: False)


@pytest.fixture
def real_weights(request: pytest.FixtureRequest) -> Path | None:
    try:
        return Path(request.getfixturevalue("testdata"))
    except pytest.skip.Exception:
        return None


def reference(name: str, origin: str, files: list[Path]) -> np.ndarray:
    """PIL, `weights.transforms()`, and what the classifying layer of an untouched model reads, one by one."""
    torch.manual_seed(backbones.SEED)
    model = models.get_model(name, weights=None)
    if origin != UNTRAINED:
        model.load_state_dict(torch.load(origin, weights_only=True))
    transform = models.get_model_weights(name).IMAGENET1K_V1.transforms()
    last = [m for m in model.eval().modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1]
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        for file in files:
            model(transform(Image.open(file).convert("RGB"))[None])
    return torch.cat([tensor.mean((2, 3)) if tensor.ndim == 4 else tensor for tensor in seen]).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in REFERENCE]
)
def test_stored_embeddings_are_those_of_the_eager_model(name: str, tmp_path: Path, real_weights: Path | None) -> None:
    if real_weights:
        files = sorted((real_weights / "hymenoptera/val/ants").glob("*.jpg"))[:6]
    else:
        random = np.random.default_rng(1)
        files = [draw(tmp_path / f"{number}.png", COLOURS["red"], random) for number in range(6)]
    folder = tmp_path / "source"
    folder.mkdir()
    for file in files:
        (folder / file.name).symlink_to(file)
    origin = weights_for(name, real_weights)
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    record = extract(list_source(str(folder)), store, [Request.parse(name, origin, precision="fp32")])
    view = store.view(record["views"][0])
    assert view is not None
    by_sha256 = stored(store, view)
    listed = store.snapshot().samples.to_pandas().set_index("sha256").loc[list(by_sha256)]
    expected, found = (
        reference(name, origin, [folder / key for key in listed["id"]]),
        np.stack(list(by_sha256.values())),
    )
    assert len(found) == len(files)
    assert cosine(found, expected).min() >= 0.999999
    assert (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() <= 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in REFERENCE]
)
def test_batch_size_changes_nothing_and_the_model_stays_as_it_was(name: str, real_weights: Path | None) -> None:
    backbone = backbones.load([Request.parse(name, weights_for(name, real_weights), precision="fp32")])
    before = {key: value.clone() for key, value in backbone.forward.frozen.state_dict().items()}
    random = np.random.default_rng(2)
    pixels = [Image.fromarray(random.integers(0, 256, (60, 50, 3), np.uint8)) for _ in range(4)]
    batch = [pixels[number % 4] for number in range(64)]
    together, alone = backbone.embed(batch), np.concatenate([backbone.embed([image]) for image in batch[:4]])
    assert together.dtype == np.float32 and together.shape == (64, backbone.dims[0])
    assert cosine(together[:4], alone).min() >= 0.999999
    assert (np.linalg.norm(together[:4] - alone, axis=1) / np.linalg.norm(alone, axis=1)).max() <= 1e-4
    after = backbone.forward.frozen.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and len(before) == len(after)
    assert not any(module.training for module in backbone.forward.frozen.modules())


def test_float32_is_float32_whatever_the_process_has_allowed() -> None:
    backbone = backbones.load([Request.parse("vit_b_32", UNTRAINED, precision="fp32")])
    batch = [Image.fromarray(np.random.default_rng(3).integers(0, 256, (224, 224, 3), np.uint8))]
    exact = backbone.embed(batch)
    try:
        torch.set_float32_matmul_precision("medium")
        assert (backbone.embed(batch) == exact).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_untrained_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first = backbones.load([Request.parse("resnet18", UNTRAINED)]).specs[0]
    torch.manual_seed(99)
    assert backbones.load([Request.parse("resnet18", UNTRAINED)]).specs[0] == first
    torch.set_rng_state(before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_known_by_their_tensors_not_by_their_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "full.pth")
    # Fine-tuned on two classes, saved elsewhere, without the counters of training steps.
    slim = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    slim |= {"fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}
    other = tmp_path / f"other{suffix}"
    save_file(slim, other) if suffix == ".safetensors" else torch.save(slim, other)
    specs = [backbones.load([Request.parse("resnet18", str(file))]).specs[0] for file in (tmp_path / "full.pth", other)]
    assert specs[0] == specs[1]
    state["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "full.pth")
    assert backbones.load([Request.parse("resnet18", str(tmp_path / "full.pth"))]).specs[0] != specs[0]


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = models.resnet18().state_dict()
    state["layer9.weight"] = state.pop("layer1.0.conv1.weight")
    state["bn1.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(BackboneError) as caught:
        backbones.load([Request.parse("resnet18", str(tmp_path / "odd.pth"))])
    told = str(caught.value)
    assert "missing layer1.0.conv1.weight" in told and "unknown layer9.weight" in told and "bn1.weight" in told
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pth")
    with pytest.raises(BackboneError, match="holds epoch, state_dict"):
        backbones.load([Request.parse("resnet18", str(tmp_path / "wrapped.pth"))])


def test_a_weight_file_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"conv1.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(BackboneError, match="is not a state dict"):
        backbones.load([Request.parse("resnet18", str(tmp_path / "trap.pth"))])
    assert not (tmp_path / "sprung").exists()


def test_a_hub_out_of_reach_names_three_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(BackboneError) as caught:
        backbones.load([Request.parse("resnet18")])
    told = str(caught.value)
    assert "--weights FILE" in told and "--backbone tiny" in told and "\n" not in told
    assert f"{tmp_path}/hub/checkpoints/resnet18-f37072fd.pth" in told


def test_a_filled_hub_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = weights.hub_file(weights.member("squeezenet1_1", "IMAGENET1K_V1"))
    cached.parent.mkdir(parents=True)
    torch.save(models.squeezenet1_1().state_dict(), cached)
    by_hub = backbones.load([Request.parse("squeezenet1_1")]).specs[0]
    assert by_hub == backbones.load([Request.parse("squeezenet1_1", str(cached))]).specs[0]


@pytest.mark.parametrize(
    ("name", "origin", "layer", "told"),
    [
        ("resnet19", None, None, "did you mean resnet18"),
        ("resnet18", "IMAGENET1K_V7", None, "use IMAGENET1K_V1"),
        ("resnet18", UNTRAINED, "layer5", "the nearest are layer4, layer3"),
        ("resnet18", "nowhere/w.pth", None, "cannot be read"),
    ],
)
def test_what_is_unknown_is_named_with_what_is_known(
    name: str, origin: str | None, layer: str | None, told: str
) -> None:
    with pytest.raises(BackboneError, match=told):
        backbones.load([Request.parse(name, origin, layer)])


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackboneError, match="use --device cpu"):
        backbones.load([Request.parse("tiny", UNTRAINED)], device="cuda:99")


@pytest.mark.parametrize(
    ("name", "layer", "dim"),
    [
        ("resnet18", "layer3", 256),
        ("swin_t", "features.3", 192),
        ("swin_t", "features.0.0", 96),
        ("vit_b_32", "encoder", 768),
    ],
)
def test_any_node_gives_one_vector_an_image(name: str, layer: str, dim: int) -> None:
    backbone = backbones.load([Request.parse(name, UNTRAINED, layer)])
    assert backbone.dims == [dim]
    assert backbone.specs[0]["layer"] == layer != PENULTIMATE


def test_older_names_of_tensors_are_known(tmp_path: Path) -> None:
    state = models.vit_b_32().state_dict()
    layers = [key for key in state if ".mlp." in key]
    renamed = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): state[key] for key in state}
    assert len(layers) == 48 and not set(layers) & set(renamed)
    torch.save(state, tmp_path / "new.pth")
    # Published before the layers were renamed, and saved with the version of then.
    older = OrderedDict(renamed)
    older._metadata = OrderedDict()  # type: ignore[attr-defined]
    torch.save(older, tmp_path / "old.pth")
    specs = [
        backbones.load([Request.parse("vit_b_32", str(tmp_path / name))]).specs[0] for name in ("new.pth", "old.pth")
    ]
    assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("name", "member", "size"), [("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384), ("vit_b_16", None, 224)]
)
def test_a_model_is_built_for_the_input_of_its_weights(name: str, member: str | None, size: int) -> None:
    model, _ = backbones.build(name, member)
    assert model.image_size == size


def test_classifiers_that_only_training_reads_are_no_part_of_a_backbone(tmp_path: Path) -> None:
    state = models.googlenet(init_weights=False).state_dict()
    for name, change in (("one.pth", 0.0), ("two.pth", 1.0)):
        state["aux1.fc2.bias"] += change
        torch.save(state, tmp_path / name)
    torch.save({key: state[key] for key in state if not key.startswith("aux")}, tmp_path / "three.pth")
    specs = [backbones.load([Request.parse("googlenet", str(file))]).specs[0] for file in sorted(tmp_path.iterdir())]
    assert specs[0] == specs[1] == specs[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["densenet121", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "regnet_y_400mf", "swin_v2_t"]
)
def test_other_families_give_what_their_classifying_layer_reads(name: str, tmp_path: Path) -> None:
    file = draw(tmp_path / "one.png", COLOURS["blue"], np.random.default_rng(4))
    torch.manual_seed(6)
    auxiliary = name in ("googlenet", "inception_v3")
    model = models.get_model(name, weights=None, **({"transform_input": True} if auxiliary else {})).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    transform = models.get_model_weights(name).IMAGENET1K_V1.transforms()
    layer = model.get_submodule(layers.classifying_layer(model))
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(transform(Image.open(file))[None])
    backbone = backbones.load([Request.parse(name, str(tmp_path / "w.pth"))])
    found = backbone.embed([images.decode(file.read_bytes()).image])
    # Of values around 1e9, as random weights give them here, the smallest are what large ones leave.
    assert np.linalg.norm(found - seen[0].numpy()) <= 1e-5 * np.linalg.norm(seen[0].numpy())


def test_a_node_that_is_no_vector_tokens_or_map_is_refused() -> None:
    with pytest.raises(BackboneError, match="neither a vector, tokens nor a map"):
        backbones.load([Request.parse("shufflenet_v2_x0_5", UNTRAINED, "stage2.0.view")])


def test_the_catalogue_has_every_classification_model() -> None:
    rows = {row["backbone"]: row for row in catalogue()}
    assert next(iter(rows)) == "tiny" and len(rows) == 1 + len(models.list_models(module=models))
    assert rows["resnet50"]["dim"] == 2048 and rows["resnet50"]["accuracy"] == 76.13
    assert rows["tiny"]["on_disk"] and all(row["dim"] > 0 and row["parameters"] > 0 for row in rows.values())


def test_default_weights_exist_for_every_model() -> None:
    for name in backbones.names()[1:]:
        default = Request.parse(name).weights
        known = models.get_model_weights(name).__members__
        assert default in known and default == ("IMAGENET1K_V1" if "IMAGENET1K_V1" in known else next(iter(known)))


def test_a_view_refuses_another_spec_and_names_the_difference() -> None:
    view = View("v", {"weights": "aaa", "layer": PENULTIMATE}, 4, Request("resnet18", "V1"))
    view.require({"layer": PENULTIMATE, "weights": "aaa"})
    with pytest.raises(ViewMismatch, match=r"weights is 'aaa', asked for 'bbb'.*--view"):
        view.require({"weights": "bbb", "layer": PENULTIMATE})
