from __future__ import annotations

import csv
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from features import images
from features.errors import ImageError

UPRIGHT = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
# How a file of each EXIF orientation stores the upright picture.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}
SEEDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "SGI", "JPEG2000")
PLACES = st.integers(0, 40) | st.integers(0, 2**12)  # headers are where parsers stumble


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def pixels(data: bytes) -> Any:
    image = images.decode(data).image
    assert image.mode == "RGB"
    return np.asarray(image)


def code_of(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(data)
    assert caught.value.code in images.REASONS
    assert str(caught.value).startswith(f"{caught.value.code}: ")
    assert "\n" not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    assert np.array_equal(pixels(encoded(stored, form, exif=exif)), UPRIGHT)


@pytest.mark.parametrize(
    "neighbour",
    [
        pytest.param((0x8825, 4, 1, struct.pack("<I", 9999)), id="a GPS block outside the file"),
        pytest.param((0x9999, 77, 2, bytes(4)), id="a tag of no known type"),
        pytest.param((0x0128, 2, 2, b"2\0\0\0"), id="a resolution unit typed as text"),
    ],
)
def test_a_broken_exif_tag_does_not_hide_a_readable_orientation(neighbour: tuple[int, int, int, bytes]) -> None:
    tags = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), neighbour]
    block = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + block + bytes(4)
    assert images.decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).image.size == (2, 4)


def test_exif_that_tells_no_orientation_leaves_the_pixels_as_they_lie() -> None:
    exif = Image.Exif()
    for orientation in (0, 9, 65535):
        exif[0x0112] = orientation
        assert np.array_equal(pixels(encoded(Image.fromarray(UPRIGHT), exif=exif)), UPRIGHT)
    assert np.array_equal(pixels(encoded(Image.fromarray(UPRIGHT), exif=b"Exif\0\0garbage")), UPRIGHT)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 102), (153, 153, 153)),
    ],
)
def test_alpha_is_laid_over_white(mode: str, colour: tuple[int, ...], shown: tuple[int, int, int]) -> None:
    assert np.abs(pixels(encoded(Image.new(mode, (2, 2), colour)))[0, 0].astype(int) - shown).max() <= 1


def test_the_transparent_entry_of_a_palette_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        assert pixels(encoded(image, form, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3)), ("1", 0)])
def test_a_transparent_colour_without_alpha_is_white(mode: str, colour: Any) -> None:
    assert (pixels(encoded(Image.new(mode, (2, 2), colour), transparency=colour)) == 255).all()


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=64), st.sampled_from(["PNG", "TIFF", "PPM"]))
@settings(max_examples=60, deadline=None)
def test_sixteen_bit_grey_is_divided_by_257(values: list[int], form: str) -> None:
    deep = np.array([values], np.uint16)
    shown = pixels(encoded(Image.fromarray(deep), form))
    assert np.array_equal(shown, np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, axis=2))


def test_pixels_of_no_known_range_are_unsupported_rather_than_guessed() -> None:
    assert code_of(encoded(Image.new("F", (2, 2), 0.5), "TIFF")) == "unsupported"
    assert code_of(encoded(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_ink_becomes_light(form: str) -> None:
    options = {"quality": 100} if form == "JPEG" else {}
    shown = pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), form, **options))
    assert np.abs(shown[4, 4].astype(int) - (255, 0, 0)).max() <= 3


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for form in ("PNG", "TIFF", "BMP"):
        assert pixels(encoded(image, form)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    shown = pixels(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert (shown == (255, 0, 0)).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_the_format_is_told(form: str) -> None:
    assert images.decode(encoded(Image.new("RGB", (4, 4)), form)).format == form


def test_what_cannot_be_decoded_says_why() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert code_of(b"") == "empty"
    assert code_of(b"<html>404 not found</html>") == "not_an_image"
    assert code_of(encoded(noise, "JPEG")[:-900]) == "truncated"
    assert code_of(encoded(noise)[:200]) in {"truncated", "broken"}


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("size", [(20_000, 20_000), (65_535, 2_731), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_too_large_whatever_limit_pillow_was_set(
    size: tuple[int, int], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = struct.pack(">II", *size)
    crc = struct.pack(">I", zlib.crc32(bomb[12:29]))
    assert code_of(bytes(bomb[:29] + crc + bomb[33:])) == "too_large"


def test_postscript_is_no_image_because_reading_it_would_run_another_program() -> None:
    assert code_of(encoded(Image.new("RGB", (4, 4)), "EPS")) == "not_an_image"


def test_decoding_in_threads_leaves_the_warnings_of_the_process_alone() -> None:
    data = encoded(Image.effect_noise((64, 64), 50))
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(images.decode, [data] * 1000))
        assert warnings.filters == before


def test_a_strip_that_scaling_would_blow_up_is_too_large() -> None:
    assert code_of(encoded(Image.new("RGB", (1, 5000)))) == "too_large"


@given(st.sampled_from(SEEDS), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_decode_or_say_one_of_the_reasons(form: str, data: st.DataObject) -> None:
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    mutated = bytearray(encoded(image, form))
    for place, value in data.draw(st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=8)):
        mutated[place % len(mutated)] = value
    cut = data.draw(st.integers(0, len(mutated)))
    try:
        assert images.decode(bytes(mutated[: cut or None])).image.mode == "RGB"
    except ImageError as error:
        assert error.code in images.REASONS


def test_odd_images_decode_where_pillow_decodes_them_and_fail_with_a_reason_elsewhere(testdata: Path) -> None:
    folder = testdata / "odd_images"
    with (folder / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["bytes"]) < 100_000]
    assert len(rows) > 100
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        # The manifest says ok of two files that Pillow only opens once it has failed on them.
        if row["pil_status"] != "ok" or row["exif_orientation"].startswith("exif:"):
            assert code_of(data) in images.REASONS - images.TRANSIENT, row["file"]
            continue
        decoded = images.decode(data)
        width, height = (int(side) for side in row["size"].split("x"))
        # The manifest's sizes are as they lie in the file, save for TIFF, which Pillow turns as it loads it.
        turned = row["exif_orientation"] in set("5678") and row["pil_format"] != "TIFF"
        assert (decoded.image.mode, decoded.format) == ("RGB", row["pil_format"]), row["file"]
        shown = (height, width) if turned else (width, height)
        assert decoded.image.size == (decoded.width, decoded.height) == shown, row["file"]
        reduced = images.decode(data, reduced=True)
        assert (reduced.width, reduced.height, reduced.format) == (*shown, decoded.format)
        assert min(reduced.image.size) >= min(1024, *shown)


@pytest.mark.parametrize("family", ["exifr__test_{}.jpg", "pil__hopper_orientation_{}.jpg"])
def test_one_photograph_in_all_orientations_is_one_picture(testdata: Path, family: str) -> None:
    found = [testdata / "odd_images" / family.format(number) for number in range(1, 9)]
    shown = [pixels(path.read_bytes()).astype(int) for path in found if path.exists()]
    assert len(shown) >= 7
    for other in shown[1:]:
        assert other.shape == shown[0].shape
        assert np.abs(other - shown[0]).mean() < 12
