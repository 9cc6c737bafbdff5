"""Pictures from rows to the tensors that a vision model takes."""

from __future__ import annotations

import io
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import DataError

LUMA = (0.299, 0.587, 0.114)


def pixels(images: SequenceOf[Any], config: Any = None, processor: Any = None) -> Tensor:
    """[n, channels, height, width] float: in [0, 1], resized to the model's size, then normalised as the processor says.

    An image is an array (uint8, or floats where 1 is white) of height x width or height x width x channels, nested lists, a PIL
    image, a file path, or what the `datasets` library gives ({bytes, path}). Without a processor, mean and deviation are 0.5."""
    config = getattr(config, "vision_config", config)
    channels = int(getattr(config, "num_channels", 3) or 3)
    mean, std = _moments(processor, channels)
    made = [_channels(_array(image), channels) for image in images]
    if not made:
        raise DataError("There are no images.")
    size = _size(config, processor) or tuple(made[0].shape[1:])
    resized = torch.stack([_resized(image, size, processor) for image in made])
    return (resized - mean) / std


def _array(image: Any) -> np.ndarray:
    """The picture as height x width (x channels) floats in which 1 is white."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, (str, Path, io.BytesIO)):
        image = _opened(image)
    if hasattr(image, "convert"):
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if values.ndim not in (2, 3) or values.dtype == object:
        raise DataError(f"An image must be height x width or height x width x channels; one has the shape {values.shape}.")
    if values.dtype.kind in "iu" and (values.dtype == np.uint8 or values.max(initial=0) > 1):
        return values.astype(np.float32) / 255
    values = values.astype(np.float32)
    if not np.isfinite(values).all() or (values.size and (values.max() > 4 or values.min() < -4)):
        raise DataError("An image of floats must be in units where 0 is black and 1 is white; divide it by its largest possible value.")
    return values


def _opened(source: Any) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("Image files need Pillow; install it with `pip install pillow`.") from error
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"The image {source if isinstance(source, (str, Path)) else 'of a row'} cannot be read: {error}.") from error


def _channels(values: np.ndarray, channels: int) -> Tensor:
    """channels x height x width; gray is repeated, colour is weighed to gray, transparency is dropped."""
    image = torch.from_numpy(np.ascontiguousarray(values))
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if image.shape[0] == 4:
        image = image[:3]
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 1:
        return image.expand(channels, -1, -1)
    if channels == 1 and image.shape[0] == 3:
        return (image * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
    raise DataError(f"An image has {image.shape[0]} channels (shape {tuple(values.shape)}, channels last); the model takes {channels}.")


def _moments(processor: Any, channels: int) -> tuple[Tensor, Tensor]:
    processor = getattr(processor, "image_processor", processor)
    known = getattr(processor, "image_mean", None) is not None
    if known and not getattr(processor, "do_normalize", True):
        return torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    mean = list(np.ravel(processor.image_mean)) if known else [0.5]
    std = list(np.ravel(processor.image_std)) if known else [0.5]
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    return torch.tensor(mean, dtype=torch.float32)[:, None, None], torch.tensor(std, dtype=torch.float32)[:, None, None]


def _size(config: Any, processor: Any) -> tuple[int, int] | None:
    """Height and width that the model takes, where it states any."""
    processor = getattr(processor, "image_processor", processor)
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = getattr(config, "image_size", None) or crop or getattr(processor, "size", None)
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if hasattr(size, "get"):
        edge = size.get("shortest_edge") or 0
        return int(size.get("height") or edge), int(size.get("width") or edge)
    return int(size[0]), int(size[1])


def _resized(image: Tensor, size: tuple[int, ...], processor: Any) -> Tensor:
    """Antialiased resizing by the processor's filter; where it crops, the shorter edge is fitted and the centre kept."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    processor = getattr(processor, "image_processor", processor)
    mode = "bicubic" if int(getattr(processor, "resample", None) or 2) == 3 else "bilinear"
    target = size
    if getattr(processor, "do_center_crop", False):
        scale = max(size[0] / image.shape[1], size[1] / image.shape[2])
        target = (max(size[0], round(image.shape[1] * scale)), max(size[1], round(image.shape[2] * scale)))
    found = F.interpolate(image[None], size=target, mode=mode, antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return found[:, top : top + size[0], left : left + size[1]]
