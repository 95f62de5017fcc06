from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from conftest import COLOURS, draw
from features import backbones, views, weights
from features.store import FeatureStore
from features.views import TINY_WEIGHTS, UNTRAINED, Request

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_tiny_is_small_and_is_not_untrained() -> None:
    assert TINY_WEIGHTS.stat().st_size <= 3_000_000
    trained, untrained = (backbones.load([Request.parse("tiny", name)]).specs[0] for name in ("V2", UNTRAINED))
    assert trained != untrained


def test_rounded_weights_are_those_of_the_file_times_their_scales(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = models.mobilenet_v2().state_dict()
    rounded = weights.quantised(state)
    save_file(rounded, tmp_path / "int8.safetensors")
    read = weights.read_file(tmp_path / "int8.safetensors")
    assert read.keys() == state.keys() and (tmp_path / "int8.safetensors").stat().st_size < 8_000_000
    for key, exact in state.items():
        if exact.ndim == 4:
            channels = exact.abs().amax((1, 2, 3))
            assert rounded[key].dtype == torch.int8 and read[key].dtype == torch.float32
            assert torch.equal(read[key], rounded[key].float() * rounded[key + "_scale"])
            assert ((read[key] - exact).abs().amax((1, 2, 3)) <= channels / 127 * 0.501).all()
        else:
            assert torch.equal(read[key], exact)
    torch.save(read, tmp_path / "float32.pth")
    files = ("int8.safetensors", "float32.pth")
    specs = [backbones.load([Request.parse("tiny", str(tmp_path / file))]).specs[0] for file in files]
    assert specs[0] == specs[1]
    shipped = load_file(TINY_WEIGHTS)
    assert {tensor.dtype for tensor in shipped.values() if tensor.ndim == 4 and tensor.shape[3] > 1} == {torch.int8}


def test_a_channel_of_zeros_stays_zero() -> None:
    state = {"conv.weight": torch.stack([torch.zeros(2, 3, 3), torch.ones(2, 3, 3)])}
    rounded = weights.quantised(state)
    assert torch.equal(rounded["conv.weight"].float() * rounded["conv.weight_scale"], state["conv.weight"])


def test_weights_of_an_earlier_version_are_asked_for_in_vain(
    permafrost: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    # What an earlier version had in its package.
    earlier = {key: tensor * 1.01 for key, tensor in weights.read_file(TINY_WEIGHTS).items()}
    save_file(earlier, tmp_path / "earlier.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(views, "TINY_WEIGHTS", tmp_path / "earlier.safetensors")
        patch.setattr(weights, "read", lambda request: earlier)
        permafrost(*extract, "--weights", "V1")
    permafrost("train", tmp_path / "store", "--target", "label", "--folds", 3, "--out", tmp_path / "bundle")
    draw(photos / "train/red/new.png", (200, 60, 60))
    for command in (
        (*extract, "--weights", "V1"),
        ("predict", tmp_path / "bundle", photos, "--out", tmp_path / "p.parquet"),
    ):
        said = permafrost(*command, code=2).stderr.splitlines()
        assert len([line for line in said if "weights V1 of tiny are no longer in the package" in line]) == 1, said
    assert not (tmp_path / "p.parquet").exists()
    permafrost(*extract)
    assert FeatureStore.open(str(tmp_path / "store")).views().keys() == {"tiny-V1-penultimate", "tiny-V2-penultimate"}


@pytest.mark.slow
def test_the_script_that_makes_tiny_runs_and_repeats_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "teacher.pth")
    random = np.random.default_rng(0)
    for number in range(96):
        draw(tmp_path / f"photos/{number}.png", list(COLOURS.values())[number % 3], random)
    states = []
    for name in ("first", "second"):
        out = tmp_path / f"{name}.safetensors"
        command = [sys.executable, "-m", "features.tiny", tmp_path / "teacher.pth", tmp_path / "photos", "--out", out]
        subprocess.run([*map(str, command), "--smoke"], check=True, capture_output=True)
        log = json.loads(out.with_suffix(".json").read_text())
        assert log["photographs"] == 96 and len(log["loss"]) == log["epochs"] == 1
        states.append(backbones.load([Request.parse("tiny", str(out))]).specs)
    assert states[0] == states[1]


@pytest.mark.slow
def test_what_tiny_cannot_be_made_of_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(32):
        draw(tmp_path / f"photos/{number}.png", (200, number, 60))
    squeezenet, _ = backbones.build("squeezenet1_1")
    torch.save(squeezenet.state_dict(), tmp_path / "other.pth")
    made = ("--out", str(tmp_path / "made.safetensors"))
    for told, arguments in (
        ("do not fit this backbone", ("other.pth", "photos", *made)),
        ("none.pth is not there", ("none.pth", "photos", *made)),
        ("none has 0 photographs; 32 are the least", ("other.pth", "none", *made)),
        (
            "must be a .safetensors file in a folder that is there",
            ("other.pth", "photos", "--out", "gone/a.safetensors"),
        ),
        ("must be a .safetensors file in a folder that is there", ("other.pth", "photos", "--out", "a.json")),
    ):
        command = [sys.executable, "-m", "features.tiny", *arguments]
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and told in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pth", "photos"]
