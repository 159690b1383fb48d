# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Image processors of PIIP for instance segmentation: masks of COCO annotations, and masks of predictions."""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import Unpack
from transformers.utils import requires_backends

from .image_processing_piip import PiipImageProcessorKwargs, PiipImageProcessorMixin, resize_segmentation_map


NO_SEGMENT = -1  # pixels of maps of segment ids that belong to no instance


# Masks of annotations


def decode_segmentation(segmentation: list | dict, height: int, width: int, name: str) -> np.ndarray:
    """
    The boolean mask `(height, width)` of a COCO segmentation: a list of polygons, or a run-length encoding with its
    counts as a list or compressed.

    Raises:
        ValueError: If it is broken or belongs to an image of another size; the message starts with `name`.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, height, width, name)
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(
            f"{name} has the segmentation {str(segmentation)[:100]}: expected polygons [[x1, y1, x2, y2, ...]] or a "
            "run-length encoding {'size': [height, width], 'counts': ...}."
        )
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        mask |= fill_polygon(read_polygon(polygon, name), height, width)
    return mask


def read_polygon(polygon: list[float], name: str) -> np.ndarray:
    """Its corners `(num_corners, 2)`."""
    is_usable = len(polygon) >= 6 and len(polygon) % 2 == 0
    if not is_usable or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in polygon):
        raise ValueError(
            f"{name} has a broken polygon: expected x and y of at least three corners as finite numbers [x1, y1, x2, "
            f"y2, x3, y3, ...], got {str(polygon)[:100]}. Correct it or remove the object."
        )
    return np.array(polygon, dtype=float).reshape(-1, 2)


def prepare_objects(annotation: dict, name: str, height: int, width: int) -> dict:
    """Gives every object the name that errors call it, and a box around its mask if it has none."""
    items = annotation.get("annotations") if isinstance(annotation, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return annotation  # refused where the boxes are read
    name = f"{name} (image_id {annotation.get('image_id')})"
    items = [{"name": f"{name}: object {k}"} | item for k, item in enumerate(items)]
    for item in items:
        if item.get("bbox") is None and item.get("segmentation"):
            item["bbox"] = get_box(decode_segmentation(item["segmentation"], height, width, item["name"]))
    return annotation | {"annotations": items}


def get_box(mask: np.ndarray) -> list[int]:
    """(x, y, width, height) of the pixels of a mask; sizes are zero if it has none."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return [0, 0, 0, 0]
    left, top = int(columns.min()), int(rows.min())
    return [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]


def pad_masks(masks: np.ndarray | torch.Tensor, height: int, width: int) -> np.ndarray | torch.Tensor:
    """Pads `(num_objects, height, width)` at the right and bottom with zeros."""
    bottom, right = height - masks.shape[1], width - masks.shape[2]
    if isinstance(masks, torch.Tensor):
        return F.pad(masks, (0, right, 0, bottom))
    return np.pad(masks, ((0, 0), (0, bottom), (0, right)))


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centres lie inside the polygon `(num_points, 2)`."""
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, axis=0).T
    centers = np.arange(height) + 0.5
    rows, edges = np.nonzero((y <= centers[:, None]) != (next_y <= centers[:, None]))
    slopes = (next_x - x)[edges] / (next_y - y)[edges]
    crossings = x[edges] + (centers[rows] - y[edges]) * slopes
    # a row changes between outside and inside at the first centre beyond every crossing
    columns = np.ceil(crossings - 0.5).clip(0, width).astype(int)
    changes = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(changes, (rows, columns), 1)
    return changes.cumsum(axis=1)[:, :width] % 2 == 1


def decode_rle(rle: dict, height: int, width: int, name: str) -> np.ndarray:
    """The mask of a run-length encoding: alternating numbers of zeros and ones, column by column."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] and size != (height, width):
        raise ValueError(f"{name} has a run-length encoding of the size {size}, but its image has {[height, width]}.")
    counts = decompress_counts(counts) if isinstance(counts, (str, bytes)) else counts
    is_list = isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts)
    if not is_list or sum(counts) != height * width:
        raise ValueError(
            f"{name} has a broken run-length encoding: its counts are not whole numbers with the sum {height} * "
            f"{width}. Encode the mask anew or remove the object."
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def decompress_counts(compressed: str | bytes) -> list[int]:
    """
    Counts of the compressed format of COCO. Every character holds five bits, the lowest ones first, and whether the
    number goes on; from the fourth number on they are differences to the number before the last one.
    """
    codes = compressed.encode() if isinstance(compressed, str) else compressed
    counts, value, shift = [], 0, 0
    for code in codes:
        code -= 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return counts


def encode_rle(mask: torch.Tensor) -> dict:
    """The run-length encoding `{"size": [height, width], "counts": [...]}` of COCO, not compressed."""
    pixels = mask.T.flatten()
    # a run ends where a pixel differs from the one before it; in front of the first one there is a zero
    ends = [pixels[:1].nonzero(), (pixels[1:] != pixels[:-1]).nonzero() + 1]
    ends = [0, *torch.cat(ends).flatten().tolist(), len(pixels)]
    return {"size": list(mask.shape), "counts": [end - start for start, end in zip(ends, ends[1:])]}


# Masks of predictions


def paste_mask(
    mask: torch.Tensor, box: torch.Tensor, height: int, width: int
) -> tuple[tuple[slice, slice], torch.Tensor]:
    """
    Stretches a mask `(size, size)` over `box`, (x1, y1, x2, y2) in pixels: the rows and columns of the image that it
    can reach, and its values there, `(num_rows, num_columns)`. Elsewhere it is zero.

    As in the official code pixel centres are mapped into the box, without rounding it, and the mask is interpolated
    bilinearly.
    """
    left, top, right, bottom = box.tolist()
    columns, x = get_reach(left, right, width, mask.shape[1])
    rows, y = get_reach(top, bottom, height, mask.shape[0])
    if len(x) == 0 or len(y) == 0:
        return (slice(0, 0), slice(0, 0)), mask.new_zeros(0, 0)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(mask)
    return (rows, columns), F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def get_reach(start: float, end: float, length: int, size: int) -> tuple[slice, torch.Tensor]:
    """The pixels of an axis that a mask from `start` to `end` can reach, and their centres as -1 ... 1 in the mask."""
    border = (end - start) / size / 2
    if end <= start:
        return slice(0, 0), torch.empty(0)
    pixels = slice(max(math.floor(start - border), 0), min(math.ceil(end + border), length))
    centers = torch.arange(pixels.start, max(pixels.stop, pixels.start)) + 0.5
    return pixels, (centers - start) / (end - start) * 2 - 1


def write_mask(image: torch.Tensor, place: tuple[slice, slice], mask: torch.Tensor) -> torch.Tensor:
    image[place] = mask.to(image.device)
    return image


def layer_masks(
    segmentation: torch.Tensor,
    masks: Iterable[tuple[tuple[slice, slice], torch.Tensor]],
    segments: list[dict],
    overlap_threshold: float,
) -> tuple[torch.Tensor, list[dict]]:
    """
    Writes ids into the map, the masks that come first on top. Segments that keep no larger share of their mask than
    `overlap_threshold` are left out.
    """
    kept = []
    for (place, mask), segment in zip(masks, segments, strict=True):
        visible = mask & (segmentation[place] == NO_SEGMENT)
        if visible.sum() > overlap_threshold * mask.sum():
            segmentation[place][visible] = len(kept)
            kept.append(segment)
    return segmentation, kept


class PiipInstanceSegmentationImageProcessorMixin(PiipImageProcessorMixin):
    """What makes a processor one for instance segmentation, for either backend."""

    # the official evaluation of PIIP-TSB 1120/896/448 on COCO
    size = {"shortest_edge": 672, "longest_edge": 1120}
    resample = PILImageResampling.BILINEAR
    do_center_crop = False
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_pad = True
    pad_size_divisor = 224

    @staticmethod
    def backend_classes() -> dict[str, type]:
        return {
            "torchvision": PiipInstanceSegmentationImageProcessor,
            "pil": PiipInstanceSegmentationImageProcessorPil,
        }

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        annotations: dict | list[dict] | None = None,
        **kwargs: Unpack[PiipImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Prepares images for the model, and annotated objects with their masks for its loss.

        Args:
            images (`ImageInput`):
                Images as the class describes them.
            segmentation_maps (`ImageInput`, *optional*):
                See [`PiipImageProcessor`]; not for instances.
            annotations (`dict` or `list[dict]`, *optional*):
                The objects of every image in COCO format, as for [`PiipImageProcessor`]. Each object also has a
                `segmentation`: polygons or a run-length encoding. Objects without a `bbox` get that of their mask.
            kwargs:
                Options of the class, for this call.

        Returns:
            `BatchFeature`: As in [`PiipImageProcessor`]; `labels` also have boolean `masks` of shape
            `(num_objects, height, width)`, of the size of `pixel_values`. Where no object of an image has a
            `segmentation`, there are none.

        Raises:
            ValueError: If an image or an annotation cannot be used; the message names its place.
        """
        return super().preprocess(images, segmentation_maps, annotations, **kwargs)

    def _preprocess_image_like_inputs(self, *args, **kwargs) -> BatchFeature:
        features = super()._preprocess_image_like_inputs(*args, **kwargs)
        for image, label in zip(features["pixel_values"], features.get("labels", [])):
            if "masks" in label:
                label["masks"] = pad_masks(label["masks"], *image.shape[-2:])
        return features

    def process_annotations(
        self, annotations: dict | list[dict], sizes: list[tuple[int, int]], **kwargs: Unpack[PiipImageProcessorKwargs]
    ) -> list[dict[str, np.ndarray]]:
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        prepared = [
            prepare_objects(annotation, f"Annotation {index}", *size)
            for index, (annotation, size) in enumerate(zip(annotations, sizes))
        ]
        # what has no image is refused there
        return super().process_annotations([*prepared, *annotations[len(prepared) :]], sizes, **kwargs)

    def process_objects(
        self, objects: list[dict], size: tuple[int, int], new_size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        labels = super().process_objects(objects, size, new_size)
        without_mask = [item["name"] for item in objects if not item.get("segmentation")]
        if 0 < len(without_mask) < len(objects):
            raise ValueError(f"{without_mask[0]} has no 'segmentation', but others of its image have one.")
        if not without_mask:
            masks = [
                resize_segmentation_map(decode_segmentation(item["segmentation"], *size, item["name"]), *new_size)
                for item in objects
            ]
            labels["masks"] = np.array(masks, dtype=bool).reshape(len(objects), *new_size)
        return labels

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        r"""
        Detected boxes from the output of [`PiipForInstanceSegmentation`].

        Args:
            outputs ([`PiipInstanceSegmentationOutput`]):
                Output of the model in evaluation mode.
            threshold (`float`, *optional*, defaults to 0.5):
                Detections need a higher score. The model has a threshold of its own already,
                `config.mask_rcnn.box_score_thresh`; the official evaluation has no other: 0.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`, *optional*):
                Height and width of every image before it was processed. By default boxes are from 0 to 1.

        Returns:
            `list[dict[str, torch.Tensor]]`: Per image, best first, `scores` and `labels` of shape `(num_detections,)`
            and `boxes` of shape `(num_detections, 4)`: (x1, y1, x2, y2) within the image.

        Raises:
            ValueError: If there is not one target size per image.
        """
        if target_sizes is None:
            target_sizes = [(1, 1)] * len(outputs.scores)
        if len(target_sizes) != len(outputs.scores):
            raise ValueError(
                f"Got {len(target_sizes)} `target_sizes` for {len(outputs.scores)} images: pass one each."
            )
        centers, sizes = outputs.pred_boxes[..., :2], outputs.pred_boxes[..., 2:]
        boxes = torch.cat((centers - sizes / 2, centers + sizes / 2), dim=-1).clamp(0, 1)
        detections = []
        for index, (height, width) in enumerate(target_sizes):
            keep = outputs.scores[index] > threshold
            detections.append(
                {
                    "scores": outputs.scores[index][keep],
                    "labels": outputs.class_ids[index][keep],
                    "boxes": boxes[index][keep] * boxes.new_tensor([width, height, width, height]),
                }
            )
        return detections

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict]:
        r"""
        Masks of instances from the output of [`PiipForInstanceSegmentation`], at the size of the original images.

        Args:
            outputs ([`PiipInstanceSegmentationOutput`]):
                Output of the model in evaluation mode.
            threshold (`float`, *optional*, defaults to 0.5):
                Instances need a higher score. The official evaluation has no threshold: 0.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                Pixels belong to an instance from this probability on.
            overlap_mask_area_threshold (`float`, *optional*, defaults to 0.5):
                In a map of ids a pixel belongs to the instance with the highest score. Instances that have no larger
                share of their mask left are dropped. Not used with `return_coco_annotation` or `return_binary_maps`:
                there instances overlap.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`):
                Height and width of every image before it was processed.
            return_coco_annotation (`bool`, *optional*, defaults to `False`):
                Whether to return run-length encodings as COCO has them, for its evaluation.
            return_binary_maps (`bool`, *optional*, defaults to `False`):
                Whether to return one mask per instance. A hundred of them take a byte per pixel each.

        Returns:
            `list[dict]`: Per image `segmentation`: a map of segment ids of shape `(height, width)`, with -1 where
            there is none; or with `return_coco_annotation` a list of `{"size": [height, width], "counts": [...]}`; or
            with `return_binary_maps` a boolean tensor of shape `(num_instances, height, width)`; and `segments_info`:
            a list of dictionaries with `id`, `label_id` and `score`, best first.

        Raises:
            ValueError: If the output has no masks or there is not one target size per image.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("`return_coco_annotation` and `return_binary_maps` exclude each other: choose one.")
        if outputs.pred_masks is None:
            raise ValueError("The model was built with `mask_rcnn.with_masks=False` and predicts no masks.")
        if target_sizes is None:
            raise ValueError("Masks are pasted at the size of the original images: pass `target_sizes`.")
        results = []
        detections = self.post_process_object_detection(outputs, threshold, target_sizes)
        for index, (detection, size) in enumerate(zip(detections, target_sizes, strict=True)):
            height, width = (int(side) for side in size)
            probabilities = outputs.pred_masks[index][outputs.scores[index] > threshold].float().sigmoid()
            # one after the other, and only where they are: hundreds of them on a large image would take gigabytes
            pasted = (
                paste_mask(*instance, height, width)
                for instance in zip(probabilities, detection["boxes"], strict=True)
            )
            masks = ((place, values >= mask_threshold) for place, values in pasted)
            segments = [
                {"label_id": label, "score": score}
                for label, score in zip(detection["labels"].tolist(), detection["scores"].tolist(), strict=True)
            ]
            if return_coco_annotation:
                empty = torch.zeros(height, width, dtype=torch.bool)
                segmentation = [encode_rle(write_mask(empty.clone(), *mask)) for mask in masks]
            elif return_binary_maps:
                segmentation = probabilities.new_zeros((len(segments), height, width), dtype=torch.bool)
                for instance, mask in zip(segmentation, masks, strict=True):
                    write_mask(instance, *mask)
            else:
                empty = probabilities.new_full((height, width), NO_SEGMENT, dtype=torch.int32)
                segmentation, segments = layer_masks(empty, masks, segments, overlap_mask_area_threshold)
            segments = [{"id": segment_id, **segment} for segment_id, segment in enumerate(segments)]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


class PiipInstanceSegmentationImageProcessor(PiipInstanceSegmentationImageProcessorMixin, TorchvisionBackend):
    r"""
    Constructs an image processor for [`PiipForInstanceSegmentation`] on torchvision. Options and accepted images are
    those of [`PiipImageProcessor`]; the defaults are the official evaluation of PIIP-TSB 1120/896/448 on COCO.

    Besides, `annotations` bring masks: polygons or run-length encodings, see
    [`~PiipInstanceSegmentationImageProcessor.preprocess`]; and there are `post_process_instance_segmentation` and
    `post_process_object_detection`.
    """

    def __init__(self, **kwargs: Unpack[PiipImageProcessorKwargs]):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)


class PiipInstanceSegmentationImageProcessorPil(PiipInstanceSegmentationImageProcessorMixin, PilBackend):
    r"""
    [`PiipInstanceSegmentationImageProcessor`] on NumPy and Pillow, for machines without torchvision.
    """


PiipInstanceSegmentationImageProcessor.register_for_auto_class("AutoImageProcessor")
PiipInstanceSegmentationImageProcessorPil.register_for_auto_class("AutoImageProcessor")

__all__ = ["PiipInstanceSegmentationImageProcessor", "PiipInstanceSegmentationImageProcessorPil"]
