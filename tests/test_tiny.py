from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models

from conftest import COLOURS, draw
from features import backbones
from features.views import Request


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
