"""Bytes to an RGB image: what is decoded, how odd images are understood, and why some are not images.

The policy is part of every view's spec. Whoever changes what it does to any image raises ``revision``.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

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
MAX_PIXELS = 178_956_970
MAX_ASPECT = 100
"""Of the longer side to the shorter; transforms scale by the shorter one, which would blow up anything thinner."""

POLICY: dict[str, Any] = {
    "revision": 1,
    "orientation": "exif",
    "frame": "first",
    "alpha": "over white",
    "sixteen_bit": "grey divided by 257, colour by its high byte",
    "scale": "full",
}

TRANSIENT = frozenset({"missing", "unreadable", "out_of_memory"})
REASONS = TRANSIENT | {"empty", "not_an_image", "truncated", "broken", "too_large", "unsupported"}


def decode(data: bytes) -> Image.Image:
    """Decode an image file by `POLICY`.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, upright; ``format`` names the file format.

    Raises
    ------
    ImageError
        With one of `REASONS`, ``missing`` and ``unreadable`` aside.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
                raise ImageError("too_large", f"{image.width} x {image.height} pixels")
            image.load()
            rgb = _to_rgb(_upright(image))
            rgb.format = image.format
            return rgb
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


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = _TURNED.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Broken EXIF says nothing about the pixels: they stay as they lie in the file.
    except Exception:
        turned = None
    return image if turned is None else image.transpose(turned)


def _to_rgb(image: Image.Image) -> Image.Image:
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
