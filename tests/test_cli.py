from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import COLOURS, answer, draw

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_from_photographs_to_predictions(process: Run, photos: Path, tmp_path: Path) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--json")
    first = answer(process(*extract))
    assert (first["listed"], first["opened"], first["embedded"], first["failed"]) == (24, 24, 24, 0)
    second = answer(process(*extract))
    assert (second["opened"], second["outcome"], second["snapshot"]) == (0, "unchanged", 1)
    train = ("train", tmp_path / "store", "--target", "label", "--out", tmp_path / "bundle")
    facts = answer(process(*train, "--where", "split = 'train'", "--test-where", "split = 'test'", "--json"))
    assert facts["targets"][0]["test"]["head"]["accuracy"]["value"] == 1.0
    out = tmp_path / "predictions.parquet"
    counts = answer(process("predict", tmp_path / "bundle", photos / "test", "--out", out, "--json"))
    drift, odd = counts.pop("drift"), counts.pop("odd")
    assert counts == {"out": str(out), "samples": 6, "predicted": 6, "failed": 0}
    assert drift.keys() == {"auc", "p_value", "rows"} and 0 <= odd <= 6
    rows = pq.read_table(out).to_pylist()
    assert [row["prediction"] for row in rows] == [row["id"].split("/")[0] for row in rows]
    info = answer(process("info", tmp_path / "store", "--json"))
    assert info["views"]["tiny-V2-penultimate"]["samples"] == 24 and info["columns"] == ["label", "split"]
    assert "tiny-V2-penultimate" in process("info", tmp_path / "store").stdout


def test_a_dry_run_writes_nothing(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = permafrost("extract", photos, "--store", store, "--backbone", "tiny", "--dry-run", "--json")
    assert answer(done)["to_open"] == 24 and not store.exists()


def test_a_run_with_nothing_to_do_never_imports_torch(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--json")
    permafrost(*extract)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.cli", *map(str, extract)], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["opened"] == 0
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "pyarrow" in loaded and not loaded & {"torch", "torchvision", "sklearn"}


def test_each_mistake_is_one_line_and_leaves_nothing(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    store, bundle = tmp_path / "store", tmp_path / "bundle"
    ours = ("--store", store, "--backbone", "tiny")
    mistakes: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "is not there", ("extract", tmp_path / "none", *ours)),
        (2, "did you mean resnet18", ("extract", photos, "--store", store, "--backbone", "resnet19")),
        (2, "cannot be read", ("extract", photos, *ours, "--weights", "none.pth")),
        (2, "precision 'fp8' is unknown", ("extract", photos, *ours, "--precision", "fp8")),
        (2, "--image and --id are for tables", ("extract", photos, *ours, "--image", "file")),
        (2, "one image column, and --image names 2", ("extract", photos, *ours, "--image", "a", "--image", "b")),
        (2, "does not fit 24 of 24 paths", ("extract", photos, *ours, "--columns", "{year}/{name}")),
        (2, "view name", ("extract", photos, *ours, "--view", "../outside")),
        (2, "neither a count such as 10 nor a share", ("extract", photos, *ours, "--max-failures", "many")),
        (2, "--help", ("extract", photos, *ours, "--max-seconds", "soon")),
        (2, "--help", ("extract", photos, *ours, "--unheard-of")),
        (2, "--help", ("extract",)),
        (2, "--help", ("extrakt", photos)),
        (5, "is not empty and no feature store", ("extract", photos, "--store", photos, "--backbone", "tiny")),
        (5, "is not a feature store", ("train", tmp_path / "none", "--target", "label", "--out", bundle)),
        (5, "is not a bundle", ("predict", tmp_path, photos, "--out", tmp_path / "p.parquet")),
        (2, "written as Parquet", ("predict", tmp_path, photos, "--out", tmp_path / "p.csv")),
        (2, "is the source itself", ("predict", tmp_path, tmp_path / "t.parquet", "--out", tmp_path / "t.parquet")),
        (2, "for --out cannot be written", ("predict", tmp_path, photos, "--out", "/proc/self/p.parquet")),
        (2, "holds something else than an earlier demo", ("demo", "--out", tmp_path)),
        (2, "holds something else than an earlier demo", ("demo", "--out", tmp_path / "t.parquet")),
        (2, "is empty", ("extract", tmp_path / "empty.csv", *ours)),
    ]
    (tmp_path / "t.parquet").write_bytes(b"mine")
    (tmp_path / "empty.csv").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    for code, told, arguments in mistakes:
        said = permafrost(*arguments, code=code)
        assert said.stdout == "" and said.stderr.count("\n") == 1, said.stderr
        assert said.stderr.startswith("permafrost: ") and told in said.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_too_many_failures_are_told_once_the_listing_is_published(
    permafrost: Run, photos: Path, tmp_path: Path
) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--max-failures")
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"no image")
    said = permafrost(*extract, "5%", code=3).stderr.splitlines()
    assert [line for line in said if not line.startswith("embedding: ")] == said[-1:]
    assert said[-1].startswith("permafrost: 2 of 26 samples failed, more than --max-failures 5%")
    assert pq.read_metadata(tmp_path / "store/samples.parquet").num_rows == 26
    for most, code in {"0": 3, "1": 3, "2": 0, "7%": 3, "8%": 0, "100%": 0}.items():
        assert permafrost(*extract, most, code=code).stderr.count("\n") == (code > 0)


def test_a_view_of_other_weights_is_refused(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny", "--view", "mine")
    permafrost(*extract)
    said = permafrost(*extract, "--weights", "untrained", code=5).stderr
    assert "view 'mine' holds other embeddings: weights is" in said and "--view with a new name" in said


def test_vectors_that_are_not_finite_stop_the_run(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    import torch
    from torchvision import models

    state = models.squeezenet1_1().state_dict()
    state["features.0.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "sick.pth")
    sick = ("--backbone", "squeezenet1_1", "--weights", tmp_path / "sick.pth")
    said = permafrost("extract", photos, "--store", tmp_path / "store", *sick, code=6).stderr
    told = [line for line in said.splitlines() if not line.startswith("embedding: ")]
    assert len(told) == 1 and told[0].startswith("permafrost: ") and "24 of 24 vectors with NaN" in told[0]
    assert not list(tmp_path.glob("store/embeddings/*/*.parquet")) and not (tmp_path / "store/snapshots").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that no one may write")
def test_a_place_that_cannot_be_written_is_one_line(permafrost: Run, photos: Path) -> None:
    said = permafrost("extract", photos, "--store", "/proc/store", "--backbone", "tiny", code=1).stderr
    assert said.startswith("permafrost: ") and said.count("\n") == 1


def test_an_interrupted_run_exits_130_and_the_next_goes_on(photos: Path, tmp_path: Path) -> None:
    for number in range(1500):
        draw(photos / "train/red" / f"more-{number}.png", (number % 256, number // 256, 0))
    command = [sys.executable, "-m", "pipeline.cli", "extract", str(photos), "--store", str(tmp_path / "store")]
    running = subprocess.Popen([*command, "--backbone", "tiny"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "store/embeddings").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    told = [line for line in said.splitlines() if not line.startswith("embedding: ")]
    assert running.returncode == 130 and len(told) == 1 and told[0].startswith("permafrost: "), said
    assert not (tmp_path / "store/snapshots").exists()


def test_a_terminal_shows_a_bar(photos: Path, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "pipeline.cli", "extract", str(photos), "--store", str(tmp_path / "store")]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    running = subprocess.Popen([*command, "--backbone", "tiny"], stderr=writer, stdout=subprocess.PIPE, env=environment)
    os.close(writer)
    drawn = b""
    while True:
        try:
            drawn += os.read(reader, 65536)
        except OSError:
            break
    assert running.wait() == 0 and b"24/24" in drawn


def test_what_is_shown_is_what_is_there(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    odd = photos.rename(tmp_path / "photos [red]")
    permafrost("extract", odd, "--store", tmp_path / "store", "--backbone", "tiny", "--source", "x" * 300 + "[/x]")
    assert "x" * 300 + "[/x]" in permafrost("info", tmp_path / "store").stdout


def test_two_views_have_to_be_told_apart(permafrost: Run, photos: Path, tmp_path: Path) -> None:
    extract = ("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    permafrost(*extract)
    permafrost(*extract, "--weights", "untrained", "--limit", 5)
    train = ("train", tmp_path / "store", "--target", "label", "--out", tmp_path / "bundle", "--folds", 2)
    assert (
        "pick one with --view; it has tiny-V2-penultimate, tiny-untrained-penultimate"
        in permafrost(*train, code=2).stderr
    )
    said = permafrost(*train, "--view", "tiny-untrained-penultimate", code=2).stderr
    assert "too few" in said or "fewer members" in said or "two classes" in said
    assert "accuracy, 2 folds" in permafrost(*train, "--view", "tiny-V2-penultimate").stdout
    assert set(COLOURS) == {"red", "green", "blue"}


@pytest.mark.slow
def test_no_process_dies_as_it_exits(photos: Path, tmp_path: Path, process: Run) -> None:
    # Arrow's threads outlive a read; with a Python file in their hands one process in eight aborted under load.
    process("extract", photos, "--store", tmp_path / "store", "--backbone", "tiny")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: process("info", tmp_path / "store", "--json"), range(120)))
