from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from conftest import Toy, draw
from features.errors import SourceError
from features.extract import extract
from features.locations import read
from features.sources import Source, list_source
from features.store import FeatureStore

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def red(tmp_path: Path) -> bytes:
    return draw(tmp_path / "drawn" / "red.png", RED).read_bytes()


@pytest.fixture
def blue(tmp_path: Path) -> bytes:
    return draw(tmp_path / "drawn" / "blue.png", BLUE).read_bytes()


def shard(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """Write a tar shard with members in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def rows(source: Source) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in source.listing.to_pylist()}


def own(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("id", "uri", "version")}


def filled(location: Path, store: FeatureStore, toy: Toy) -> tuple[int, int, int]:
    record = extract(list_source(str(location)), store, [toy.request])
    return record["opened"], record["embedded"], record["failed"]


def test_what_stands_beside_an_image_becomes_its_columns(tmp_path: Path, red: bytes, blue: bytes) -> None:
    path = shard(
        tmp_path / "set.tar",
        ("000.cls", "ant\n"),  # Before the image as well as after it.
        ("000.png", red),
        ("000.json", json.dumps({"price": 5, "box": [1.5, 2.5]})),
        ("001.PNG", blue),
        ("001.cls", "bee"),
        ("001.txt", " a bee, é "),
        ("notes.md", "no image"),
    )
    listed = rows(list_source(str(path)))
    assert {key: own(row) for key, row in listed.items()} == {
        "000.png": {"label": "ant", "price": 5, "box": [1.5, 2.5], "text": None},
        "001.PNG": {"label": "bee", "price": None, "box": None, "text": "a bee, é"},
    }
    status = path.stat()
    assert {row["version"] for row in listed.values()} == {f"{status.st_size}-{status.st_mtime_ns}"}


def test_members_are_read_in_place(tmp_path: Path, red: bytes, blue: bytes) -> None:
    path = shard(tmp_path / "set.tar", ("a.cls", "1"), ("./a.png", red), ("deep/er/b.png", blue), ("empty.png", b""))
    listed = rows(list_source(str(path)))
    assert {key: read(row["uri"]) for key, row in listed.items()} == {
        "a.png": red,
        "deep/er/b.png": blue,
        "empty.png": b"",
    }
    first, last = map(int, re.findall(r"\d+", listed["a.png"]["uri"].partition("#bytes=")[2]))
    assert path.read_bytes()[first : last + 1] == red


def test_folders_around_and_inside_a_shard_give_label_and_split(tmp_path: Path, red: bytes) -> None:
    shard(tmp_path / "set" / "train" / "0.tar", ("ant/a.png", red), ("b.png", red), ("c.png", red), ("c.cls", "own"))
    shard(tmp_path / "set" / "1.tar", ("test/bee/d.png", red))
    draw(tmp_path / "set" / "val" / "cat" / "e.png", RED)
    listed = rows(list_source(str(tmp_path / "set")))
    assert {key: (row["label"], row["split"]) for key, row in listed.items()} == {
        "1.tar/test/bee/d.png": ("bee", "test"),
        "train/0.tar/ant/a.png": ("ant", "train"),
        "train/0.tar/b.png": (None, "train"),
        "train/0.tar/c.png": ("own", "train"),
        "val/cat/e.png": ("cat", "val"),
    }
    alone = rows(list_source(str(tmp_path / "set" / "1.tar")))
    assert own(alone["test/bee/d.png"]) == {"label": "bee", "split": "test"}


def test_a_template_fits_the_paths_inside_a_shard(tmp_path: Path, red: bytes) -> None:
    path = shard(tmp_path / "set" / "x" / "set.tar", ("2019/a.png", red))
    assert own(rows(list_source(str(path), columns="{year}/{name}"))["2019/a.png"]) == {"year": "2019", "name": "a"}
    listed = rows(list_source(str(tmp_path / "set"), columns="{folder}/{year}/{name}"))
    assert own(listed["x/set.tar/2019/a.png"]) == {"folder": "x", "year": "2019", "name": "a"}


def test_loose_images_and_members_are_embedded_alike(tmp_path: Path, toy: Toy, red: bytes, blue: bytes) -> None:
    for number in range(3):
        shard(tmp_path / "set" / f"{number}.tar", ("a.png", red), ("b.png", blue))
    draw(tmp_path / "set" / "a.png", RED)
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    assert filled(tmp_path / "set", store, toy) == (7, 2, 0)
    loaded = store.load()
    found = dict(zip(loaded.ids, loaded.embeddings.tolist(), strict=True))
    assert found == {"a.png": list(RED)} | {
        f"{number}.tar/{name}.png": list(colour) for number in range(3) for name, colour in (("a", RED), ("b", BLUE))
    }


def test_an_unchanged_shard_is_not_opened_again(tmp_path: Path, toy: Toy, red: bytes, blue: bytes) -> None:
    path = shard(tmp_path / "set.tar", ("a.png", red), ("b.png", b"no image"))
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    assert filled(path, store, toy) == (2, 1, 1)
    assert filled(path, store, toy) == (0, 0, 1)
    shard(path, ("a.png", red), ("b.png", blue))
    assert filled(path, store, toy) == (2, 1, 0)


@pytest.mark.parametrize("damage", ["in a header", "in an image", "between two members", "to text"])
def test_a_damaged_shard_gives_what_stands_before_the_damage_and_a_failed_row(
    tmp_path: Path, toy: Toy, red: bytes, blue: bytes, damage: str
) -> None:
    path = shard(tmp_path / "set" / "bad.tar", ("a.png", red), ("b.png", blue), ("c.png", red))
    shard(tmp_path / "set" / "good.tar", ("a.png", blue))
    content = path.read_bytes()
    cut = {"in a header": content[: 1024 + 100], "in an image": content[: 1024 + 512 + 60]}
    cut["between two members"] = content[:2048]
    path.write_bytes(cut.get(damage, b"<html>" * 200))
    store = FeatureStore.open_or_new(str(tmp_path / "store"))
    filled(tmp_path / "set", store, toy)
    found = {row["id"]: row["error"] for row in store.snapshot().samples.to_pylist()}
    assert str(found.pop("bad.tar/bad.tar")).startswith("not_an_image: ")
    if damage == "between two members":
        assert found.pop("bad.tar/b.png", "") is None
    if damage == "in an image":
        assert str(found.pop("bad.tar/b.png")).startswith(("truncated: ", "broken: "))
    assert found == dict.fromkeys(["bad.tar/a.png", "good.tar/a.png"] if damage in cut else ["good.tar/a.png"])


def test_an_empty_shard_is_no_sample_and_no_crash(tmp_path: Path, red: bytes) -> None:
    shard(tmp_path / "set" / "none.tar")
    shard(tmp_path / "set" / "one.tar", ("a.png", red))
    assert list(rows(list_source(str(tmp_path / "set")))) == ["one.tar/a.png"]
    assert rows(list_source(str(tmp_path / "set" / "none.tar"))) == {}


def test_a_doubled_member_is_refused_by_its_id(tmp_path: Path, red: bytes, blue: bytes) -> None:
    shard(tmp_path / "set" / "x.tar", ("a.png", red), ("a.png", blue))
    with pytest.raises(SourceError, match=r"'x\.tar/a\.png'.*rename"):
        list_source(str(tmp_path / "set"))


def test_keys_that_clash_are_renamed_and_json_that_is_none_is_passed_over(tmp_path: Path, red: bytes) -> None:
    told = {"id": 7, "Status": "sold", "": 1, "split": "mine"}
    others = (("b.png", red), ("b.json", "{no"), ("c.png", red), ("c.json", "[1]"))
    path = shard(tmp_path / "set.tar", ("a.png", red), ("a.json", json.dumps(told)), *others)
    listed = rows(list_source(str(path)))
    clean = {"json_id": 7, "json_Status": "sold", "json_": 1, "split": "mine"}
    assert own(listed["a.png"]) == clean
    assert own(listed["b.png"]) == own(listed["c.png"]) == dict.fromkeys(clean)


def test_values_of_several_types_become_text(tmp_path: Path, red: bytes) -> None:
    members = [(f"{n}.json", json.dumps({"x": value})) for n, value in enumerate((1, "one", {"a": 1}, 10**30))]
    path = shard(tmp_path / "set.tar", *((f"{n}.png", red) for n in range(4)), *members)
    assert [row["x"] for row in rows(list_source(str(path))).values()] == ["1", '"one"', '{"a": 1}', str(10**30)]


@pytest.mark.parametrize("option", ["image", "id_column"])
def test_options_of_tables_are_refused(tmp_path: Path, red: bytes, option: str) -> None:
    with pytest.raises(SourceError, match="tar shard"):
        list_source(str(shard(tmp_path / "set.tar", ("a.png", red))), **{option: "x"})  # type: ignore[arg-type]
