from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Toy, draw, stored
from features import backbones, embedding, forward, images, runs
from features.errors import NonFinite, SourceError, ViewMismatch
from features.extract import extract
from features.reading import read_all
from features.sources import list_source
from features.store import FeatureStore
from features.views import Request

RED, BLUE = (255, 0, 0), (0, 0, 255)
SECOND_RUN = """
import json, sys
from features import extract, sources, store, views
listed, store = sources.list_source(sys.argv[1]), store.FeatureStore.open_or_new(sys.argv[2])
record = extract.extract(listed, store, [views.Request("toy", "V1")])
print(json.dumps([record["opened"], sorted({"torch", "torchvision", "sklearn"} & set(sys.modules))]))
"""


@dataclasses.dataclass
class Box:
    store: FeatureStore

    def fill(self, source: Path, weights: str = "V1", view: str | None = None, **how: Any) -> dict[str, Any]:
        return extract(list_source(str(source), **how), self.store, [Request("toy", weights)], view=view)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.store.snapshot().samples.to_pylist()}

    def vectors(self) -> dict[str, list[float]]:
        (view,) = self.store.views().values()
        by_sha256 = stored(self.store, view)
        ids = {key: row["sha256"] for key, row in self.rows().items()}
        return {key: by_sha256[sha256].tolist() for key, sha256 in ids.items() if sha256 in by_sha256}

    def contents(self) -> dict[Path, bytes]:
        files = Path(self.store.root.path).rglob("*.*")
        return {path: path.read_bytes() for path in files if path.parent.name != "runs"}


@pytest.fixture
def box(tmp_path: Path, toy: Toy) -> Box:
    return Box(FeatureStore.open_or_new(str(tmp_path / "box")))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.embedding.PART", 6)
    monkeypatch.setitem(forward.BATCH, "cpu", 3)
    monkeypatch.setattr("features.reading.AHEAD", 2)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw(tmp_path / "a.png", RED)
    (tmp_path / "t.csv").write_text("image,label,price\na.png,red,5\n")
    return tmp_path / "t.csv"


# So that whoever opens the file is found out: other bytes, behind the same size and time.
def disguise(path: Path) -> None:
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_every_vector_is_the_backbones(photos: Path, box: Box) -> None:
    record = box.fill(photos)
    assert [record[count] for count in ("listed", "opened", "embedded", "failed")] == [len(box.vectors()), 24, 24, 0]
    for name, vector in box.vectors().items():
        with Image.open(photos / name) as image:
            assert np.allclose(vector, np.asarray(image.resize((8, 8)), float).mean((0, 1)), atol=1e-3)
    assert {(row["width"], row["height"], row["format"]) for row in box.rows().values()} == {(20, 16, "PNG")}


def test_a_second_run_opens_nothing_loads_nothing_and_publishes_nothing(photos: Path, box: Box, toy: Toy) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    box.fill(photos)
    before = box.contents()
    for path in photos.rglob("*.png"):
        disguise(path)
    record = box.fill(photos)
    assert [record[count] for count in ("opened", "embedded", "failed", "outcome")] == [0, 0, 1, "unchanged"]
    assert (toy.loaded, toy.embedded, box.contents()) == (1, 24, before)


def test_a_process_with_nothing_to_do_never_imports_torch(photos: Path, box: Box) -> None:
    box.fill(photos)
    command = [sys.executable, "-c", SECOND_RUN, str(photos), box.store.root.path]
    assert json.loads(subprocess.run(command, check=True, capture_output=True).stdout) == [0, []]


def test_a_run_with_nothing_to_embed_loads_no_model(table: Path, box: Box, toy: Toy) -> None:
    table.write_text("image\na.png\nmissing.png\n")
    box.fill(table)
    box.fill(table)
    os.utime(table.with_name("a.png"), (1, 1))
    box.fill(table)
    assert toy.loaded == 1


def test_what_was_touched_is_read_and_what_has_changed_is_embedded(photos: Path, box: Box, toy: Toy) -> None:
    box.fill(photos)
    touched, changed, gone = (photos / "train" / "red" / f"{name}.png" for name in ("00", "03", "06"))
    os.utime(touched, (1, 1))
    record = box.fill(photos)
    assert (record["opened"], record["embedded"], record["snapshot"], toy.embedded) == (1, 0, 2, 24)
    draw(changed, BLUE)
    gone.unlink()
    assert box.fill(photos)["embedded"] == 1
    assert box.vectors()["train/red/03.png"] == [0, 0, 255]
    assert [len(box.store.snapshot(number).samples) for number in (1, 2, 3)] == [24, 24, 23]


@pytest.mark.parametrize("batch", [3, 64])
def test_the_same_bytes_are_embedded_once(photos: Path, box: Box, toy: Toy, batch: int, small: None) -> None:
    forward.BATCH["cpu"], embedding.PART = batch, 64
    first = photos / "train" / "red" / "00.png"
    draw(photos.parent / "elsewhere" / "again.png", RED).write_bytes(first.read_bytes())
    (photos / "copy.png").write_bytes(first.read_bytes())
    assert box.fill(photos)["embedded"] == 24
    first.rename(photos / "moved.png")
    assert box.fill(photos)["embedded"] == box.fill(photos.parent / "elsewhere")["embedded"] == 0
    found = box.vectors()
    assert found["moved.png"] == found["copy.png"] == found["again.png"]
    assert (len(found), toy.embedded) == (26, 24)
    assert box.fill(photos, "V2")["opened"] == 24


def test_a_changed_label_makes_a_snapshot_and_embeds_nothing(table: Path, box: Box, toy: Toy) -> None:
    box.fill(table)
    table.write_text("image,label\na.png,bee\n")
    assert (box.fill(table)["opened"], toy.loaded) == (0, 1)
    assert [box.store.snapshot(number).samples["label"][0].as_py() for number in (1, 2)] == ["red", "bee"]


def test_what_cannot_be_read_is_a_row_with_a_reason(table: Path, box: Box, small: None) -> None:
    folder = table.parent
    broken = {"empty": b"", "cut": (folder / "a.png").read_bytes()[:60]} | {f"text{n}": b"<html>" for n in range(10)}
    for name, content in broken.items():
        (folder / f"{name}.png").write_bytes(content)
    draw(folder / "name.png", BLUE).rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    os.mkfifo(folder / "pipe.png")
    assert box.fill(folder)["failed"] == 13
    reasons = {key: row["error"].split(": ")[0] for key, row in box.rows().items() if row["status"] == "failed"}
    assert set(reasons.values()) <= images.REASONS
    assert [reasons[f"{name}.png"] for name in ("empty", "text9", "pipe")] == ["empty", "not_an_image", "unreadable"]
    assert box.vectors() == {"a.png": [255, 0, 0], "\ufffdff.png": [0, 0, 255]}
    assert box.fill(folder)["opened"] == 1  # the pipe, which may have become a file


def test_an_image_that_the_transform_cannot_take_is_a_failure_of_its_own(tmp_path: Path) -> None:
    def crop(image: Image.Image) -> np.ndarray[Any, Any]:
        raise MemoryError  # as for a strip that becomes too large when its shorter side is resized

    (reading,) = read_all([str(draw(tmp_path / "strip.png", RED))], lambda sha256: {"crop": (crop, False)})
    assert (reading.facts["status"], reading.pixels) == ("failed", {})


def test_a_permanent_failure_waits_for_a_change_and_a_missing_file_is_looked_for_again(table: Path, box: Box) -> None:
    table.write_text("image\na.png\nlate.png\n")
    table.with_name("a.png").write_bytes(b"no image")
    assert box.fill(table)["failed"] == 2
    assert box.rows()["late.png"]["error"].startswith("missing: ")
    again = box.fill(table)
    assert (again["opened"], again["outcome"]) == (1, "unchanged")
    for name in ("a.png", "late.png"):
        draw(table.with_name(name), BLUE)
    box.fill(table)
    assert box.vectors() == {"a.png": [0, 0, 255], "late.png": [0, 0, 255]}


def test_a_limit_keeps_the_other_rows(photos: Path, box: Box) -> None:
    assert box.fill(photos, limit=5)["listed"] == 5
    assert box.fill(photos)["embedded"] == 19
    draw(photos / "aaa.png", RED)
    assert (box.fill(photos, limit=2)["embedded"], len(box.rows())) == (1, 25)


@pytest.mark.parametrize("fail_after", [0, 4, 6, 13, 23])
@pytest.mark.usefixtures("small")
def test_an_interrupted_run_loses_no_finished_part(photos: Path, box: Box, toy: Toy, fail_after: int) -> None:
    undisturbed = Box(FeatureStore.open_or_new(f"memory://{photos}"))
    undisturbed.fill(photos)
    toy.embedded, toy.fail_after = 0, fail_after
    with pytest.raises(KeyboardInterrupt):
        box.fill(photos)
    kept = [key for rows in runs.kept(box.store.root, str(photos)).values() for key in rows["id"].to_pylist()]
    assert (box.store.snapshot().number, len(kept)) == (0, fail_after // 6 * 6)
    for name in kept:
        disguise(photos / name)
    toy.embedded, toy.fail_after = 0, None
    record = box.fill(photos)
    assert record["opened"] == record["embedded"] == toy.embedded == 24 - len(kept)
    assert (box.rows(), box.vectors()) == (undisturbed.rows(), undisturbed.vectors())
    assert runs.kept(box.store.root, str(photos)) == {}


@pytest.mark.usefixtures("small")
def test_a_vector_of_nan_stops_the_run(photos: Path, box: Box, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(batch: torch.Tensor) -> tuple[torch.Tensor]:
        mean = batch.float().mean((1, 2))
        return (torch.where(mean[:, :1] > 128, math.inf, mean),)

    sound = backbones.load([toy.request])
    sick = dataclasses.replace(sound, forward=dataclasses.replace(sound.forward, frozen=model))
    monkeypatch.setattr(backbones, "load", lambda *_: sick)
    for path in photos.glob("test/red/*.png"):
        path.unlink()  # so that the red ones come last
    with pytest.raises(NonFinite, match=r"toy gave 2 of 3 vectors with NaN or infinity"):
        box.fill(photos)
    (view,) = box.store.views().values()
    vectors = np.stack(list(stored(box.store, view).values()))
    assert (box.store.snapshot().number, len(vectors), np.isfinite(vectors).all()) == (0, 12, True)


def test_a_view_refuses_another_spec_and_stays_as_it_was(photos: Path, box: Box) -> None:
    box.fill(photos, view="mine")
    before = box.contents()
    with pytest.raises(ViewMismatch, match=r"'mine'.*'V1'.*'V2'.*--view"):
        box.fill(photos, "V2", view="mine")
    assert box.contents() == before
    assert box.fill(photos, "V2")["embedded"] == 24
    assert set(box.store.views()) == {"mine", "toy-V2-penultimate"}


def test_two_sources_share_a_store_with_columns_of_their_own(photos: Path, table: Path, box: Box) -> None:
    box.fill(photos)
    box.fill(table)
    found = box.rows()
    assert [found["a.png"][column] for column in ("price", "label", "split")] == [5, "red", None]
    assert [found["test/red/18.png"][column] for column in ("price", "label", "split")] == [None, "red", "test"]
    assert box.fill(photos)["outcome"] == "unchanged"


def test_a_type_clash_names_both_sides_and_embeds_nothing(photos: Path, table: Path, box: Box, toy: Toy) -> None:
    box.fill(photos)
    table.write_text("image,label\na.png,5\n")
    with pytest.raises(SourceError, match=rf"'label' is int64 in source {table}, but string in source {photos}"):
        box.fill(table)
    assert toy.embedded == 24


@pytest.mark.parametrize(
    ("seconds", "device", "slowest", "told"),
    [
        ({"decode": 19.0, "model": 3.0}, "cuda", "decode", "the GPU waits, more cores would help"),
        ({"decode": 19.0, "model": 3.0}, "cpu", "decode", "a GPU would idle"),
        ({"decode": 1.0, "model": 9.0}, "cpu", "model", "90% of the time; a GPU,"),
        ({"decode": 1.0, "model": 9.0}, "cuda", "model", "another GPU (--shard) would help"),
        ({"read": 150.0, "decode": 5.0}, "cpu", "read", "94% of its threads waiting"),
        ({"write": 8.0}, "cpu", "write", "faster disk"),
        ({"list": 80.0}, None, "list", "slow to list"),
    ],
)
def test_the_bottleneck_is_named_with_what_would_help(
    seconds: dict[str, float], device: str | None, slowest: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "THREADS", 2)
    spent = dict.fromkeys(("load", *runs.STAGES), 0.0) | {"elapsed": 10.0} | seconds
    found = runs.speed({"listed": 100, "opened": 100}, spent, 16, device)
    assert found["bottleneck"] == slowest and found["advice"].startswith(f"{slowest}: ") and told in found["advice"]
    assert found["busy"]["decode"] == pytest.approx(min(1, seconds.get("decode", 0) / 20))
    at_once = {"read": 16, "decode": 2}.get(slowest, 1)
    assert found["images_per_second"][slowest] == pytest.approx(100 * at_once / seconds[slowest], abs=0.1)


def test_a_run_with_nothing_to_open_has_no_bottleneck(photos: Path, box: Box) -> None:
    first, again = box.fill(photos), box.fill(photos)
    assert first["advice"].startswith(f"{first['bottleneck']}: ") and first["device"] == "cpu"
    assert again["bottleneck"] is again["advice"] is again["device"] is None
