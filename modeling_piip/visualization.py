# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Pictures of predictions, for people to look at."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torchvision.ops import masks_to_boxes
from transformers import BaseImageProcessor, PreTrainedModel

from .image_processing_piip import pil_image_to_array
from .image_processing_piip_instance_segmentation import decode_segmentation


LEGEND_ROWS = 30
PREVIEW_SIDE = 512
READABLE_SIDE = 384  # smaller pictures are enlarged before names are written on them
GOLDEN_RATIO = 0.618034


def get_color(class_id: int) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255: always the same for a class, and far from those of its neighbours."""
    hue, shade = (0.6 + class_id * GOLDEN_RATIO) % 1, (class_id + 1) % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.9, 0.55, 0.9)[shade], (1.0, 0.9, 0.6)[shade])
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_class_map(image: PIL.Image.Image, class_map: np.ndarray, num_labels: int) -> PIL.Image.Image:
    """The image under the colours of its class ids. Pixels with other ids, such as 255, keep their own colours."""
    pixels = pil_image_to_array(image)[..., :3]
    palette = np.array([get_color(class_id) for class_id in range(num_labels)]).reshape(-1, 3)
    known = class_map < num_labels
    overlay = pixels.copy()
    overlay[known] = (0.4 * pixels[known] + 0.6 * palette[class_map[known]]).astype(np.uint8)
    return PIL.Image.fromarray(overlay)


def draw_legend(class_map: np.ndarray, label_names: list[str], font_size: float = 14) -> PIL.Image.Image:
    """Colour, name and share of the pixels of the classes on the map, the largest first."""
    counts = np.bincount(class_map[class_map < len(label_names)], minlength=len(label_names))
    class_ids = [class_id for class_id in np.argsort(-counts, kind="stable") if counts[class_id] > 0][:LEGEND_ROWS]
    lines = [f"{label_names[class_id]}  {counts[class_id] / class_map.size:.1%}" for class_id in class_ids]
    font = PIL.ImageFont.load_default(font_size)
    row = round(1.6 * font_size)
    width = max((font.getlength(line) for line in lines), default=0)
    legend = PIL.Image.new("RGB", (round(width + 2.5 * row), row * (len(lines) + 1)), "white")
    draw = PIL.ImageDraw.Draw(legend)
    for number, (class_id, line) in enumerate(zip(class_ids, lines)):
        top = row // 2 + number * row
        draw.rectangle((row // 2, top, 1.3 * row, top + 0.8 * row), fill=get_color(class_id))
        draw.text((1.7 * row, top + 0.4 * row), line, fill="black", font=font, anchor="lm")
    return legend


def arrange(rows: list[list[PIL.Image.Image]], margin: int = 8) -> PIL.Image.Image:
    """Pictures side by side in rows on white."""
    widths = [sum(picture.width + margin for picture in row) for row in rows]
    heights = [max(picture.height for picture in row) + margin for row in rows]
    canvas = PIL.Image.new("RGB", (max(widths) + margin, sum(heights) + margin), "white")
    top = margin
    for row, height in zip(rows, heights):
        left = margin
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + margin
        top += height
    return canvas


def get_label_names(model: PreTrainedModel) -> list[str]:
    return [model.config.id2label[class_id] for class_id in range(model.config.num_labels)]


@torch.no_grad()
def predict_class_map(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image: PIL.Image.Image
) -> np.ndarray:
    """Class ids `(height, width)` of an image, by any semantic segmenter of Transformers in evaluation mode."""
    inputs = image_processor(image, return_tensors="pt").to(model.device)
    sizes = [image.size[::-1]]
    return image_processor.post_process_semantic_segmentation(model(**inputs), target_sizes=sizes)[0].cpu().numpy()


def draw_semantic_segmentation(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image: PIL.Image.Image
) -> PIL.Image.Image:
    """The image under its predicted classes, with a legend."""
    label_names = get_label_names(model)
    class_map = predict_class_map(model, image_processor, image)
    legend = draw_legend(class_map, label_names, font_size=min(max(image.height / 30, 12), 28))
    return arrange([[draw_class_map(image, class_map, len(label_names)), legend]])


def draw_segmentation_previews(
    model: PreTrainedModel, image_processor: BaseImageProcessor, examples: list[tuple[PIL.Image.Image, np.ndarray]]
) -> PIL.Image.Image:
    """A row per example: image, true and predicted classes, legend of the latter."""
    label_names = get_label_names(model)
    rows = []
    for image, class_ids in examples:
        class_map = predict_class_map(model, image_processor, image)
        overlays = [draw_class_map(image, ids, len(label_names)) for ids in (class_ids, class_map)]
        row = [image.convert("RGB"), *overlays]
        for picture in row:
            picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        rows.append([*row, draw_legend(class_map, label_names)])
    return arrange(rows)


# Objects


@torch.no_grad()
def predict_objects(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image: PIL.Image.Image, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """
    Objects with a score above `threshold`, by any object detector of Transformers in evaluation mode: `scores` and
    `labels` of shape `(num_objects,)` and `boxes` of shape `(num_objects, 4)`, (x1, y1, x2, y2) in pixels.
    """
    inputs = image_processor(image, return_tensors="pt").to(model.device)
    sizes = [image.size[::-1]]
    (objects,) = image_processor.post_process_object_detection(
        model(**inputs), threshold=threshold, target_sizes=sizes
    )
    return {name: objects[name].cpu() for name in ("scores", "labels", "boxes")}


@torch.no_grad()
def predict_instances(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image: PIL.Image.Image, threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """
    Instances with a score above `threshold`, by any instance segmenter of Transformers in evaluation mode: as
    [`predict_objects`], with the boxes of the masks, and `segmentation` of shape `(height, width)`: the index of the
    object that a pixel belongs to, or -1.
    """
    inputs = image_processor(image, return_tensors="pt").to(model.device)
    sizes = [image.size[::-1]]
    (result,) = image_processor.post_process_instance_segmentation(
        model(**inputs), threshold=threshold, target_sizes=sizes
    )
    ids = result["segmentation"].cpu()
    # some models report instances of which no pixel is left
    segments = [segment for segment in result["segments_info"] if (ids == segment["id"]).any()]
    segmentation = torch.full(ids.shape, -1)
    boxes = torch.zeros(len(segments), 4)
    for index, segment in enumerate(segments):
        mask = ids == segment["id"]
        segmentation[mask] = index
        # torchvision ends a box at the last pixel, not behind it
        boxes[index] = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
    return {
        "scores": torch.tensor([segment["score"] for segment in segments]),
        "labels": torch.tensor([segment["label_id"] for segment in segments], dtype=torch.long),
        "boxes": boxes,
        "segmentation": segmentation,
    }


def read_annotation(annotation: dict, height: int, width: int) -> dict[str, torch.Tensor]:
    """The objects of an image in COCO format, with class ids of the model, in the form of predictions."""
    objects = annotation["annotations"]
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    read = {"labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.long), "boxes": boxes}
    if any("segmentation" in item for item in objects):
        read["segmentation"] = torch.full((height, width), -1)
        for index, item in enumerate(objects):
            mask = decode_segmentation(item["segmentation"], height, width, f"Object {index}")
            read["segmentation"][torch.from_numpy(mask)] = index
    return read


def draw_objects(image: PIL.Image.Image, objects: dict[str, torch.Tensor], label_names: list[str]) -> PIL.Image.Image:
    """
    The image under the boxes, names and scores of objects, and their masks as far as there are any; small images are
    enlarged. Boxes have the colour of their class, or each that of its mask.
    """
    boxes, labels = objects["boxes"].tolist(), objects["labels"].tolist()
    picture = image
    colors = [get_color(label) for label in labels]
    if "segmentation" in objects:
        indices = objects["segmentation"].numpy()
        picture = draw_class_map(image, np.where(indices < 0, len(boxes), indices), len(boxes))
        colors = [get_color(index) for index in range(len(boxes))]
    names = [label_names[label] for label in labels]
    if "scores" in objects:
        names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"].tolist())]

    factor = math.ceil(READABLE_SIDE / max(image.size))
    picture = PIL.Image.fromarray(pil_image_to_array(picture)[..., :3]).resize(
        (image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST
    )
    font_size = min(max(picture.height / 40, 12), 28)
    draw = PIL.ImageDraw.Draw(picture)
    font = PIL.ImageFont.load_default(font_size)
    # the best ones come first and lie on top
    for box, name, color in reversed(list(zip(boxes, names, colors))):
        draw.rectangle([factor * side for side in box], outline=color, width=round(font_size / 6))
        corner = (factor * box[0], max(factor * box[1], font_size))
        draw.rectangle(draw.textbbox(corner, name, font=font, anchor="ld"), fill=color)
        draw.text(corner, name, fill="black" if sum(color) > 380 else "white", font=font, anchor="ld")
    return picture


def draw_detection_previews(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    examples: list[tuple[PIL.Image.Image, dict]],
    predict: Callable[..., dict[str, torch.Tensor]] = predict_objects,
) -> PIL.Image.Image:
    """
    A row per example, which is an image and its annotation in COCO format: the true objects and those that `predict`
    finds, [`predict_objects`] or [`predict_instances`].
    """
    label_names = get_label_names(model)
    rows = []
    for image, annotation in examples:
        truth = read_annotation(annotation, image.height, image.width)
        predicted = predict(model, image_processor, image)
        row = [draw_objects(image, objects, label_names) for objects in (truth, predicted)]
        for picture in row:
            picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        rows.append(row)
    return arrange(rows)
