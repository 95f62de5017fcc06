from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import draw
from features import folders
from features.errors import ImageError, SourceError
from features.locations import read
from features.samples import normalised
from features.sources import Source, list_source

RED = (255, 0, 0)
UNLISTABLE = {
    "nothing": b"",
    "too many fields": b"image\na.png,b\n",
    "too many fields over two lines": b'image,label\n"a\nb.png","x\ny",z\n',
    "Latin-1 in a cell": "image,note\na.png,é\n".encode("latin-1"),
    "Latin-1 in the header": "image,é\na.png,b\n".encode("latin-1"),
    "UTF-16": "image\na.png\n".encode("utf-16"),
    "a doubled column": b"image,x,x\na.png,1,2\n",
}


def rows(source: Source) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = source.listing.to_pylist()
    return listed


def ids(source: Source) -> list[str]:
    return [row["id"] for row in rows(source)]


def own(source: Source) -> list[dict[str, Any]]:
    return source.listing.drop_columns(["id", "uri", "version"]).to_pylist()


def refused(location: object, *told: str, **options: Any) -> None:
    with pytest.raises(SourceError) as caught:
        list_source(str(location), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message


def table(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_folder_gives_labels_from_parents_and_splits_from_known_names(photos: Path) -> None:
    listed = rows(list_source(str(photos)))
    assert len(listed) == 24
    assert [row["id"] for row in listed] == sorted(row["id"] for row in listed)
    for row in listed:
        split, label, name = row["id"].split("/")
        status = os.stat(row["uri"])
        assert (row["label"], row["split"]) == (label, split)
        assert Path(row["uri"]) == photos / split / label / name
        assert row["version"] == f"{status.st_size}-{status.st_mtime_ns}"


def test_the_split_is_a_known_name_above_the_label(tmp_path: Path) -> None:
    for split in ("train", "val/deep", "valid", "validation", "test", "holdout"):
        draw(tmp_path / split / "ant" / "1.png", RED)
    draw(tmp_path / "bee" / "test" / "1.png", RED)
    found = [(row["id"].split("/")[0], row["label"], row["split"]) for row in rows(list_source(str(tmp_path)))]
    known = [(split, "ant", split) for split in ("train", "val", "valid", "validation", "test")]
    assert set(found) == {*known, ("holdout", "ant", None), ("bee", None, "test")}


def test_hidden_names_and_other_files_are_passed_over_and_extensions_may_be_capitals(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.png", "sub/c.png", ".d.png", ".hidden/e.png", "sub/.f/g.png"):
        draw(tmp_path / name, RED)
    (tmp_path / "h.JpEg").write_bytes(b"not an image, which listing does not see")
    (tmp_path / "notes.txt").write_text("no")
    assert ids(list_source(str(tmp_path))) == ["a.PNG", "b.png", "h.JpEg", "sub/c.png"]
    assert list_source(str(tmp_path / "sub")).listing.column_names == ["id", "uri", "version"]


def test_links_that_run_in_circles_are_followed_once(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "b" / "1.png", RED)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert ids(list_source(str(tmp_path))) == ["a/b/1.png"]


def test_a_link_to_itself_is_a_row_and_no_crash(tmp_path: Path) -> None:
    draw(tmp_path / "1.png", RED)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "nowhere.png").symlink_to("nothing.png")
    listed = {row["id"]: row["version"] for row in rows(list_source(str(tmp_path)))}
    assert listed["loop.png"] is None
    assert listed["nowhere.png"] is None
    assert listed["1.png"] is not None


def test_a_folder_that_links_reach_too_is_listed_under_its_own_name(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / f"{number % 2}real{number}" / "1.png", RED)
        (tmp_path / f"{number * 7 % 5}link{number}").symlink_to(f"{number % 2}real{number}")
    assert ids(list_source(str(tmp_path))) == sorted(f"{number % 2}real{number}/1.png" for number in range(12))


def test_names_that_are_not_utf8_do_not_crash_and_keep_ids_unique(tmp_path: Path) -> None:
    draw(tmp_path / "plain.png", RED).rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    assert ids(list_source(str(tmp_path))) == ["caf\ufffde9.png"]
    draw(tmp_path / "caf\\xe9.png", RED)
    assert read(list_source(str(tmp_path)).listing["uri"][1].as_py()) == draw(tmp_path / "red.png", RED).read_bytes()
    (tmp_path / "red.png").unlink()
    assert len(set(ids(list_source(str(tmp_path))))) == 2


def test_one_folder_has_one_name_however_it_is_spelled(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    spellings = ("photos", "photos/", "./photos", "photos/../photos", str(photos), f"{photos}//")
    assert {list_source(spelling).name for spelling in spellings} == {str(photos)}


def test_what_is_no_source_is_refused_with_its_name_and_a_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path / "nothing", "nothing", "not there")
    refused(table(tmp_path, "x", "notes.txt"), "notes.txt", ".csv")
    refused(empty, "--image", image="file")
    refused(table(tmp_path, "image\na.png\n"), "--columns", columns="{name}")


def test_a_template_reads_columns_out_of_paths(tmp_path: Path) -> None:
    draw(tmp_path / "2019" / "north.a" / "7.png", RED)
    listed = own(list_source(str(tmp_path), columns="{year}/{site}/{name}"))
    assert listed == [{"year": "2019", "site": "north.a", "name": "7"}]
    assert own(list_source(str(tmp_path), columns="{y}/{s}/{n}.png")) == [{"y": "2019", "s": "north.a", "n": "7"}]


@given(st.lists(st.text("ab1_-é.", min_size=1, max_size=4).filter(lambda s: s.strip(".")), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_template_gives_back_the_folders_it_is_made_of(parts: list[str]) -> None:
    fields = [f"f{number}" for number in range(len(parts))]
    found = folders._by_template(["/".join(parts) + ".png"], "/".join(f"{{{field}}}" for field in fields))
    assert {field: values.to_pylist() for field, values in found.items()} == {
        field: [part] for field, part in zip(fields, parts, strict=True)
    }


def test_a_template_that_does_not_fit_names_a_path(photos: Path) -> None:
    refused(photos, "{a}/{name}", "24 of 24", "test/", columns="{a}/{name}")


@pytest.mark.parametrize("template", ["{a}/{a}/{b}", "{a}/{b", "plain/text", "{1st}/{b}/{c}", "{}/{b}/{c}"])
def test_a_template_that_is_none_is_refused(photos: Path, template: str) -> None:
    refused(photos, template, columns=template)


def test_a_template_must_not_name_what_the_listing_has_already(photos: Path) -> None:
    refused(photos, "'status'", "another name", columns="{split}/{status}/{name}")
    with pytest.raises(SourceError) as caught:
        list_source(str(photos), columns="{split}/{label}/{id}")
    assert "--id" not in str(caught.value)  # which folders refuse


def test_a_csv_keeps_its_other_columns_and_their_types(tmp_path: Path) -> None:
    draw(tmp_path / "img" / "1.png", RED)
    source = list_source(str(table(tmp_path, "file,price,rate,word,on,gap\nimg/1.png,5,0.5,x,true,\n")))
    assert own(source) == [{"price": 5, "rate": 0.5, "word": "x", "on": True, "gap": None}]
    assert [str(source.listing[name].type) for name in ("price", "rate", "gap")] == ["int64", "double", "null"]
    assert rows(source)[0]["uri"] == str(tmp_path / "img" / "1.png")
    assert rows(source)[0]["version"] is not None


def test_a_parquet_table_keeps_its_other_columns_and_their_types(tmp_path: Path) -> None:
    kept = pa.table({"n": pa.array([1], pa.int16()), "day": pa.array([1], pa.date32()), "box": [[1.0, 2.0]]})
    pq.write_table(kept.add_column(0, "path", [["1.png"]]), tmp_path / "t.parquet")
    assert list_source(str(tmp_path / "t.parquet")).listing.select(kept.column_names).equals(kept)


def test_text_is_text_whoever_wrote_the_table(tmp_path: Path) -> None:
    pd.DataFrame({"image": ["1.png"], "label": ["x"]}).to_parquet(tmp_path / "pandas.parquet")
    listing = list_source(str(tmp_path / "pandas.parquet")).listing
    assert normalised(listing["label"]).type == pa.string()


def test_ids_are_text_as_written(tmp_path: Path) -> None:
    path = table(tmp_path, "image,key\na.png,007\nb.png,08\n")
    assert ids(list_source(str(path), id_column="key")) == ["007", "08"]
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "key": [7, 8]}), tmp_path / "t.parquet")
    assert ids(list_source(str(tmp_path / "t.parquet"), id_column="key")) == ["7", "8"]
    assert ids(list_source(str(path))) == ["a.png", "b.png"]


def test_an_id_column_lets_one_image_stand_in_several_rows(tmp_path: Path) -> None:
    path = table(tmp_path, "image,id\na.png,1\na.png,2\n")
    refused(path, "'id'", "--id id")
    assert ids(list_source(str(path), id_column="id")) == ["1", "2"]


def test_the_image_column_must_be_there_and_be_one(tmp_path: Path) -> None:
    refused(table(tmp_path, "front,price\na.png,5\n"), "--image", "front, price")
    refused(table(tmp_path, "image,path\na.png,b.png\n"), "--image", "image, path")
    refused(table(tmp_path, "front\na.png\n"), "'back'", "--image", "front", image="back")
    refused(table(tmp_path, "image\na.png\n"), "'key'", "--id", id_column="key")
    assert ids(list_source(str(table(tmp_path, "front\na.png\n")), image="front")) == ["a.png"]


@pytest.mark.parametrize("name", ["source", "uri", "version", "sha256", "bytes", "width", "format", "status", "error"])
def test_a_column_must_not_clash_with_the_listings_own(tmp_path: Path, name: str) -> None:
    refused(table(tmp_path, f"image,{name}\na.png,x\n"), repr(name), "table.csv", "rename")


def test_duplicate_ids_name_both_rows(tmp_path: Path) -> None:
    refused(table(tmp_path, "image\na.png\nb.png\na.png\n"), "'a.png'", "1 and 3", "--id")
    refused(table(tmp_path, "image,key\na.png,x\nb.png,\n"), "row 2", "--id", id_column="key")


def test_an_image_that_is_not_there_has_no_version(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", RED)
    path = table(tmp_path, "image,key\na.png,1\ngone.png,2\n,3\n")
    assert [row["version"] is None for row in rows(list_source(str(path), id_column="key"))] == [False, True, True]


def test_a_path_no_file_system_allows_is_a_row_and_no_crash(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a\0b.png", "x" * 5000]}), tmp_path / "t.parquet")
    for row in rows(list_source(str(tmp_path / "t.parquet"))):
        assert row["version"] is None
        with pytest.raises(ImageError) as caught:
            read(row["uri"])
        assert caught.value.code in {"missing", "unreadable"}


@pytest.mark.parametrize("content", UNLISTABLE.values(), ids=UNLISTABLE.keys())
def test_a_table_that_cannot_be_listed_says_so_in_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("odd.csv", "odd.parquet"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, name)


def test_a_limit_takes_the_first_by_id_and_says_that_there_are_more(photos: Path) -> None:
    whole = list_source(str(photos))
    some = list_source(str(photos), limit=5)
    assert ids(some) == ids(whole)[:5]
    assert (whole.whole, some.whole) == (True, False)
    assert list_source(str(photos), limit=24).whole


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_json_lines_keep_nested_columns_and_what_is_missing_is_null(tmp_path: Path, suffix: str) -> None:
    text = '{"image": "img/1.png", "box": [1, 2], "shot": {"iso": 100}}\n{"image": "b.png", "price": 2.5}\n'
    draw(tmp_path / "img" / "1.png", RED)
    source = list_source(str(table(tmp_path, text, f"table.{suffix}")))
    assert own(source) == [
        {"box": None, "shot": None, "price": 2.5},
        {"box": [1, 2], "shot": {"iso": 100}, "price": None},
    ]
    assert [row["version"] is None for row in rows(source)] == [True, False]


@pytest.mark.parametrize(
    "written", ["7", "1.10", "1000000000000000000001", '"007"', '"2026-11-21"', '"2026-11-21 10:00:00"']
)
def test_ids_in_json_lines_are_text_as_written(tmp_path: Path, written: str) -> None:
    path = table(tmp_path, f'{{"image": "a.png", "key": {written}, "n": 1}}\n', "t.jsonl")
    assert ids(list_source(str(path), id_column="key")) == [written.strip('"')]


def test_a_date_is_text_as_written_though_the_images_are_numbers(tmp_path: Path) -> None:
    path = table(tmp_path, '{"image": 10, "key": "2026-11-21"}\n{"image": 11, "key": "2026-11-22"}\n', "t.jsonl")
    listed = rows(list_source(str(path), id_column="key"))
    assert [(row["id"], Path(row["uri"]).name) for row in listed] == [("2026-11-21", "10"), ("2026-11-22", "11")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"image": "a.png"}\nno\n', b'["image"]\n', b'{"image": "\xff.png"}\n']
)
def test_json_lines_that_are_none_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.jsonl").write_bytes(content)
    refused(tmp_path / "odd.jsonl", "odd.jsonl")


def test_a_row_of_json_lines_without_an_id_is_refused_by_its_number(tmp_path: Path) -> None:
    path = table(tmp_path, '{"image": "a.png"}\n{"label": "x"}\n', "t.jsonl")
    refused(path, "row 2", "--id")


def test_a_limit_takes_the_first_ids_of_a_table_in_whatever_order_it_is(tmp_path: Path) -> None:
    path = table(tmp_path, '{"image": "b.png"}\n{"image": "c.png"}\n{"image": "a.png"}\n', "t.jsonl")
    some = list_source(str(path), limit=2)
    assert (ids(some), some.whole) == (["a.png", "b.png"], False)
