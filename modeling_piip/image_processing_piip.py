# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Image processor of PIIP on torchvision, and everything that its PIL twin shares with it."""

import math
import operator
import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
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
from transformers.utils import TensorType, logging, requires_backends


logger = logging.get_logger(__name__)

READABLE_CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA
IGNORED_LABEL = 255  # pixels of segmentation maps that have no class


class PiipImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    pad_size_divisor (`int`, *optional*, defaults to `self.pad_size_divisor`):
        With `do_pad` and without `pad_size`, height and width of the batch are rounded up to a multiple of this many
        pixels. 1 pads to the largest image only.
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether id 0 of segmentation maps means that a pixel has no class, as in ADE20K: 0 becomes 255, which the loss
        ignores, and every other id one less.
    """

    pad_size_divisor: int
    do_reduce_labels: bool


def flatten_images(images, expected_ndims: int = 3) -> list:
    """Lists the single images in an image, an array of images, or any nesting of lists and tuples of these."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item, expected_ndims)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == expected_ndims + 1:
        return list(images)
    return [images]


def open_image(source: str | os.PathLike, name: str) -> PIL.Image.Image:
    """Reads a file, URL or base64 string. Keeps the mode of a file, so that alpha and 16 bits survive until later."""
    source = os.fspath(source)
    try:
        if not os.path.isfile(source):
            return load_image(source)
        with PIL.Image.open(source) as image:
            return PIL.ImageOps.exif_transpose(image)
    # Pillow reports some damaged files as SyntaxError, and too many pixels as an error of no other kind
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}, {source[:200]!r}, cannot be read: it is no path, URL or base64 string of an image, or "
            f"the file is truncated, damaged or too large ({error})."
        ) from error


def check_pil_image(image: PIL.Image.Image, name: str):
    if 0 in image.size:
        raise ValueError(f"{name} is empty: its (width, height) is {image.size}.")
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{name} is truncated or damaged ({error}). Replace the file, or set "
            "`PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True` before opening it to use the part that can be read."
        ) from error
    if image.mode == "F":
        check_finite(np.asarray(image), name)


def check_array(image: np.ndarray | torch.Tensor, name: str, input_data_format, any_channel_count: bool):
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray) and image.dtype.kind not in "buif":
        raise TypeError(f"{name} is an array of dtype {image.dtype}: expected integer or float pixels.")
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{name} has shape {shape}: expected (height, width), (channels, height, width) or "
            "(height, width, channels)."
        )
    if 0 in shape:
        raise ValueError(f"{name} is empty: its shape is {shape}.")
    if len(shape) == 3 and not any_channel_count:
        check_channel_count(shape, name, input_data_format)
    check_finite(image, name)


def check_channel_count(shape: tuple[int, ...], name: str, input_data_format):
    places = {"first": shape[0], "last": shape[-1]}
    if input_data_format is not None:
        place = "first" if ChannelDimension(input_data_format) == ChannelDimension.FIRST else "last"
        places = {place: places[place]}
    if not any(channels in READABLE_CHANNEL_COUNTS for channels in places.values()):
        raise ValueError(
            f"{name} has shape {shape}: expected 1 (grey), 3 (RGB) or 4 (RGBA) channels in the "
            f"{' or '.join(places)} dimension. Select three channels; for a model with another `num_channels` pass "
            "`do_convert_rgb=False`, `input_data_format`, and one `image_mean` and `image_std` per channel."
        )


def check_finite(image: np.ndarray | torch.Tensor, name: str):
    is_finite = torch.isfinite(image) if isinstance(image, torch.Tensor) else np.isfinite(image)
    if not is_finite.all():
        raise ValueError(
            f"{name} has NaN or infinite pixels. Replace them, for example with `nan_to_num` of NumPy or torch."
        )


def read_image(image, name: str, input_data_format, any_channel_count: bool):
    """Opens a path or URL and refuses, by the name it is given, whatever cannot be processed."""
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image, name)
    if isinstance(image, PIL.Image.Image):
        check_pil_image(image, name)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        check_array(image, name, input_data_format, any_channel_count)
    else:
        raise TypeError(
            f"{name} is a {type(image).__name__}: expected a PIL image, a NumPy array, a torch tensor, or the "
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


def get_resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """
    Height and width of an image after resizing. With a limit on the longer side, sides are rounded to whole pixels as
    in the official detection and segmentation; without one, they are cut as in torchvision and so in the official
    classification.
    """
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge:
        raise ValueError(
            "`size` must have the keys 'height' and 'width', 'shortest_edge', or 'shortest_edge' and 'longest_edge', "
            f"got {dict(size)}."
        )
    if size.longest_edge:
        factor = min(size.longest_edge / max(height, width), size.shortest_edge / min(height, width))
        return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)
    short = min(height, width)
    return int(size.shortest_edge * height / short), int(size.shortest_edge * width / short)


def center_on_canvas(image: np.ndarray | torch.Tensor, size: SizeDict, value: int) -> np.ndarray | torch.Tensor:
    """Surrounds the image with pixels of `value`."""
    height, width = image.shape[-2:]
    shape = (*image.shape[:-2], size.height, size.width)
    if isinstance(image, torch.Tensor):
        canvas = image.new_full(shape, value)
    else:
        canvas = np.full_like(image, value, shape=shape)
    top, left = (size.height - height) // 2, (size.width - width) // 2
    canvas[..., top : top + height, left : left + width] = image
    return canvas


def read_segmentation_map(source, name: str) -> np.ndarray:
    """(height, width) class ids in 64 bits from a path, URL, PIL image, array or tensor with one channel."""
    if isinstance(source, (str, os.PathLike)):
        source = open_image(source, name)
    if isinstance(source, PIL.Image.Image):
        check_pil_image(source, name)
        if len(source.getbands()) > 1:
            raise ValueError(
                f"{name} has the mode {source.mode}: expected one channel that holds class ids (such as mode L, P or "
                "I;16). Convert colours to class ids first."
            )
    class_ids = source.cpu().numpy() if isinstance(source, torch.Tensor) else np.asarray(source)
    if class_ids.ndim == 3 and class_ids.shape[0] == 1:
        class_ids = class_ids[0]
    if class_ids.ndim != 2 or class_ids.dtype.kind not in "bui":
        raise ValueError(
            f"{name} has shape {class_ids.shape} and dtype {class_ids.dtype}: expected integer class ids of shape "
            "(height, width)."
        )
    return class_ids.astype(np.int64)


def reduce_labels(segmentation_map: np.ndarray) -> np.ndarray:
    """0 and 255 -> 255, `k` -> `k - 1`"""
    without_class = (segmentation_map == 0) | (segmentation_map == IGNORED_LABEL)
    return np.where(without_class, IGNORED_LABEL, segmentation_map - 1)


def resize_segmentation_map(segmentation_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """Takes the nearest pixel, as Pillow and the mode "nearest-exact" of torch do."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)  # the center of a new pixel on the old grid
        for new, old in zip((height, width), segmentation_map.shape, strict=True)
    )
    return segmentation_map[rows[:, None], columns]


def read_objects(annotation: dict, name: str, height: int, width: int) -> tuple[list[dict], int]:
    """
    The objects of an image in COCO format with their boxes clipped to the image, and how many were dropped because
    nothing of their box lies in it. Crowds are not objects and left out, as in the official training.

    Raises:
        ValueError: If the annotation is broken; the message starts with `name`.
    """
    try:
        image_id, items = operator.index(annotation["image_id"]), list(annotation["annotations"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name} must be a dictionary with 'image_id', a whole number, and 'annotations', the list of the objects "
            f"of one image in COCO format; got {str(annotation)[:200]}."
        ) from error
    for k, item in enumerate(items):
        check_object(item, f"{name} (image_id {image_id}): object {k}")
    objects = [item for item in items if not item.get("iscrowd", 0)]
    clipped = [item | {"bbox": clip_box(item["bbox"], height, width)} for item in objects]
    kept = [item for item in clipped if min(item["bbox"][2:]) > 0]
    return kept, len(clipped) - len(kept)


def check_object(item: dict, name: str):
    try:
        box = [float(number) for number in item["bbox"]]
        class_id = operator.index(item["category_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} needs a 'bbox' of four numbers and a whole number as 'category_id', got {str(item)[:200]}."
        ) from error
    if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
        raise ValueError(
            f"{name} has the bbox {box}: expected (x, y, width, height) in pixels, with a width and height that are "
            "not negative. Convert corners (x1, y1, x2, y2) first."
        )
    if class_id < 0:
        raise ValueError(f"{name} has the category_id {class_id}: expected class ids from 0 on.")


def clip_box(box: list[float], height: int, width: int) -> list[float]:
    """The part of a box (x, y, width, height) that lies in the image; sizes are zero where there is none."""
    x, y, box_width, box_height = (float(number) for number in box)
    left, right = min(max(x, 0), width), min(max(x + box_width, 0), width)
    top, bottom = min(max(y, 0), height), min(max(y + box_height, 0), height)
    return [left, top, right - left, bottom - top]


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
    do_reduce_labels = False

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

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        annotations: dict | list[dict] | None = None,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Prepares images for the model, and segmentation maps or annotated objects for its loss.

        Args:
            images (`ImageInput`):
                Images as the class describes them.
            segmentation_maps (`ImageInput`, *optional*):
                One map of class ids per image, of the same height and width: PIL images with one channel (palette
                images count by their indices), integer arrays or tensors, paths or URLs.
            annotations (`dict` or `list[dict]`, *optional*):
                The objects of every image in COCO format: `{"image_id": 17, "annotations": [...]}`, where each object
                has a `bbox` (x, y, width, height) in pixels, a `category_id`, which is the class id of the model, and
                optionally `area` and `iscrowd`. Boxes are clipped to the image; those of which nothing is left are
                dropped with a warning, crowds without.
            kwargs:
                Options of the class, for this call.

        Returns:
            `BatchFeature`: `pixel_values` of shape `(batch_size, num_channels, height, width)`; with `do_pad` also
            `pixel_mask` of shape `(batch_size, height, width)`: 1 for pixels of the image, 0 for padding.

            With `segmentation_maps`, `labels` of shape `(batch_size, height, width)`. They went through the same steps
            as the images, to the nearest pixel; what padding and crop added is 255.

            With `annotations`, `labels` is a list of one dictionary per image: `class_labels` of shape
            `(num_objects,)`; `boxes` of shape `(num_objects, 4)`, (center x, center y, width, height) relative to the
            image without its padding; `area` in pixels of the resized image and `iscrowd` (always 0), both of shape
            `(num_objects,)`; `image_id`; `orig_size` and `size`, height and width before and after the resize.

        Raises:
            ValueError: If an image, a map or an annotation cannot be used; the message names its place.
        """
        return super().preprocess(images, segmentation_maps, annotations, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        annotations: dict | list[dict] | None,
        return_tensors: str | TensorType | None,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> BatchFeature:
        if segmentation_maps is not None and annotations is not None:
            raise ValueError("`segmentation_maps` and `annotations` are labels of different models: pass one of them.")
        images = self._prepare_image_like_inputs(images, **kwargs)
        features = self._preprocess(images, return_tensors=None, **kwargs)
        sizes = [tuple(image.shape[-2:]) for image in images]
        if annotations is not None:
            labels = self.process_annotations(annotations, sizes, **kwargs)
            as_tensors = return_tensors == TensorType.PYTORCH or (not return_tensors and self.backend == "torchvision")
            features["labels"] = [
                {key: torch.from_numpy(value) if as_tensors else value for key, value in label.items()}
                for label in labels
            ]
        if segmentation_maps is not None:
            new_sizes = [tuple(image.shape[-2:]) for image in features["pixel_values"]]
            features["labels"] = self.process_segmentation_maps(segmentation_maps, sizes, new_sizes, **kwargs)
        return features.convert_to_tensors(return_tensors)

    def process_annotations(
        self,
        annotations: dict | list[dict],
        sizes: list[tuple[int, int]],
        do_resize: bool,
        size: SizeDict,
        do_center_crop: bool,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> list[dict[str, np.ndarray]]:
        """Labels for images that had `sizes`."""
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if len(annotations) != len(sizes):
            raise ValueError(f"Got {len(annotations)} annotations for {len(sizes)} images: pass one per image.")
        if do_center_crop:
            raise ValueError("A center crop could cut objects off: set `do_center_crop=False` to use `annotations`.")
        labels, num_dropped = [], 0
        for index, (annotation, image_size) in enumerate(zip(annotations, sizes, strict=True)):
            objects, dropped = read_objects(annotation, f"Annotation {index}", *image_size)
            num_dropped += dropped
            new_size = get_resized_size(*image_size, size) if do_resize else image_size
            label = self.process_objects(objects, image_size, new_size)
            labels.append({"image_id": np.array([annotation["image_id"]])} | label)
        if num_dropped:
            logger.warning("Dropped %d boxes without any area inside their image.", num_dropped)
        return labels

    def process_objects(
        self, objects: list[dict], size: tuple[int, int], new_size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """Labels of the objects of an image that had `size` and has `new_size` without its padding."""
        (height, width), (new_height, new_width) = size, new_size
        boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)
        areas = [item.get("area", box[2] * box[3]) for item, box in zip(objects, boxes, strict=True)]
        boxes[:, :2] += boxes[:, 2:] / 2
        return {
            "class_labels": np.array([item["category_id"] for item in objects], dtype=np.int64),
            "boxes": (boxes / (width, height, width, height)).astype(np.float32),
            "area": np.array(areas, dtype=np.float32) * (new_height / height * new_width / width),
            "iscrowd": np.zeros(len(objects), dtype=np.int64),
            "orig_size": np.array(size),
            "size": np.array(new_size),
        }

    def process_segmentation_maps(
        self,
        segmentation_maps: ImageInput,
        sizes: list[tuple[int, int]],
        new_sizes: list[tuple[int, int]],
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> list:
        """Maps for images that had `sizes` and have `new_sizes`, in the backend's type of array."""
        segmentation_maps = flatten_images(segmentation_maps, expected_ndims=2)
        if len(segmentation_maps) != len(sizes):
            raise ValueError(
                f"Got {len(segmentation_maps)} segmentation maps for {len(sizes)} images: pass one map of class ids "
                "of shape (height, width) per image. Maps of colours must be converted to class ids."
            )
        labels = []
        for index, (source, size, new_size) in enumerate(zip(segmentation_maps, sizes, new_sizes, strict=True)):
            segmentation_map = read_segmentation_map(source, f"Segmentation map {index}")
            if segmentation_map.shape != size:
                raise ValueError(
                    f"Segmentation map {index} has (height, width) {segmentation_map.shape}, but its image has {size}."
                )
            labels.append(self.process_segmentation_map(segmentation_map, new_size, **kwargs))
        return [torch.from_numpy(label) for label in labels] if self.backend == "torchvision" else labels

    def process_segmentation_map(
        self,
        segmentation_map: np.ndarray,
        new_size: tuple[int, int],
        do_reduce_labels: bool,
        do_resize: bool,
        size: SizeDict,
        do_center_crop: bool,
        crop_size: SizeDict,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> np.ndarray:
        if do_reduce_labels:
            segmentation_map = reduce_labels(segmentation_map)
        if do_resize:
            height, width = get_resized_size(*segmentation_map.shape, size)
            segmentation_map = resize_segmentation_map(segmentation_map, height, width)
        if do_center_crop:
            segmentation_map = self.center_crop(segmentation_map, crop_size, value=IGNORED_LABEL)
        padding = [(0, new - old) for new, old in zip(new_size, segmentation_map.shape, strict=True)]
        return np.pad(segmentation_map, padding, constant_values=IGNORED_LABEL)

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
        images = [
            read_image(image, f"Image {index}", input_data_format, any_channel_count)
            for index, image in enumerate(images)
        ]
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

    def resize(self, image: np.ndarray | torch.Tensor, size: SizeDict, **kwargs) -> np.ndarray | torch.Tensor:
        height, width = get_resized_size(*image.shape[-2:], size)
        return super().resize(image, size=SizeDict(height=height, width=width), **kwargs)

    def center_crop(
        self, image: np.ndarray | torch.Tensor, size: SizeDict, value: int = 0, **kwargs
    ) -> np.ndarray | torch.Tensor:
        """
        Crops as `CenterCrop` of torchvision does in the official evaluation. The backends of Transformers round odd
        margins otherwise, and not alike. Images that are smaller are surrounded with `value`.
        """
        if size.height is None or size.width is None:
            raise ValueError(f"`crop_size` must have the keys 'height' and 'width', got {dict(size)}.")
        height, width = image.shape[-2:]
        top, left = max(round((height - size.height) / 2), 0), max(round((width - size.width) / 2), 0)
        image = image[..., top : top + size.height, left : left + size.width]
        return image if image.shape[-2:] == (size.height, size.width) else center_on_canvas(image, size, value)

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
        if do_pad:
            if pad_size is None:
                pad_size = get_pad_size(features["pixel_values"], pad_size_divisor)
            padded = self.pad(features["pixel_values"], pad_size=pad_size, return_mask=True)
            features["pixel_values"], features["pixel_mask"] = padded
        return features.convert_to_tensors(return_tensors)


class PiipPostProcessingMixin:
    """
    What the processors of all tasks but instance segmentation make of outputs. The pipelines ask a processor what its
    model can do by the names of these methods.
    """

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        r"""
        Maps of class ids from the output of [`PiipForSemanticSegmentation`].

        Args:
            outputs (`SemanticSegmenterOutput`):
                Output of the model for images that this processor prepared.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`, *optional*):
                Height and width of every image before it was processed. The part of the logits that padding does not
                cover is resized to it bilinearly, as in the official code. By default logits stay as they are.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Whether to return the logits as well.

        Returns:
            `list[torch.Tensor]`: One map of class ids of shape `(height, width)` per image; or one
            `SemanticSegmentationPostProcessorOutput` with the map as `segmentation` and with logits of shape
            `(num_labels, height, width)` as `segmentation_scores`.

        Raises:
            ValueError: If there is not one target size per image.
        """
        logits = list(outputs.logits)
        if target_sizes is not None:
            if len(target_sizes) != len(logits):
                raise ValueError(f"Got {len(target_sizes)} `target_sizes` for {len(logits)} images: pass one each.")
            sizes = [tuple(int(side) for side in size) for size in target_sizes]
            logits = [self.resize_logits(scores, size) for scores, size in zip(logits, sizes, strict=True)]
        class_maps = [scores.argmax(dim=0) for scores in logits]
        if not return_segmentation_scores:
            return class_maps
        return [
            SemanticSegmentationPostProcessorOutput({"segmentation": class_map, "segmentation_scores": scores})
            for class_map, scores in zip(class_maps, logits, strict=True)
        ]

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        top_k: int = 300,
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Detections from the output of [`PiipForObjectDetection`], as the official code scores them: a query may stand
        for several classes, and there is no suppression of overlapping boxes.

        Args:
            outputs (`PiipObjectDetectionOutput`):
                Output of the model for images that this processor prepared without center crop.
            threshold (`float`, *optional*, defaults to 0.5):
                Detections need a higher score. The official evaluation has no threshold: 0.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`, *optional*):
                Height and width of every image before it was processed. By default boxes are from 0 to 1.
            top_k (`int`, *optional*, defaults to 300):
                Number of best pairs of query and class per image that the threshold is applied to.

        Returns:
            `list[dict[str, torch.Tensor]]`: Per image, best first, `scores` and `labels` of shape `(num_detections,)`
            and `boxes` of shape `(num_detections, 4)`: (x1, y1, x2, y2) within the image.

        Raises:
            ValueError: If there is not one target size per image.
        """
        scores, boxes = outputs.logits.float().sigmoid(), outputs.pred_boxes.float()
        if target_sizes is None:
            target_sizes = [(1, 1)] * len(scores)
        if len(target_sizes) != len(scores):
            raise ValueError(f"Got {len(target_sizes)} `target_sizes` for {len(scores)} images: pass one each.")
        centers, sizes = boxes[..., :2], boxes[..., 2:]
        boxes = torch.cat((centers - sizes / 2, centers + sizes / 2), dim=-1).clamp(0, 1)
        num_labels, detections = scores.shape[2], []
        for image_scores, image_boxes, (height, width) in zip(scores.flatten(1), boxes, target_sizes, strict=True):
            best, pairs = image_scores.topk(min(top_k, len(image_scores)))
            best, pairs = best[best > threshold], pairs[best > threshold]
            scale = image_boxes.new_tensor([width, height, width, height])
            detections.append(
                {"scores": best, "labels": pairs % num_labels, "boxes": image_boxes[pairs // num_labels] * scale}
            )
        return detections

    def resize_logits(self, logits: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
        """`(num_labels, height, width)` without padding -> `(num_labels, target_height, target_width)`"""
        if self.do_pad and not self.do_center_crop:
            height, width = get_resized_size(*target_size, self.size) if self.do_resize else target_size
            logits = logits[:, :height, :width]
        return F.interpolate(logits[None].float(), size=target_size, mode="bilinear", align_corners=False)[0]


class PiipImageProcessor(PiipPostProcessingMixin, PiipImageProcessorMixin, TorchvisionBackend):
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
            (also a tuple) does not keep it. Change `crop_size` as well, or switch `do_center_crop` off. With a limit
            the sides are rounded, as in the official detection and segmentation; without one they are cut to whole
            pixels, as in the official classification.
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
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether id 0 of segmentation maps means that a pixel has no class, as in ADE20K: 0 becomes 255, which the
            loss ignores, and every other id one less. Maps that are passed to a metric must be reduced likewise.

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
