"""Answers how image bytes become RGB pixels of one fixed size, and how pixels become bytes.

Does not augment (views do) and decides nothing about bad images: it names them in a DataError.
EXIF orientation is not applied and an alpha channel is dropped, as the usual image-folder loaders do.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from krd_ray.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 2**26  # 64 Mi: more than any camera image in common sets, 192 MiB decoded
# Named formats only: Pillow's full list includes ones that start external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(data: bytes, side: int | None, *, where: str) -> Pixels:
    """RGB pixels of an encoded image: centre square, resized to `side` (bilinear, antialiased).

    The same field of view as resizing the shorter side and cropping the centre, in one step.

    Args:
        data: bytes of a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM image.
        side: pixels of the square result; None keeps the image's own size.
        where: names the image in errors, such as "shard train-00003.parquet, row 17, sample_id 4242".
    Returns:
        [side, side, 3] uint8 (with side None: [height, width, 3]), row-major, writable.
    Raises:
        DataError: the bytes are no readable 8-bit image, or it has more than MAX_PIXELS pixels.
    Example:
        >>> decode_image(encode_png(np.zeros((6, 9, 3), dtype=np.uint8)), 4, where="an example").shape
        (4, 4, 3)
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"image too large at {where}: {image.width}x{image.height} pixels, at most {MAX_PIXELS} "
                    "are "
                    "decoded; shrink it first"
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"image at {where} has more than 8 bits per channel (mode {image.mode}), which has no "
                    "safe "
                    "conversion to RGB: convert it to 8 bits first"
                )
            rgb = image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise DataError(
            f"unreadable image at {where} ({len(data)} bytes): {_reason(error)}; "
            "replace the image, or set on_bad_sample to skip"
        ) from error
    return np.array(rgb if side is None else _fit(rgb, side))


def fit_array(array: Pixels, side: int | None, *, where: str) -> Pixels:
    """Same resize and crop as `decode_image`, for pixels that are already decoded.

    Args:
        array: [H, W, 3] uint8.
        side: pixels of the square result; None keeps the size.
        where: names the image in errors.
    Returns:
        [side, side, 3] uint8; the input itself when nothing is to be done.
    Raises:
        DataError: not a non-empty [H, W, 3] uint8 array.
    Example:
        >>> fit_array(np.zeros((8, 8, 3), dtype=np.uint8), 4, where="an example").shape
        (4, 4, 3)
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise DataError(f"image at {where} must be [H, W, 3] uint8, is {list(array.shape)} {array.dtype}")
    if side is None or array.shape[:2] == (side, side):
        return array
    return np.array(_fit(Image.fromarray(np.ascontiguousarray(array)), side))


def encode_png(array: Pixels) -> bytes:
    """PNG bytes of an RGB image; lossless, the same bytes for the same pixels.

    Args:
        array: [H, W, 3] uint8.
    Returns:
        The encoded image.
    Example:
        >>> encode_png(np.zeros((2, 2, 3), dtype=np.uint8))[:4]
        b'\\x89PNG'
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_batch(images: Sequence[bytes], side: int, *, where: Callable[[int], str]) -> Pixels:
    """`decode_image` over a batch, into one array.

    Args:
        images: B encoded images.
        side: pixels of the square results.
        where: names the b-th image of the batch in errors.
    Returns:
        [B, side, side, 3] uint8.
    Raises:
        DataError: the first unreadable image, named by `where`.
    Example:
        >>> png = encode_png(np.full((4, 4, 3), 7, dtype=np.uint8))
        >>> decode_batch([png, png], 4, where=lambda b: f"image {b}").shape
        (2, 4, 4, 3)
    """
    pixels_BHWC = np.empty((len(images), side, side, 3), dtype=np.uint8)
    for b, data in enumerate(images):
        pixels_BHWC[b] = decode_image(data, side, where=where(b))
    return pixels_BHWC


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Resize of the centre square; no wide intermediate, even for a 1 x 10**7 image."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    if short == side:
        return image.crop((round(left), round(top), round(left) + side, round(top) + side))
    return image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))


def _reason(error: Exception) -> str:
    """What the decoder says, without the name of its buffer, which only says where it lay in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows"
    return f"{type(error).__name__}: {error}"
