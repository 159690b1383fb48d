# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Image processor of PIIP on torchvision, and everything that its PIL twin shares with it."""

import math
import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, requires_backends


READABLE_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA


class PiipImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    pad_size_divisor (`int`, *optional*, defaults to `self.pad_size_divisor`):
        With `do_pad` and without `pad_size`, height and width of the batch are rounded up to a multiple of this many
        pixels. 1 pads to the largest image only.
    """

    pad_size_divisor: int


def flatten_images(images, expected_ndims: int = 3) -> list:
    """Lists the single images in an image, an array of images, or any nesting of lists and tuples of these."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item, expected_ndims)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == expected_ndims + 1:
        return list(images)
    return [images]


def open_image(source: str | os.PathLike, index: int) -> PIL.Image.Image:
    """Reads a file, URL or base64 string. Keeps the mode of a file, so that alpha and 16 bits survive until later."""
    source = os.fspath(source)
    try:
        if not os.path.isfile(source):
            return load_image(source)
        with PIL.Image.open(source) as image:
            return PIL.ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports some damaged files as SyntaxError
        raise ValueError(
            f"Image {index}, {source[:200]!r}, cannot be read: it is no path, URL or base64 string of an image, or "
            f"the file is truncated or damaged ({error})."
        ) from error


def check_pil_image(image: PIL.Image.Image, index: int):
    if 0 in image.size:
        raise ValueError(f"Image {index} is empty: its (width, height) is {image.size}.")
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"Image {index} is truncated or damaged ({error}). Replace the file, or set "
            "`PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True` before opening it to use the part that can be read."
        ) from error
    if image.mode == "F":
        check_finite(np.asarray(image), index)


def check_array(image: np.ndarray | torch.Tensor, index: int, input_data_format, any_channel_count: bool):
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray) and image.dtype.kind not in "buif":
        raise TypeError(f"Image {index} is an array of dtype {image.dtype}: expected integer or float pixels.")
    if len(shape) not in (2, 3):
        raise ValueError(
            f"Image {index} has shape {shape}: expected (height, width), (channels, height, width) or "
            "(height, width, channels)."
        )
    if 0 in shape:
        raise ValueError(f"Image {index} is empty: its shape is {shape}.")
    if len(shape) == 3 and not any_channel_count:
        check_channel_count(shape, index, input_data_format)
    check_finite(image, index)


def check_channel_count(shape: tuple[int, ...], index: int, input_data_format):
    places = {"first": shape[0], "last": shape[-1]}
    if input_data_format is not None:
        place = "first" if ChannelDimension(input_data_format) == ChannelDimension.FIRST else "last"
        places = {place: places[place]}
    if not any(channels in READABLE_CHANNEL_COUNTS for channels in places.values()):
        raise ValueError(
            f"Image {index} has shape {shape}: expected 1 (grey), 3 (RGB) or 4 (RGBA) channels in the "
            f"{' or '.join(places)} dimension. Select three channels; for a model with another `num_channels` pass "
            "`do_convert_rgb=False`, `input_data_format`, and one `image_mean` and `image_std` per channel."
        )


def check_finite(image: np.ndarray | torch.Tensor, index: int):
    is_finite = torch.isfinite(image) if isinstance(image, torch.Tensor) else np.isfinite(image)
    if not is_finite.all():
        raise ValueError(
            f"Image {index} has NaN or infinite pixels. Replace them, for example with `nan_to_num` of NumPy or torch."
        )


def read_image(image, index: int, input_data_format, any_channel_count: bool):
    """Opens a path or URL and refuses, by the image's place in the batch, whatever cannot be processed."""
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image, index)
    if isinstance(image, PIL.Image.Image):
        check_pil_image(image, index)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        check_array(image, index, input_data_format, any_channel_count)
    else:
        raise TypeError(
            f"Image {index} is a {type(image).__name__}: expected a PIL image, a NumPy array, a torch tensor, or the "
            "path or URL of an image."
        )
    return image


def pil_image_to_array(image: PIL.Image.Image) -> np.ndarray:
    """(height, width, 3) or, where the image has transparency, (height, width, 4) in 8 bits."""
    if image.mode.startswith("I"):
        image = reduce_to_8_bits(image)
    has_transparency = "A" in image.getbands() or "transparency" in image.info
    return np.array(image.convert("RGBA" if has_transparency else "RGB"))


def reduce_to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Keeps the high byte of 16-bit grey, as Pillow does for 16-bit colour; its own grey conversion clips at 255."""
    pixels = np.array(image)
    # Older Pillow versions open 16-bit PNG files as "I", which may also hold 8-bit values.
    if image.mode == "I" and pixels.max() <= 255:
        return image
    return PIL.Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))


def composite_on_white(image: torch.Tensor) -> torch.Tensor:
    """(4, height, width) -> (3, height, width)"""
    if not image.is_floating_point():
        alpha = image[3:] / 255
        return (image[:3] * alpha + 255 * (1 - alpha)).round().to(image.dtype)
    if image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"RGBA images of {image.dtype} must be from 0 to 1, got {image.min():g} to {image.max():g}: pass 0 to 255 "
            "as uint8, or drop the fourth channel."
        )
    return image[:3] * image[3:] + 1 - image[3:]


def convert_array_to_rgb(image: torch.Tensor) -> torch.Tensor:
    """(channels, height, width) -> (3, height, width)"""
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    return composite_on_white(image) if image.shape[0] == 4 else image


def get_pad_size(images: list, pad_size_divisor: int) -> SizeDict:
    """Size of the smallest canvas that holds every (channels, height, width) image and suits the divisor."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return SizeDict(
        height=math.ceil(height / pad_size_divisor) * pad_size_divisor,
        width=math.ceil(width / pad_size_divisor) * pad_size_divisor,
    )


def center_on_black(image: np.ndarray | torch.Tensor, size: SizeDict) -> np.ndarray | torch.Tensor:
    height, width = image.shape[-2:]
    shape = (*image.shape[:-2], size.height, size.width)
    canvas = image.new_zeros(shape) if isinstance(image, torch.Tensor) else np.zeros_like(image, shape=shape)
    top, left = (size.height - height) // 2, (size.width - width) // 2
    canvas[..., top : top + height, left : left + width] = image
    return canvas


class PiipImageProcessorMixin:
    """Defaults, input checks, RGB conversion, padding and saving: what the torchvision and PIL processors share."""

    valid_kwargs = PiipImageProcessorKwargs
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 368}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 368, "width": 368}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = False
    pad_size_divisor = 1

    @staticmethod
    def backend_classes() -> dict[str, type]:
        """
        The processor class of each backend. The import waits for the call because the two files need each other; it
        is also why `save_pretrained` of either class copies both files.
        """
        from .image_processing_pil_piip import PiipImageProcessorPil

        return {"torchvision": PiipImageProcessor, "pil": PiipImageProcessorPil}

    def to_dict(self) -> dict:
        """As for any image processor, but a saved folder names the classes of both backends."""
        output = super().to_dict()
        backend_classes = self.backend_classes()
        if "auto_map" in output and type(self) in backend_classes.values():
            output["auto_map"]["AutoImageProcessor"] = {
                backend: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for backend, cls in backend_classes.items()
            }
        return output

    def _validate_preprocess_kwargs(self, pad_size_divisor: int = 1, **kwargs):
        if pad_size_divisor < 1:
            raise ValueError(f"`pad_size_divisor` must be at least 1 pixel, got {pad_size_divisor}.")
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(
        self,
        images: ImageInput,
        expected_ndims: int = 3,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> list:
        images = flatten_images(images, expected_ndims)
        if not images:
            raise ValueError("Got an empty batch of images: pass at least one image.")
        any_channel_count = not do_convert_rgb and input_data_format is not None
        images = [read_image(image, i, input_data_format, any_channel_count) for i, image in enumerate(images)]
        return [
            self.process_image(image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs)
            for image in images
        ]

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ):
        """Turns one image into the channels-first array of the backend. RGB conversion is the same for both."""
        if isinstance(image, PIL.Image.Image):
            image = pil_image_to_array(image) if do_convert_rgb else np.array(image)
            input_data_format = ChannelDimension.LAST
        if isinstance(image, np.ndarray):
            # Flipped and read-only views are copied: torch cannot hold the former and warns about the latter.
            image = torch.from_numpy(np.require(image, requirements=["C", "W"]))

        if image.ndim == 2:
            image, input_data_format = image[None], ChannelDimension.FIRST
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(image, READABLE_CHANNEL_COUNTS)
        if input_data_format == ChannelDimension.LAST:
            image = image.permute(2, 0, 1)
        if do_convert_rgb:
            image = convert_array_to_rgb(image)
        return super().process_image(image, do_convert_rgb=False, input_data_format=ChannelDimension.FIRST, **kwargs)

    def center_crop(self, image: np.ndarray | torch.Tensor, size: SizeDict, **kwargs) -> np.ndarray | torch.Tensor:
        """
        Crops as `CenterCrop` of torchvision does in the official evaluation. The backends of Transformers round odd
        margins otherwise, and not alike.
        """
        if size.height is None or size.width is None:
            raise ValueError(f"`crop_size` must have the keys 'height' and 'width', got {dict(size)}.")
        height, width = image.shape[-2:]
        top, left = max(round((height - size.height) / 2), 0), max(round((width - size.width) / 2), 0)
        image = image[..., top : top + size.height, left : left + size.width]
        return image if image.shape[-2:] == (size.height, size.width) else center_on_black(image, size)

    def _preprocess(
        self,
        images: list,
        do_pad: bool,
        pad_size: SizeDict | None,
        pad_size_divisor: int,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        features = super()._preprocess(images, do_pad=False, pad_size=None, return_tensors=None, **kwargs)
        pixel_values = features["pixel_values"]
        if do_pad:
            if pad_size is None:
                pad_size = get_pad_size(pixel_values, pad_size_divisor)
            pixel_values = self.pad(pixel_values, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


class PiipImageProcessor(PiipImageProcessorMixin, TorchvisionBackend):
    r"""
    Constructs a PIIP image processor that works on tensors with torchvision, on CPU or GPU.
    [`PiipImageProcessorPil`] is its twin on NumPy and Pillow.

    The defaults are the official evaluation of PIIP-TSB 368/192/128 on ImageNet: bicubic resize of the shorter side
    to the input size (crop ratio 1), center crop, ImageNet statistics. The model makes the smaller copies of the
    pyramid itself, so images are processed once, at the highest resolution of the pyramid.

    Images may be PIL images of any mode, NumPy arrays or torch tensors (grey, RGB or RGBA; channels first or last),
    paths or URLs, one at a time, in lists, or stacked. The first image that cannot be used is named in an error.

    Args:
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to convert images to three channels: grey is repeated, transparency is laid on white, palettes
            are resolved, 16-bit PIL images keep their high byte.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize images to `size`.
        size (`int`, `tuple[int, int]` or `dict[str, int]`, *optional*, defaults to `{"shortest_edge": 368}`):
            Size in pixels after resizing. `{"shortest_edge": s}` (also a single number) keeps the aspect ratio,
            `{"shortest_edge": s, "longest_edge": l}` does so without exceeding `l`, `{"height": h, "width": w}`
            (also a tuple) does not keep it. Change `crop_size` as well, or switch `do_center_crop` off.
        default_to_square (`bool`, *optional*, defaults to `False`):
            Whether a single number as `size` means a square instead of the shorter side.
        resample (`PILImageResampling` or `int`, *optional*, defaults to `PILImageResampling.BICUBIC`):
            Filter of the resize.
        do_center_crop (`bool`, *optional*, defaults to `True`):
            Whether to cut `crop_size` out of the middle; images that are smaller are filled up with black.
        crop_size (`int` or `dict[str, int]`, *optional*, defaults to `{"height": 368, "width": 368}`):
            Size in pixels of the center crop.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply pixels by `rescale_factor`. Switch it off for images that are from 0 to 1 already.
        rescale_factor (`float`, *optional*, defaults to 1/255):
            Factor that brings pixels from 0...255 to 0...1.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`float` or `list[float]`, *optional*, defaults to `[0.485, 0.456, 0.406]`):
            Mean per channel, in units of rescaled pixels.
        image_std (`float` or `list[float]`, *optional*, defaults to `[0.229, 0.224, 0.225]`):
            Standard deviation per channel, in units of rescaled pixels.
        do_pad (`bool`, *optional*, defaults to `False`):
            Whether to pad the normalized images with zeros at the right and bottom to one size.
        pad_size (`int` or `dict[str, int]`, *optional*):
            Size in pixels that `do_pad` pads to. By default the largest height and width of the batch, rounded up to
            `pad_size_divisor`.
        pad_size_divisor (`int`, *optional*, defaults to 1):
            Height and width of a padded batch are multiples of this many pixels.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_piip import PiipImageProcessor

    >>> image_processor = PiipImageProcessor()
    >>> image_processor(np.zeros((480, 640, 3), dtype=np.uint8), return_tensors="pt").pixel_values.shape
    torch.Size([1, 3, 368, 368])
    ```"""

    def __init__(self, **kwargs: Unpack[PiipImageProcessorKwargs]):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)


PiipImageProcessor.register_for_auto_class("AutoImageProcessor")


__all__ = ["PiipImageProcessor"]
