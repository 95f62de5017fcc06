from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import Toy, answer, draw
from features import images, reading
from features.errors import ImageError
from features.extract import extract
from features.sources import list_source
from features.store import FeatureStore

HANGS = """
import time
from features import images, reading
from pipeline.cli import main
reading.THREADS, reading.SECONDS_TO_DECODE, decode = 2, 0.5, images.decode
images.decode = lambda data, *others: time.sleep(1000) if len(data) < 200 else decode(data, *others)
main()
"""
GIB = 2**30
SIDES = st.integers(1, 300) | st.sampled_from([1000, 5000, 7000, 10000, 16383, 32768, 60000, 65535])
Permafrost = Callable[..., subprocess.CompletedProcess[str]]


def encoded(form: str, **options: Any) -> bytes:
    gradient = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    gradient.save(sink := io.BytesIO(), form, **options)
    return sink.getvalue()


SEEDS = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True, subsampling=0),
    "png": encoded("PNG"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
}


def resized(form: str, width: int, height: int) -> bytes:
    """The seed, saying that it has other sides."""
    data = bytearray(SEEDS[form])
    if form == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif form == "webp":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    elif form == "gif":
        data[6:10] = struct.pack("<HH", width, height)
        frame = data.index(b"\x2c\0\0\0\0") + 5
        data[frame : frame + 4] = struct.pack("<HH", width, height)
    else:
        start = data.index(b"\xff\xc2" if form == "progressive" else b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def measured(run: Permafrost, source: Path, store: Path) -> tuple[dict[str, dict[str, Any]], int, float]:
    """Rows by id, bytes of memory at the peak, and seconds of a run of its own."""
    run("extract", source, "--store", store, "--backbone", "tiny")
    record = json.loads(max(store.glob("runs/*.json")).read_text())
    rows = {row["id"]: row for row in pq.read_table(store / "samples.parquet").to_pylist()}
    return rows, record["peak_memory_bytes"], record["total_seconds"]


def code(row: dict[str, Any]) -> str:
    return (row["error"] or row["status"]).partition(":")[0]


@pytest.mark.slow
def test_no_odd_image_takes_a_gibibyte_or_a_run_with_it(process: Permafrost, testdata: Path, tmp_path: Path) -> None:
    draw(tmp_path / "one/a.png", (1, 2, 3))
    _, least, _ = measured(process, tmp_path / "one", tmp_path / "idle")
    rows, peak, seconds = measured(process, testdata / "odd_images", tmp_path / "store")
    assert len(rows) > 100 and {code(row) for row in rows.values()} <= images.REASONS | {"ok"}
    assert peak - least <= GIB and seconds < 60


def test_a_folder_of_traps_is_rows_within_seconds(process: Permafrost, tmp_path: Path) -> None:
    folder = tmp_path / "traps"
    draw(folder / "good.png", (1, 2, 3))
    _, least, _ = measured(process, folder, tmp_path / "idle")
    for name, content in {
        "bomb.png": resized("png", 60000, 60000),
        "bomb.webp": resized("webp", 16383, 16383),
        "beyond.png": resized("png", 13000, 13000),  # which Pillow would take
        # As large as may be.
        "vast.webp": resized("webp", 7300, 7300),
        "vast.jpg": resized("progressive", 8700, 8700),
        "vast.png": resized("png", 10300, 10300),
        "vast.gif": resized("gif", 10300, 10300),
    }.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.jpg")
    for name, target in {"loop": "loop.jpg", "zero": "/dev/zero", "full": "/dev/full", "none": "nowhere"}.items():
        (folder / f"{name}.jpg").symlink_to(target)
    (folder / "up").symlink_to(tmp_path / "traps")
    (folder / "sparse.png").touch()
    os.truncate(folder / "sparse.png", 2**40)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(b"no image")
    draw(folder / "locked.png", (3, 2, 1)).chmod(0)
    rows, peak, seconds = measured(process, folder, tmp_path / "store")
    told = {key: code(row) for key, row in rows.items()}
    assert told.pop("locked.png") == ("unreadable" if os.geteuid() else "ok")
    assert told.pop("vast.jpg") in ("ok", "truncated", "timeout")
    assert {told.pop(f"vast.{form}") for form in ("webp", "png", "gif")} <= {"truncated", "broken"}
    assert told == {
        **dict.fromkeys(["bomb.png", "bomb.webp", "beyond.png", "sparse.png"], "too_large"),
        **dict.fromkeys(["pipe.jpg", "loop.jpg", "zero.jpg", "full.jpg"], "unreadable"),
        **{"none.jpg": "missing", "good.png": "ok", "\ufffdff.png": "not_an_image"},
    }
    assert peak - least <= GIB and seconds < 40


def test_a_decoder_that_hangs_is_left_behind_and_tried_again(
    photos: Path, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, decode = {path.read_bytes() for path in photos.glob("test/*/*.png")}, images.decode
    monkeypatch.setattr(reading, "THREADS", 2)
    monkeypatch.setattr(reading, "SECONDS_TO_DECODE", 0.2)
    monkeypatch.setattr(reading, "SECONDS_TO_END", 0.2)
    monkeypatch.setattr(images, "decode", lambda data, *_: time.sleep(20) if data in stuck else decode(data))
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    begun = time.monotonic()
    record = extract(list_source(str(photos)), store, [toy.request])
    assert (record["embedded"], record["failed"]) == (18, 6) and time.monotonic() - begun < 10
    failed = [row for row in store.snapshot().samples.to_pylist() if row["status"] == "failed"]
    assert {(row["id"][:5], code(row)) for row in failed} == {("test/", "timeout")}
    monkeypatch.setattr(images, "decode", decode)
    record = extract(list_source(str(photos)), store, [toy.request])
    assert (record["opened"], record["embedded"], record["failed"]) == (6, 6, 0)


@pytest.mark.slow
def test_a_process_with_a_hanging_decoder_ends(photos: Path, tmp_path: Path) -> None:
    for number in range(3):
        (photos / f"{number}.png").write_bytes(b"hang" * (number + 1))
    command = [sys.executable, "-c", HANGS, "extract", photos, "--store", tmp_path / "store", "--backbone", "tiny"]
    begun = time.monotonic()
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (answer(done)["embedded"], answer(done)["failed"]) == (24, 3) and time.monotonic() - begun < 30


def test_rehash_and_retry_failed_open_what_has_not_changed(photos: Path, tmp_path: Path, toy: Toy) -> None:
    store, same = FeatureStore.open_or_new(str(tmp_path / "store")), photos / "same.bmp"
    (photos / "broken.png").write_bytes(b"no image")
    draw(same, (1, 2, 3))
    extract(list_source(str(photos)), store, [toy.request])
    times = same.stat()
    draw(same, (3, 2, 1))
    os.utime(same, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened = [
        (record["opened"], record["embedded"])
        for options in ({}, {"retry_failed": True}, {"rehash": True}, {"rehash": True})
        for record in [extract(list_source(str(photos)), store, [toy.request], **options)]
    ]
    assert opened == [(0, 0), (1, 0), (26, 1), (26, 0)]


def mutated(data: st.DataObject, form: str) -> bytes:
    content = bytearray(resized(form, data.draw(SIDES), data.draw(SIDES)) if data.draw(st.booleans()) else SEEDS[form])
    for kind in data.draw(st.lists(st.sampled_from(["flip", "insert", "delete", "truncate"]), max_size=6)):
        place = data.draw(st.integers(0, 60) | st.integers(0, 2**12)) % (len(content) or 1)
        some = data.draw(st.binary(min_size=1, max_size=8))
        content[place:] = {
            "flip": some + content[place + len(some) :],
            "insert": some + content[place:],
            "delete": content[place + len(some) :],
            "truncate": b"",
        }[kind]
    return bytes(content)


@pytest.mark.parametrize("form", SEEDS)
@pytest.mark.parametrize("examples", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_mutated_files_are_images_or_failures_within_bounds(form: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def decodes(data: st.DataObject) -> None:
        begun = time.monotonic()
        try:
            assert np.asarray(images.decode(mutated(data, form)).image).shape[2:] == (3,)
        except ImageError as error:
            assert error.code in images.REASONS
        assert time.monotonic() - begun < 10

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decodes()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= GIB
