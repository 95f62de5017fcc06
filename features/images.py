"""Bytes to an RGB image: what is decoded, how odd images are understood, and why some are not images.

The policy is part of every view's spec. Whoever changes what it does to any image raises ``revision``.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from features.errors import ImageError

# fmt: off
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".sgi", ".ico", ".cur", ".icns", ".psd", ".mpo",
))
# fmt: on
MAX_PIXELS = 178_956_970

POLICY: dict[str, Any] = {
    "revision": 1,
    "orientation": "exif",
    "frame": "first",
    "alpha": "over white",
    "sixteen_bit": "divided by 257",
    "scale": "full",
    "max_pixels": MAX_PIXELS,
}

TRANSIENT = frozenset({"missing", "unreadable"})
REASONS = TRANSIENT | {"empty", "not_an_image", "truncated", "broken", "too_large"}


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
        With ``empty``, ``not_an_image``, ``truncated``, ``broken`` or ``too_large``.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of oddities in metadata, and of images half as large as MAX_PIXELS.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
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
        raise ImageError("too_large", "decoding it ran out of memory") from None
    # Decoders raise whatever their parsers stumble over: struct.error, KeyError, SyntaxError, zlib.error ...
    except Exception as error:
        text = " ".join(f"{error}".split()) or type(error).__name__
        raise ImageError("truncated" if "truncated" in text.lower() else "broken", text) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken EXIF says nothing about the pixels: they stay as they lie in the file.
        return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips these modes at 255 on conversion, which makes nearly every pixel white.
        grey = np.clip(np.asarray(image.convert("I"), dtype=np.int64), 0, 65535)
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
