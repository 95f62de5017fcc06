from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import draw
from features import runs
from features.shards import Shard
from features.sources import list_source
from features.store import FeatureStore

DRIVER = """
import os, sys, time
from features import embedding, forward, locations, reading
from pipeline.cli import main
embedding.PART, forward.BATCH["cpu"], reading.AHEAD, reading.THREADS = 40, 8, 8, 2
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
seconds, read = float(sys.argv.pop(1)), locations.read
def logged(uri):
    os.write(log, f"{uri}\\n".encode())
    time.sleep(seconds)
    return read(uri)
locations.read = logged
main()
"""
Permafrost = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class World:
    """A source, a store, a log of every read, and how to start processes that share them.

    Where the store is remote, `store` is where `fetch` puts a copy of it.
    """

    source: Path
    store: Path
    log: Path
    remote: str | None = None

    def start(self, *options: object, source: Path | None = None, seconds: float = 0.004) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, self.log, seconds, "extract", source or self.source]
        command += ["--store", self.remote or self.store, "--backbone", "tiny", "--json", *options]
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self, *options: object, code: int = 0, seconds: float = 0.004) -> str:
        return ended(self.start(*options, seconds=seconds), code)

    def fetch(self) -> None:
        if self.remote:
            shutil.rmtree(self.store, ignore_errors=True)
            fs, path = fsspec.url_to_fs(self.remote, use_listings_cache=False)
            for name in fs.find(path):
                (file := self.store / Path(name).relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(fs.cat_file(name))

    def reads(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def finished(self) -> set[str]:
        """Places of what is recorded as read."""
        root = FeatureStore.open_or_new(str(self.store)).root
        tables = [*runs.kept(root, str(self.source)).values(), *map(pq.read_table, self.store.glob("snapshots/*"))]
        return {f"{self.source}/{key}" for table in tables for key in table["id"].to_pylist()}

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.store / "samples.parquet").to_pylist()
        return sorted(rows, key=lambda row: (row["source"], row["id"]))

    def vectors(self) -> dict[str, list[Any]]:
        """Each vector of each SHA-256, in whatever part."""
        found: dict[str, list[Any]] = {}
        for path in self.store.glob("embeddings/*/*.parquet"):
            table = pq.ParquetFile(path).read()
            for key, vector in zip(table["sha256"].to_pylist(), table["embedding"].to_numpy(), strict=True):
                found.setdefault(key, []).append(vector)
        return found

    def require_equal(self, other: World, doubles: bool = False) -> None:
        assert self.rows() == other.rows()
        mine, theirs = self.vectors(), other.vectors()
        assert mine.keys() == theirs.keys()
        for key, (theirs_alone,) in theirs.items():
            assert len(mine[key]) == 1 or doubles
            for vector in mine[key]:
                assert np.linalg.norm(vector - theirs_alone) <= 1e-5 * np.linalg.norm(theirs_alone)
        assert not list(self.store.glob("pending/*")) and not list(self.store.glob("tmp/*.*"))


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said that ends with this code: at most one line, progress aside."""
    out, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    lines = [line for line in said.splitlines() if not line.startswith("embedding: ")]
    assert len(lines) == (code != 0) and all(line.startswith("permafrost: ") for line in lines), said
    assert out.count("\n") == (code == 0)
    return lines[0] if lines else out


def record(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max(store.glob("runs/*.json")).read_text())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred files: mostly small images, each tenth one a copy, each twentieth one broken."""
    folder, noise = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(400):
        path = folder / f"class{number % 3}" / f"{number:03d}{('.png', '.jpg')[number % 2]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        if number % 20 == 7:
            path.write_bytes(path.read_bytes()[: number % 3 * 150])
        if number % 10 == 9:
            path.write_bytes(next(folder.glob(f"*/{number * 7 % number:03d}.*")).read_bytes())
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, float]:
    """What a run leaves that nothing happens to, and how long it takes."""
    folder, begun = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    world = World(source, folder / "store", folder / "log")
    facts = json.loads(world.end())
    assert (facts["listed"], facts["failed"], len(world.reads())) == (400, 20, 400)
    return world, time.monotonic() - begun


@pytest.fixture
def world(source: Path, tmp_path: Path) -> World:
    return World(source, tmp_path / "store", tmp_path / "log")


def kill_at_random(world: World, undisturbed: tuple[World, float], kills: int, seed: int) -> None:
    """Kill runs until one may go on to the end; what was finished before each is not read again."""
    when = random.Random(seed)
    for kill in range(kills + 1):
        finished, before = world.finished(), len(world.reads())
        running = world.start(seconds=0.01)
        if kill < kills:
            until = min(400, before + when.randrange(800 // kills))
            while len(world.reads()) < until and running.poll() is None:
                time.sleep(0.01)
            # With all of it read, starting, embedding and publishing are left to be killed in.
            time.sleep(when.uniform(0, undisturbed[1] if before >= 400 else 0.5))
            running.kill()
            running.communicate()
        else:
            ended(running)
        world.fetch()
        assert not finished & set(world.reads()[before:])
    world.require_equal(undisturbed[0])
    assert json.loads(world.end())["opened"] == 0


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_what_was_finished_survives_kills(
    world: World, undisturbed: tuple[World, float], kills: int, seed: int
) -> None:
    kill_at_random(world, undisturbed, kills, seed)


@pytest.mark.slow
def test_what_was_finished_survives_kills_on_s3(world: World, undisturbed: tuple[World, float], bucket: str) -> None:
    world.remote = f"{bucket}/store"
    kill_at_random(world, undisturbed, 5, 2)


def end_early(world: World, number: signal.Signals | None, code: int, seconds: float) -> str:
    """End a run once it has finished something, by a signal or else by giving it so many seconds."""
    if number:
        running = world.start(seconds=0.05)
        while not list(world.store.glob("pending/*")) and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(number)
        return ended(running, code)
    said = ""
    while not list(world.store.glob("pending/*")):
        # However busy the machine is, reading all takes twice as long, and if starting did, there is more next time.
        said, seconds = world.end("--max-seconds", seconds, code=code, seconds=seconds / 100), 2 * seconds
    return said


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(None, 7, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_end_keeps_what_it_has(
    world: World, undisturbed: tuple[World, float], number: signal.Signals | None, code: int
) -> None:
    said = end_early(world, number, code, 1.2 * undisturbed[1])
    finished, before = world.finished(), len(world.reads())
    assert f"{len(finished)} of 400 samples are done and kept" in said and 0 < len(finished) < 400
    assert not (world.store / "snapshots").exists() and not (world.store / "samples.parquet").exists()
    assert (record(world.store)["exit_code"], record(world.store)["error"]) == (code, said.removeprefix("permafrost: "))
    assert json.loads(world.end())["opened"] == 400 - len(finished)
    assert not finished & set(world.reads()[before:])
    world.require_equal(undisturbed[0])


@pytest.mark.slow
def test_short_runs_come_to_an_end(world: World, undisturbed: tuple[World, float]) -> None:
    limit, ends = ("--max-seconds", 1.5 * undisturbed[1]), []
    while not ends or ends[-1] == 7:
        running = world.start(*limit, seconds=limit[1] / 150)
        running.communicate()
        ends.append(running.returncode)
        assert len(ends) < 12
    assert ends[0] == 7 and ends[-1] == 0
    world.require_equal(undisturbed[0])


@pytest.mark.parametrize(
    "options",
    [[(), ()], pytest.param([("--shard", "0/2"), ("--shard", "1/2")], marks=pytest.mark.slow)],
    ids=["same", "shards"],
)
def test_two_runs_at_once_leave_one_listing(
    world: World, undisturbed: tuple[World, float], options: list[tuple[str, ...]]
) -> None:
    for running in [world.start(*some) for some in options]:
        ended(running)
    world.require_equal(undisturbed[0], doubles=True)


@pytest.mark.slow
def test_two_runs_at_once_on_s3_leave_one_listing(world: World, undisturbed: tuple[World, float], bucket: str) -> None:
    world.remote = f"{bucket}/store"
    for running in [world.start(), world.start()]:
        ended(running)
    world.fetch()
    world.require_equal(undisturbed[0], doubles=True)


@pytest.mark.slow
def test_two_sources_at_once_are_both_listed(world: World, undisturbed: tuple[World, float]) -> None:
    sources = [world.source / "class0", world.source / "class1"]
    for running in [world.start(source=folder) for folder in sources]:
        ended(running)
    ids = [f"{row['source']}/{row['id']}" for row in world.rows()]
    assert ids == sorted(str(path) for folder in sources for path in folder.iterdir())
    assert {row["sha256"] for row in world.rows() if row["status"] == "ok"} == world.vectors().keys()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk]).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_what_fitted(world: World, undisturbed: tuple[World, float], small_disk: Path) -> None:
    world.store = small_disk / "store"
    said = world.end(code=1)
    assert "No space left on device" in said and "free space there and run again, finished parts are kept" in said
    finished, before = world.finished(), len(world.reads())
    assert 0 < len(finished) < 400 and not (world.store / "samples.parquet").exists()
    assert world.vectors() and not list(world.store.glob("tmp/*"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    world.end()
    assert not finished & set(world.reads()[before:])
    world.require_equal(undisturbed[0])


def test_a_source_that_lost_more_than_half_is_not_published(permafrost: Permafrost, photos: Path) -> None:
    store, aside = photos.with_name("store"), photos.with_name("aside")
    extract = ("extract", photos, "--store", store, "--backbone", "tiny")
    permafrost(*extract)
    snapshots = {path: path.read_bytes() for path in store.glob("s*/*.parquet")}
    files = sorted(photos.rglob("*.png"))
    photos.rename(aside)
    assert "is not there" in permafrost(*extract, code=2).stderr
    photos.mkdir()  # where a disk is not mounted
    assert "24 of the 24 samples" in permafrost(*extract, code=4).stderr
    shutil.copytree(aside, photos, dirs_exist_ok=True)
    for path in files[:13]:
        path.unlink()
    assert permafrost(*extract, code=4).stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in store.glob("s*/*.parquet")} == snapshots
    draw(files[0], (1, 2, 3))  # another image under an old name
    permafrost(*extract)
    assert pq.read_metadata(store / "samples.parquet").num_rows == 12
    permafrost("extract", photos / "..", "--store", store, "--backbone", "tiny", "--source", "other", "--limit", 1)
    shutil.rmtree(photos)
    photos.mkdir()
    permafrost(*extract, code=4)
    permafrost(*extract, "--allow-shrink")
    assert [row["source"] for row in pq.read_table(store / "samples.parquet").to_pylist()] == ["other"]


def test_a_shard_counts_only_its_own_losses(permafrost: Permafrost, photos: Path) -> None:
    extract = ("extract", photos, "--store", photos.with_name("store"), "--backbone", "tiny")
    permafrost(*extract)
    ids = list_source(str(photos)).listing["id"]
    for key in ids.filter(Shard(1, 2).holds(ids)).to_pylist():
        (photos / key).unlink()
    permafrost(*extract, "--shard", "0/2")
    permafrost(*extract, "--shard", "1/2", code=4)
    permafrost(*extract, "--shard", "1/2", "--allow-shrink")
