"""Bytes to an RGB image: what is decoded, how odd images are understood, and why some are not images.

The policy is part of every view's spec. Whoever changes what it does to any image raises ``revision``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from features.errors import ImageError

# fmt: off
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".sgi", ".ico", ".cur", ".icns", ".psd", ".mpo",
))
# Pillow knows more, among them formats that it hands to other programs.
FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "SGI", "ICO", "CUR",
    "ICNS", "PSD",
)
# fmt: on
MAX_MEMORY = 2**30
"""Bytes that decoding one image may take."""
LARGE = 2**27
"""From so many on, images are decoded one at a time."""
MAX_ASPECT = 100
"""Of the longer side to the shorter; transforms scale by the shorter one, which would blow up anything thinner."""

# Bytes per pixel at the peak of decoding, the file's own aside, as measured with Pillow 13: most decoders fill Pillow's
# four bytes, and turning or converting takes as many again; progressive JPEG keeps its coefficients, too.
_BYTES_PER_PIXEL = {"WEBP": 20, "JPEG2000": 20, "progressive": 14}
_OTHERS_BYTES_PER_PIXEL = 10
_STRIP = 2**22

POLICY: dict[str, Any] = {
    "revision": 1,
    "orientation": "exif",
    "frame": "first",
    "alpha": "over white",
    "sixteen_bit": "grey divided by 257, colour by its high byte",
    "scale": "full",
}
REDUCED_SIDE = 1024
REDUCED = POLICY | {"revision": 2, "scale": f"JPEG halved while its shorter side keeps {REDUCED_SIDE} pixels"}
"""For transforms that resize to a third of that at most, where what is lost is far below the rounding to bytes."""

TRANSIENT = frozenset({"missing", "unreadable", "unreachable", "timeout", "out_of_memory"})
REASONS = TRANSIENT | {"empty", "not_an_image", "truncated", "broken", "too_large", "unsupported"}


@dataclass(frozen=True)
class Decoded:
    """An image, and what its file says of it.

    Attributes
    ----------
    image : PIL.Image.Image
        Mode RGB, upright.
    width, height : int
        As the image is shown in full, in pixels.
    format : str
    """

    image: Image.Image
    width: int
    height: int
    format: str


def decode(data: bytes, large: AbstractContextManager[None] | None = None, reduced: bool = False) -> Decoded:
    """Decode an image file by `POLICY`, or by `REDUCED`.

    Parameters
    ----------
    data : bytes
        The whole file.
    large : context manager, optional
        Entered while an image is decoded that takes `LARGE` bytes or more.
    reduced : bool
        Whether by `REDUCED`: libjpeg then computes fewer pixels from the same coefficients.

    Raises
    ------
    ImageError
        With one of `REASONS`, those aside that tell of reading the file.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    with _told_as_image_error():
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        kind, (width, height) = image.format, image.size
        costs = "progressive" if "progressive" in image.info else f"{kind}"
        memory = len(data) + width * height * _BYTES_PER_PIXEL.get(costs, _OTHERS_BYTES_PER_PIXEL)
        _require_bearable(memory, width, height)
        with large if large and memory >= LARGE else nullcontext():
            drafted = reduced and isinstance(image, JpegImageFile) and image.draft(None, (REDUCED_SIDE, REDUCED_SIDE))
            image.load()
            turn = _turn(image)
            # Each copy takes the place of the last one, so that no more than two are held.
            image = image if turn is None else image.transpose(turn)
            image = _to_rgb(image)
        if not drafted:
            width, height = image.size
        elif turn in _LYING:
            width, height = height, width
        return Decoded(image, width, height, f"{kind}")


def as_file(image: Image.Image) -> bytes:
    """The bytes of a PPM file of an image's pixels: RGB and upright, as `POLICY` has it, and not compressed.

    Nothing but the pixels decides them, no library's version either, so that their SHA-256 is a key like any file's.

    Raises
    ------
    ImageError
        As `decode` does.
    """
    with _told_as_image_error():
        _require_bearable(image.width * image.height * _OTHERS_BYTES_PER_PIXEL, *image.size)
        image.load()
        turn = _turn(image)
        rgb = _to_rgb(image if turn is None else image.transpose(turn))
        return b"P6\n%d %d\n255\n" % rgb.size + rgb.tobytes()


def _require_bearable(memory: int, width: int, height: int) -> None:
    if memory > MAX_MEMORY or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("too_large", f"{width} x {height} pixels")


@contextmanager
def _told_as_image_error() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not_an_image", "no decoder knows these bytes") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except MemoryError:
        raise ImageError("out_of_memory", "decoding it needs more memory than there was") from None
    # Decoders raise whatever their parsers stumble over: struct.error, KeyError, SyntaxError, zlib.error ...
    except Exception as error:
        text = " ".join(f"{error}".split()) or type(error).__name__
        raise ImageError("truncated" if "truncated" in text.lower() else "broken", text) from None


# What undoes each value of the EXIF tag.
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = {_TURNED[value] for value in (5, 6, 7, 8)}


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNED.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Broken EXIF says nothing about the pixels: they stay as they lie in the file.
    except Exception:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        rgb.paste(_strip_to_rgb(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips these modes at 255 on conversion, which makes nearly every pixel white.
        grey = np.asarray(image.convert("I"))
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("unsupported", "grey values outside 16 bits")
        if isinstance(clear := image.info.get("transparency"), int):
            grey = np.where(grey == clear, 65535, grey)
        image = Image.fromarray(np.round(grey / np.float32(257)).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("unsupported", "floating-point pixels, whose range is not known")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
