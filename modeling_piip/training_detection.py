# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
What the scripts for object detection and instance segmentation share: COCO files and Hub data sets, the official
augmentation, batches, evaluation and previews. Needs the `train` extra.

A folder holds, for any names of the splits, images and annotations in COCO format:

    images/train/*.jpg            images/validation/*.jpg              images of any format, or
    train2017/*.jpg               val2017/*.jpg                        as COCO is published
    annotations/train.json        annotations/validation.json          the objects, or
    annotations/instances_train2017.json    ...                        as COCO is published

A Hub data set has a column with the objects of an image: their boxes and classes, and maybe areas, crowd flags and
segmentations.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import evaluate
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from faster_coco_eval.core import mask as coco_masks
from torch import nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm
from transformers import BaseImageProcessor
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.utils import ModelOutput, logging

from .configuration_piip import PiipConfig
from .data import (
    EVALUATION_SPLITS,
    ImageDataArguments,
    ImageDataset,
    UnreadableImageError,
    check_examples,
    check_shares,
    choose_examples,
    find_column,
    load_splits,
    match_label_names,
    open_image,
    read_column,
)
from .image_processing_piip import check_object, clip_box
from .image_processing_piip_instance_segmentation import decode_segmentation, get_box, pad_masks
from .training import (
    LossMeter,
    ModelArguments,
    OptimizationArguments,
    PiipTrainer,
    PiipTrainingArguments,
    load_image_processor,
)
from .training_loop import LoopArguments


logger = logging.get_logger(__name__)

ANNOTATION_FILES = ("{}.json", "instances_{}.json")
IMAGE_FOLDERS = ("images/{}", "{}")
CLASS_KEYS = ("category", "category_id", "label", "labels")
LAYOUT = (
    "Expected images/<split>/*.jpg with annotations/<split>.json in COCO format, or <split>/*.jpg with "
    "annotations/instances_<split>.json."
)
IOU_TYPES = {"box": "bbox", "mask": "segm"}
EVAL_BATCH_SIZE_HELP = (
    "Evaluation images per forward. Above 1, images of several sizes are padded to one, which changes results a "
    "little."
)


@dataclass
class DetectionDataArguments(ImageDataArguments):
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder with images/<split>/*.jpg and annotations/<split>.json in COCO format."},
    )
    objects_column_name: str = field(
        default="objects", metadata={"help": "Column of the Hub data set with the objects of every image."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "What the objects of a Hub data set call their class. Default: 'category' or the like."},
    )
    bbox_format: str = field(
        default="xywh",
        metadata={
            "help": "Boxes of the Hub data set: left, top, width and height, or left, top, right and bottom.",
            "choices": ["xywh", "xyxy"],
        },
    )
    check_data: bool = field(
        default=True,
        metadata={"help": "Read all images and masks before the training, to find unusable ones."},
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Warn about files that cannot be read and go on without them; else stop."}
    )
    num_previews: int = field(
        default=6,
        metadata={"help": "Draw this many validation images after every evaluation, in OUTPUT_DIR/previews."},
    )


@dataclass
class DetectionAugmentationArguments:
    """
    What happens to training images; the defaults are the multi-scale policy of the published PIIP detectors. Sizes are
    shares of the shorter side for evaluation: the image processor's `size["shortest_edge"]`.
    """

    augment: bool = field(
        default=True, metadata={"help": "Change training images at random; else process them as for evaluation."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip. Use 0 for digits or text."})
    scale_range: list[float] = field(
        default_factory=lambda: [0.6, 1.0],
        metadata={"help": "The shorter side is resized to one of eleven sizes in this range (1 1: always the same)."},
    )
    crop_prob: float = field(
        default=0.5, metadata={"help": "Probability to crop an image before this resize; see the next two options."}
    )
    crop_resize: list[float] = field(
        default_factory=lambda: [0.5, 0.625, 0.75],
        metadata={"help": "Before the crop the shorter side is resized to one of these sizes."},
    )
    crop_range: list[float] = field(
        default_factory=lambda: [0.48, 0.75],
        metadata={"help": "Smallest and largest height and width of the crop."},
    )
    large_scale_jitter: list[float] | None = field(
        default=None,
        metadata={
            "help": "Instead of the crop and resize above: a random factor in this range, such as 0.1 2.0, to the "
            "size that just fits into --max_image_size."
        },
    )
    max_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Larger images are cut to this many pixels per side at the end. Default: the image size of the "
            "model."
        },
    )
    pad_to: int | None = field(
        default=None,
        metadata={
            "help": "Pad all training batches to squares of this side, so that torch.compile sees one shape. Default: "
            "to the largest image of the batch."
        },
    )

    def __post_init__(self):
        check_shares(self, "hflip", "crop_prob")
        for name in ("scale_range", "crop_range", "large_scale_jitter"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise ValueError(f"--{name} needs two rising numbers above 0, got {value}.")
        if min(self.crop_resize) <= 0:
            raise ValueError(f"--crop_resize needs numbers above 0, got {self.crop_resize}.")
        for name in ("max_image_size", "pad_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1 pixel, got {value}.")


@dataclass
class InstanceAugmentationArguments(DetectionAugmentationArguments):
    """The defaults are the policy of the published PIIP instance segmenters at one scale: a flip only."""

    scale_range: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={
            "help": "The shorter side is resized to one of eleven sizes in this range (1 1: always the same; official "
            "multi-scale policy: 0.6 1)."
        },
    )
    crop_prob: float = field(
        default=0.0,
        metadata={
            "help": "Probability to crop an image before this resize; see the next two options (official multi-scale "
            "policy: 0.5)."
        },
    )


@dataclass
class DetectionOptimizationArguments(OptimizationArguments):
    lr_drops: list[float] = field(
        default_factory=lambda: [0.6667, 0.9167],
        metadata={
            "help": "Shares of the training after which the learning rate falls to a tenth (official: after 8 and 11 "
            "of 12 epochs). Used with --lr_scheduler_type constant_with_warmup."
        },
    )


@dataclass
class DetectionTrainingArguments(PiipTrainingArguments):
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Course of the learning rate; constant_with_warmup falls in steps, see --lr_drops."},
    )
    max_grad_norm: float = field(
        default=0.1, metadata={"help": "Clip the norm of the gradient to this, 0: do not (official DINO: 0.1)."}
    )
    metric_for_best_model: str | None = field(default="box_ap", metadata={"help": "What the best model is best at."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": EVAL_BATCH_SIZE_HELP})


@dataclass
class DetectionLoopArguments(LoopArguments):
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Course of the learning rate; constant_with_warmup falls in steps, see --lr_drops."},
    )
    max_grad_norm: float = field(
        default=0.1, metadata={"help": "Clip the norm of the gradient to this (official DINO: 0.1)."}
    )
    per_device_eval_batch_size: int = field(default=1, metadata={"help": EVAL_BATCH_SIZE_HELP})


# Loading


def load_object_detection_data(
    args: DetectionDataArguments,
    seed: int = 0,
    model_labels: list[str] | None = None,
    training: bool = True,
    with_masks: bool = False,
) -> tuple[dict[str, datasets.Dataset], list[str], list[int]]:
    """
    Loads and checks images with annotated objects. Boxes are clipped to their images; what is left without area is
    dropped, with one warning per split.

    Args:
        args ([`DetectionDataArguments`]):
            Where the data is.
        seed (`int`, *optional*, defaults to 0):
            Chooses the images of `--train_val_split` and `--max_..._samples`.
        model_labels (`list[str]`, *optional*):
            Class names of the checkpoint. If the data has the same classes they get the ids of the checkpoint.
        training (`bool`, *optional*, defaults to `True`):
            Whether the data is trained on. If not, some of the classes of the checkpoint are enough.
        with_masks (`bool`, *optional*, defaults to `False`):
            Whether every object needs a segmentation.

    Returns:
        `tuple(dict[str, datasets.Dataset], list[str], list[int])`: the splits `"train"` and `"validation"`, as far as
        there are any; the class names; and the ids that the data gives to these classes. Columns are `image` (encoded,
        see [`open_image`]), `image_id`, `height`, `width`, and `objects`: JSON text with a list in COCO format, in
        which `category_id` is the class id of the model.

    Raises:
        ValueError: If there is no usable data; the message says what is missing and what to do.
    """
    if args.data_dir is not None:
        found, categories = load_coco_folder(args, training)
        splits = load_splits(args, lambda folder: found)
    else:
        splits = load_splits(args, None)
        categories = get_hub_categories(splits, args)
        splits = {split: convert_hub_split(dataset, args, split, categories) for split, dataset in splits.items()}
    label_names = match_label_names(list(categories.values()), model_labels, training)
    class_ids = {category_id: label_names.index(name) for category_id, name in categories.items()}
    splits = choose_examples(splits, args, seed)
    splits = {
        split: prepare_split(dataset, split, class_ids, with_masks, args.check_data)
        for split, dataset in splits.items()
    }
    # a checkpoint may have classes that the data to evaluate on has not
    new_id = max(categories) + 1
    category_ids = {class_id: category_id for category_id, class_id in class_ids.items()}
    return splits, label_names, [category_ids.get(class_id, new_id + class_id) for class_id in range(len(label_names))]


def load_coco_folder(
    args: DetectionDataArguments, training: bool
) -> tuple[dict[str, datasets.Dataset], dict[int, str]]:
    """The wanted splits of a folder as the module describes it, and the names of the category ids, rising."""
    root = Path(args.data_dir)
    evaluation = EVALUATION_SPLITS if args.eval_split is None else (args.eval_split,)
    # only one is evaluated on; those of a test split are often not public
    evaluation = next(((split,) for split in evaluation if find_annotation_file(root, split)), evaluation)
    wanted = (args.train_split, *evaluation) if training or args.train_val_split is not None else evaluation
    files = {split: file for split in wanted if (file := find_annotation_file(root, split))}
    if not files:
        raise ValueError(f"--data_dir {root} has no annotations of a split named {' or '.join(wanted)}. {LAYOUT}")
    contents = {split: read_coco_file(file) for split, file in files.items()}
    names = {split: get_category_names(content, files[split]) for split, content in contents.items()}
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise ValueError(
                f"{files[other]} has other categories than {files[first]}: both need the same ids and names."
            )
    return {split: convert_coco_split(contents[split], files[split], root, split) for split in files}, names[first]


def find_annotation_file(root: Path, split: str) -> Path | None:
    candidates = (root / "annotations" / name.format(split) for name in ANNOTATION_FILES)
    return next((file for file in candidates if file.is_file()), None)


def read_coco_file(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}.") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise ValueError(f"{file} is not in COCO format: it needs lists of 'images', 'annotations' and 'categories'.")
    return content


def get_category_names(content: dict, file: Path) -> dict[int, str]:
    check_ids(content["categories"], "category", file)
    names = {category["id"]: str(category.get("name", "")) for category in content["categories"]}
    for category_id, name in names.items():
        if not name or list(names.values()).count(name) > 1:
            raise ValueError(f"{file} gives category {category_id} the name '{name}': each needs a name of its own.")
    if not names:
        raise ValueError(f"{file} has no categories.")
    return dict(sorted(names.items()))


def check_ids(entries: list[dict], kind: str, file: Path):
    seen = set()
    for entry in entries:
        entry_id = entry.get("id")
        if isinstance(entry_id, bool) or not isinstance(entry_id, int):
            raise ValueError(f"{file} has the {kind} id {entry_id!r}: every {kind} needs a whole number as 'id'.")
        if entry_id in seen:
            raise ValueError(f"{file} has the {kind} id {entry_id} twice: give every {kind} an id of its own.")
        seen.add(entry_id)


def convert_coco_split(content: dict, file: Path, root: Path, split: str) -> datasets.Dataset:
    """The images of a COCO file with their objects, as [`load_object_detection_data`] describes the columns."""
    check_ids(content["images"], "image", file)
    check_ids(content["annotations"], "annotation", file)
    categories = {category["id"] for category in content["categories"]}
    objects = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        if item.get("image_id") not in objects:
            raise ValueError(
                f"Annotation {item['id']} in {file} belongs to image_id {item.get('image_id')}, but there is no such "
                "image: add it to 'images' or remove the annotation."
            )
        if item.get("category_id") not in categories:
            raise ValueError(
                f"Annotation {item['id']} in {file} has the category_id {item.get('category_id')}, but the categories "
                f"are {', '.join(map(str, sorted(categories)[:10]))}{', ...' if len(categories) > 10 else ''}."
            )
        objects[item["image_id"]].append(item)
    folders = [root / name.format(split) for name in IMAGE_FOLDERS]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise ValueError(f"Neither {folders[0]} nor {folders[1]} is a folder. {LAYOUT}")
    paths = [folder / str(image.get("file_name")) for image in content["images"]]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images of {file} are missing, the first one is {missing[0]}. Add the "
            "files or remove these images from 'images'."
        )
    return build_split(
        datasets.Dataset.from_dict(
            {"image": list(map(str, paths))}, datasets.Features({"image": datasets.Image(decode=False)})
        ),
        split,
        image_ids=[image["id"] for image in content["images"]],
        sizes=[(image.get("height"), image.get("width")) for image in content["images"]],
        objects=objects.values(),
    )


def build_split(
    images: datasets.Dataset,
    split: str,
    image_ids: list[int],
    sizes: list[tuple[int | None, int | None]],
    objects: Iterable[list[dict]],
) -> datasets.Dataset:
    columns = {
        "image_id": image_ids,
        "height": [height for height, _ in sizes],
        "width": [width for _, width in sizes],
        # as text, because polygons and run lengths do not share a column
        "objects": [json.dumps(items) for items in objects],
    }
    table = datasets.Dataset.from_dict(columns, split=datasets.NamedSplit(split))
    return datasets.concatenate_datasets([images, table], axis=1, split=datasets.NamedSplit(split))


def get_hub_categories(splits: dict[str, datasets.Dataset], args: DetectionDataArguments) -> dict[int, str]:
    """Class names of a Hub data set by the ids that its objects use."""
    features = next(iter(splits.values())).features
    if args.objects_column_name not in features:
        raise ValueError(
            f"The data has no column '{args.objects_column_name}': choose --objects_column_name among "
            f"{', '.join(features)}."
        )
    feature = features[args.objects_column_name]
    fields = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
    key = get_class_key(fields, args)
    label = fields[key]
    label = label if isinstance(label, (datasets.ClassLabel, datasets.Value)) else label.feature
    if isinstance(label, datasets.ClassLabel):
        return dict(enumerate(label.names))
    columns = {split: read_column(dataset, args.objects_column_name) for split, dataset in splits.items()}
    present = {
        split: {item.get(key) for objects in column for item in list_objects(objects)} - {None}
        for split, column in columns.items()
    }
    values = set().union(*present.values())
    if values and all(isinstance(value, int) for value in values):
        return {value: str(value) for value in sorted(values)}
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"The objects of the data hold '{key}' as {label}: expected one class, as text or number, each."
        )
    unknown = present.get("validation", set()) - present.get("train", values)
    if unknown:
        raise ValueError(
            f"The split to evaluate on has classes without an object to train on: {', '.join(sorted(unknown))}. Both "
            "splits need the same classes, under the same names."
        )
    return dict(enumerate(sorted(values)))


def get_class_key(fields: dict | None, args: DetectionDataArguments) -> str:
    names = list(fields) if isinstance(fields, dict) else []
    candidates = CLASS_KEYS if args.label_column_name is None else (args.label_column_name,)
    key = next((key for key in candidates if key in names), None)
    if key is None or "bbox" not in names:
        raise ValueError(
            f"The column '{args.objects_column_name}' holds {', '.join(names) or 'no objects'}: expected 'bbox' and "
            "the class, which --label_column_name names."
        )
    return key


def list_objects(objects: dict | list[dict] | None) -> list[dict]:
    """One dictionary per object, also out of a dictionary of columns; what is null is not there."""
    if isinstance(objects, dict):
        columns = {name: values for name, values in objects.items() if values is not None}
        return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
    return objects or []


def convert_hub_split(
    dataset: datasets.Dataset, args: DetectionDataArguments, split: str, categories: dict[int, str]
) -> datasets.Dataset:
    features = dataset.features
    image_column = find_column(
        {split: dataset}, args.image_column_name, datasets.Image, "image", "--image_column_name"
    )
    feature = features[args.objects_column_name]
    key = get_class_key(feature if isinstance(feature, dict) else feature.feature, args)
    image_ids = read_column(dataset, "image_id") if "image_id" in features else []
    if len(set(image_ids)) < len(dataset) or not all(isinstance(image_id, int) for image_id in image_ids):
        image_ids = list(range(len(dataset)))
    unknown = [None] * len(dataset)
    sizes = [read_column(dataset, side) if side in features else unknown for side in ("height", "width")]
    # for classes that are text
    ids = {name: category_id for category_id, name in categories.items()}
    objects = [
        [convert_hub_object(item, key, args.bbox_format, ids) for item in list_objects(items)]
        for items in read_column(dataset, args.objects_column_name)
    ]
    images = dataset.select_columns([image_column]).rename_columns({image_column: "image"})
    images = images.cast_column("image", datasets.Image(decode=False))
    return build_split(images, split, image_ids, list(zip(*sizes)), objects)


def convert_hub_object(item: dict, key: str, bbox_format: str, ids: dict[str, int]) -> dict:
    item = item | {"category_id": ids.get(item.get(key), item.get(key))}
    if bbox_format == "xyxy" and item.get("bbox") is not None:
        left, top, right, bottom = item["bbox"]
        item["bbox"] = [left, top, right - left, bottom - top]
    if isinstance(item.get("segmentation"), str):
        item["segmentation"] = json.loads(item["segmentation"])
    return item


# Checking


def prepare_split(
    dataset: datasets.Dataset, split: str, class_ids: dict[int, int], with_masks: bool, check_masks: bool
) -> datasets.Dataset:
    """Checks all objects, gives them class ids of the model, and drops boxes without area."""
    columns = {name: read_column(dataset, name) for name in dataset.column_names if name != "image"}
    num_objects = num_dropped = 0
    for row in tqdm(range(len(dataset)), desc=f"Reading the objects of the {split} split", leave=False):
        if not (columns["height"][row] and columns["width"][row]):
            columns["height"][row], columns["width"][row] = read_image_size(dataset[row]["image"])
        size = (columns["height"][row], columns["width"][row])
        name = f"The {split} split, image_id {columns['image_id'][row]}"
        # nothing lies inside an image of unknown size
        items = json.loads(columns["objects"][row]) if min(size) > 0 else []
        prepared = [
            prepare_object(item, f"{name}: object {item.get('id', k)}", size, class_ids, with_masks, check_masks)
            for k, item in enumerate(items)
        ]
        kept = [item for item in prepared if min(item["bbox"][2:]) > 0]
        num_dropped += len(prepared) - len(kept)
        num_objects += sum(not item["iscrowd"] for item in kept)
        columns["objects"][row] = json.dumps(kept)
    if num_dropped:
        logger.warning(f"The {split} split: dropped {num_dropped} boxes without any area inside their image.")
    if num_objects == 0:
        raise ValueError(
            f"The {split} split has {len(dataset)} images and no annotated objects: check its annotations."
        )
    table = datasets.Dataset.from_dict(columns, split=dataset.split)
    return datasets.concatenate_datasets([dataset.select_columns("image"), table], axis=1, split=dataset.split)


def read_image_size(encoded: dict) -> tuple[int, int]:
    """Height and width; zeros for a damaged image, which is reported where images are read."""
    try:
        image = open_image(encoded, "size")
    except UnreadableImageError:
        return 0, 0
    return image.size[::-1]


def prepare_object(
    item: dict, name: str, size: tuple[int, int], class_ids: dict[int, int], with_masks: bool, check_masks: bool
) -> dict:
    """
    The object with its class id and with its box clipped to the image of (height, width) `size`. It keeps its
    segmentation only `with_masks`, where an area that is missing is that of the mask; else it is that of the box.
    """
    item = {key: value for key, value in item.items() if value is not None}
    segmentation = item.get("segmentation")
    if with_masks and not segmentation:
        raise ValueError(f"{name} has no 'segmentation': instance segmentation needs a mask for every object.")
    mask = None
    if segmentation and ("bbox" not in item or (with_masks and (check_masks or "area" not in item))):
        mask = decode_segmentation(segmentation, *size, name)
    if "bbox" not in item and mask is not None:
        item = item | {"bbox": get_box(mask)}
    if "area" not in item and with_masks:
        item = item | {"area": mask.sum()}
    check_object(item, name)
    if item["category_id"] not in class_ids:
        raise ValueError(
            f"{name} has the class {item['category_id']}, but there are {len(class_ids)} classes with the ids "
            f"{', '.join(map(str, list(class_ids)[:10]))}{', ...' if len(class_ids) > 10 else ''}."
        )
    box = clip_box(item["bbox"], *size)
    prepared = {
        "bbox": box,
        "category_id": class_ids[item["category_id"]],
        "area": float(item.get("area", box[2] * box[3])),
        "iscrowd": int(item.get("iscrowd", 0)),
    }
    return prepared | ({"segmentation": segmentation} if with_masks else {})


# Augmentation


class RandomRangeCrop(v2.Transform):
    """A crop of random place, whose height and width are random numbers of pixels in a range, as far as they fit."""

    def __init__(self, smallest: int, largest: int):
        super().__init__()
        self.range = (smallest, largest)

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        params = {}
        for start, side, length in zip(("top", "left"), ("height", "width"), v2.query_size(flat_inputs)):
            smallest, largest = (min(limit, length) for limit in self.range)
            params[side] = int(torch.randint(smallest, largest + 1, ()))
            params[start] = int(torch.randint(length - params[side] + 1, ()))
        return params

    def transform(self, inpt: torch.Tensor, params: dict[str, int]) -> torch.Tensor:
        return F.crop(inpt, **params)


def build_detection_transform(
    args: DetectionAugmentationArguments, image_processor: BaseImageProcessor, image_size: int
) -> v2.Transform:
    """
    The training transform of RGB images with boxes, masks and labels, before normalization: flip; resize to a random
    size, after a random crop of the image in some of the cases; and a crop to the largest size.

    Args:
        args ([`DetectionAugmentationArguments`]):
            Its options.
        image_processor ([`PiipImageProcessor`]):
            Its `size` is the scale of all sizes.
        image_size (`int`):
            Largest height and width, unless `args` has another.
    """
    max_image_size = args.max_image_size or image_size
    filters = {"interpolation": pil_torch_interpolation_mapping[image_processor.resample], "antialias": True}
    if args.large_scale_jitter is not None:
        resize = v2.ScaleJitter((max_image_size, max_image_size), tuple(args.large_scale_jitter), **filters)
    else:
        resize = build_multi_scale_resize(args, image_processor, filters)
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(args.hflip),
            resize,
            RandomRangeCrop(max_image_size, max_image_size),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
        ]
    )


def build_multi_scale_resize(
    args: DetectionAugmentationArguments, image_processor: BaseImageProcessor, filters: dict
) -> v2.Transform:
    size = image_processor.size
    if not size["shortest_edge"]:
        raise ValueError(
            f"The augmentation keeps the aspect ratio of images: the `size` of the image processor needs a "
            f"'shortest_edge', got {dict(size)}. Change preprocessor_config.json or use --no_augment."
        )

    def resize_shortest(shares: Iterable[float]) -> v2.Transform:
        sizes = [max(round(size["shortest_edge"] * share), 1) for share in shares]
        return v2.RandomShortestSize(sizes, size["longest_edge"], **filters)

    resize = resize_shortest(np.linspace(*args.scale_range, 11))
    smallest, largest = (max(round(size["shortest_edge"] * share), 1) for share in args.crop_range)
    crop = v2.Compose([resize_shortest(args.crop_resize), RandomRangeCrop(smallest, largest), resize])
    return v2.RandomChoice([resize, crop], [1 - args.crop_prob, args.crop_prob])


class DetectionDataset(ImageDataset):
    """
    `pixel_values` of shape `(num_channels, height, width)`, not padded, and `labels` as [`PiipImageProcessor`] makes
    them, out of a split of [`load_object_detection_data`]. With a [`PiipInstanceSegmentationImageProcessor`] and
    segmentations there are `masks` among the labels.
    """

    def read(self, index: int) -> tuple[PIL.Image.Image, dict]:
        """The image and its annotation in the format of the image processor."""
        example = self.dataset[index]
        image = open_image(example["image"], self.describe(index))
        if image.size != (example["width"], example["height"]):
            raise ValueError(
                f"The image {example['image']['path'] or ''} ({self.describe(index)}) has (width, height) "
                f"{image.size}, but its annotation says {(example['width'], example['height'])}: boxes would be in "
                "the wrong places. Correct the annotation."
            )
        return image, {"image_id": example["image_id"], "annotations": json.loads(example["objects"])}

    def prepare(self, image: PIL.Image.Image, annotation: dict) -> dict:
        if self.transform is None:
            features = self.image_processor(image, annotations=annotation, do_pad=False, return_tensors="pt")
            return {name: values[0] for name, values in features.items()}
        pixels = self.image_processor.process_image(image, do_convert_rgb=True)
        objects = [item for item in annotation["annotations"] if not item["iscrowd"]]
        target = self.transform({"image": tv_tensors.Image(pixels)} | self.get_target(objects, *pixels.shape[-2:]))
        pixel_values = self.image_processor(
            target["image"].as_subclass(torch.Tensor), do_resize=False, do_pad=False, return_tensors="pt"
        ).pixel_values[0]
        height, width = pixel_values.shape[-2:]
        boxes = F.convert_bounding_box_format(target["boxes"], new_format=tv_tensors.BoundingBoxFormat.CXCYWH)
        label = {
            "image_id": torch.tensor([annotation["image_id"]]),
            "class_labels": target["labels"],
            "boxes": boxes.as_subclass(torch.Tensor) / torch.tensor([width, height, width, height]),
            "orig_size": torch.tensor(pixels.shape[-2:]),
        }
        if "masks" in target:
            label["masks"] = target["masks"].as_subclass(torch.Tensor)
        return {"pixel_values": pixel_values, "labels": label}

    def get_target(self, objects: list[dict], height: int, width: int) -> dict[str, torch.Tensor]:
        """What the transform changes besides the image."""
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64),
        }
        # an image without objects has masks too, but none
        if all("segmentation" in item for item in objects):
            masks = [decode_segmentation(item["segmentation"], height, width, "An object") for item in objects]
            target["masks"] = tv_tensors.Mask(np.array(masks, dtype=bool).reshape(-1, height, width))
        return target

    def ignore_labels(self, example: dict) -> dict:
        # the evaluation counts every image_id once
        return example


def build_detection_datasets(
    splits: dict,
    image_processor: BaseImageProcessor,
    config: PiipConfig,
    data_args: DetectionDataArguments,
    args: DetectionAugmentationArguments,
    seed: int,
) -> tuple[DetectionDataset | None, DetectionDataset | None]:
    """Checked data: with augmentation for training, without for evaluation; `None` for a split that does not exist."""
    transform = build_detection_transform(args, image_processor, config.image_size) if args.augment else None
    train = validation = None
    if "train" in splits:
        train = DetectionDataset(splits["train"], image_processor, transform, seed, data_args.skip_unreadable)
    if "validation" in splits:
        validation = DetectionDataset(splits["validation"], image_processor, skip_unreadable=data_args.skip_unreadable)
    for dataset in (train, validation):
        if dataset is not None and data_args.check_data:
            check_examples(dataset)
    return train, validation


def load_detection_image_processor(
    model_args: ModelArguments, config: PiipConfig, processor_class: type[BaseImageProcessor]
) -> BaseImageProcessor:
    """The processor of the model, without a center crop, which would cut objects off, and with padding."""
    return load_image_processor(model_args, config, processor_class, do_center_crop=False, do_pad=True)


class DetectionCollator:
    r"""
    Pads the images of a batch with zeros to one size: the largest, rounded up to the divisor of the image processor.

    Args:
        image_processor ([`PiipImageProcessor`]):
            Knows how to pad.
        pad_to (`int`, *optional*):
            Pad training batches to squares of this side instead.

    Returns (of a call):
        `dict`: `pixel_values` `(batch_size, num_channels, height, width)`, `pixel_mask` `(batch_size, height, width)`
        and the list `labels`, with `masks` of the size of `pixel_values`.
    """

    def __init__(self, image_processor: BaseImageProcessor, pad_to: int | None = None):
        self.image_processor = image_processor
        self.pad_to = pad_to

    def __call__(self, examples: list[dict]) -> dict:
        images = [example["pixel_values"] for example in examples]
        options = {}
        # only training examples bring the seed of their augmentation
        if self.pad_to is not None and "seed" in examples[0]:
            largest = max(max(image.shape[-2:]) for image in images)
            if largest > self.pad_to:
                raise ValueError(f"A training image has {largest} pixels, which is more than --pad_to {self.pad_to}.")
            options["pad_size"] = {"height": self.pad_to, "width": self.pad_to}
        batch = self.image_processor(
            images, do_resize=False, do_rescale=False, do_normalize=False, do_pad=True, return_tensors="pt", **options
        )
        labels = [dict(example["labels"]) for example in examples]
        for label in labels:
            if "masks" in label:
                label["masks"] = pad_masks(label["masks"], *batch["pixel_values"].shape[-2:])
        return {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"], "labels": labels}


# Evaluation


class DetectionEvaluator:
    r"""
    COCO results of a data set, batch by batch, on any number of processes. What is kept of a batch are its detections:
    boxes, scores, classes and compressed masks.

    Args:
        dataset ([`DetectionDataset`]):
            The images to evaluate on.
        metric (`str` or `Path`):
            The folder of the metric `mean_ap`.
        label_names (`list[str]`):
            Names of the classes in the order of their ids.
        category_ids (`list[int]`):
            Ids of the same classes in the data.
        with_masks (`bool`, *optional*, defaults to `False`):
            Whether to evaluate masks besides boxes.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        metric: str | Path,
        label_names: list[str],
        category_ids: list[int],
        with_masks: bool = False,
    ):
        self.dataset = dataset
        self.label_names = label_names
        self.category_ids = category_ids
        self.with_masks = with_masks
        self.iou_types = IOU_TYPES if with_masks else {"box": IOU_TYPES["box"]}
        self.metric = evaluate.load(
            str(metric), num_labels=len(label_names), iou_types=list(self.iou_types.values()), keep_in_memory=True
        )
        self.table = dataset.dataset.remove_columns("image")
        self.rows = {image_id: row for row, image_id in enumerate(self.table["image_id"])}

    def add_batch(self, outputs: ModelOutput, labels: list[dict[str, torch.Tensor]]):
        """Takes the output of the model for a batch of this process; all processes must call it equally often."""
        detections = get_detections(self.dataset.image_processor, outputs, labels, self.with_masks)
        # samplers repeat images to give every process the same number; the metric counts an image_id once
        detections = gather_object(detections)
        references = [self.get_reference(detection["image_id"]) for detection in detections]
        self.metric.add_batch(predictions=detections, references=references)

    def get_reference(self, image_id: int) -> dict:
        example = self.table[self.rows[image_id]]
        return example | {"annotations": json.loads(example["objects"])}

    def write_predictions(self, file: str | Path):
        """Writes the detections since the last [`compute`] as COCO results, with the ids of the data."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        results = [result for detection in self.metric.predictions.values() for result in self.list_results(detection)]
        unfinished = file.with_name(f".{file.name}")
        unfinished.write_text(json.dumps(results), encoding="utf-8")
        unfinished.replace(file)

    def list_results(self, detection: dict) -> list[dict]:
        results = [
            {
                "image_id": detection["image_id"],
                "category_id": self.category_ids[class_id],
                "bbox": [round(number, 3) for number in box],
                "score": score,
            }
            for class_id, box, score in zip(
                *(detection[name].tolist() for name in ("labels", "boxes", "scores")), strict=True
            )
        ]
        for result, mask in zip(results, detection.get("masks", [])):
            result["segmentation"] = mask
        return results

    def compute(self) -> dict[str, float]:
        """
        Results of all batches since the last call: `box_ap` (IoU 0.5 to 0.95), `box_ap50`, `box_ap75`, by size of the
        objects `box_ap_small`, `_medium` and `_large`, average recall `box_ar1`, `box_ar10`, `box_ar100`,
        `box_ar_small` ..., and `box_ap_class_<name>`; the same with `mask_`. There is no number where there are no
        objects.
        """
        results = self.metric.compute()
        named = {}
        for kind, iou_type in self.iou_types.items():
            values = {name: results[f"{iou_type}_{name}"] for name in self.metric.names}
            per_class = zip(self.label_names, results[f"{iou_type}_per_class_ap"])
            values |= {f"ap_class_{label}": ap for label, ap in per_class}
            named |= {f"{kind}_{name}": value for name, value in values.items() if not np.isnan(value)}
        return named


@torch.no_grad()
def get_detections(
    image_processor: BaseImageProcessor,
    outputs: ModelOutput,
    labels: list[dict[str, torch.Tensor]],
    with_masks: bool = False,
) -> list[dict]:
    """
    Per image of a batch `image_id`, `scores` `(num_detections,)`, class ids `labels` `(num_detections,)`, `boxes`
    `(num_detections, 4)` as (left, top, width, height) in pixels of the image file, all as arrays, and with masks a
    list `masks` of compressed run-length encodings.
    """
    sizes = [tuple(label["orig_size"].tolist()) for label in labels]
    results = image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    detections = []
    for label, result in zip(labels, results, strict=True):
        boxes = result["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        detection = {"scores": result["scores"].float(), "labels": result["labels"], "boxes": boxes.float()}
        detection = {name: values.cpu().numpy() for name, values in detection.items()}
        detections.append({"image_id": int(label["image_id"]), **detection})
    if with_masks:
        segments = image_processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_coco_annotation=True
        )
        for detection, result, size in zip(detections, segments, sizes, strict=True):
            detection["masks"] = [compress_mask(rle, *size) for rle in result["segmentation"]]
    return detections


def compress_mask(rle: dict, height: int, width: int) -> dict:
    """A run-length encoding with its counts as text."""
    compressed = coco_masks.frPyObjects(rle, height, width)
    counts = compressed["counts"]
    return {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else counts}


class DetectionTrainer(PiipTrainer):
    r"""
    [`PiipTrainer`] that logs the terms of the loss by name and evaluates with a [`DetectionEvaluator`].

    Args:
        evaluator ([`DetectionEvaluator`], *optional*):
            Gives the results; its detections are in `predictions.json` in the output folder after every evaluation.
        args, kwargs:
            As for [`PiipTrainer`].
    """

    def __init__(self, *args, evaluator: DetectionEvaluator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self.loss_meter = LossMeter()

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.loss_meter.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        # the other calls are for results
        if "loss" in logs:
            logs = self.loss_meter.compute(self.accelerator.gather) | logs
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        self.evaluator.add_batch(outputs, inputs["labels"])
        return outputs.loss.detach().mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.should_save:
            self.evaluator.write_predictions(Path(self.args.output_dir, "predictions.json"))
        results = self.evaluator.compute()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in results.items()})
        return output


@torch.no_grad()
def evaluate_detector(
    accelerator: Accelerator,
    evaluator: DetectionEvaluator,
    predictions_file: Path,
    model: nn.Module,
    dataloader: DataLoader,
) -> dict[str, float]:
    """Results of a model, whose detections are written to a file, in a loop on Accelerate."""
    for batch in tqdm(dataloader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            outputs = model(**batch)
        evaluator.add_batch(outputs, batch["labels"])
    if accelerator.is_main_process:
        evaluator.write_predictions(predictions_file)
    return evaluator.compute()


# Previews


def build_detection_previews(
    dataset: DetectionDataset | None, num_previews: int, draw: Callable[..., PIL.Image.Image]
) -> Callable[[nn.Module], PIL.Image.Image] | None:
    """
    What draws the predictions of a model for some images of the data set; `None` where there is nothing to draw.

    Args:
        dataset ([`DetectionDataset`], *optional*):
            The images to evaluate on.
        num_previews (`int`):
            How many of them.
        draw (`Callable`):
            A function of `visualization.py`: takes `model`, `image_processor` and `examples`, pairs of image and
            annotation.
    """
    if dataset is None or num_previews < 1:
        return None
    indices = np.linspace(0, len(dataset) - 1, min(num_previews, len(dataset))).astype(int).tolist()
    examples = [dataset.read_readable(index)[1] for index in indices]
    return partial(draw, image_processor=dataset.image_processor, examples=examples)
