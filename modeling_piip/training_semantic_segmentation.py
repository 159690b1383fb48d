# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
What the scripts for semantic segmentation share: folders of images and label maps, Hub data sets, the official
augmentation, results and previews. Needs the `train` extra.

A folder holds, for any names of the splits:

    images/train/*.jpg    images/validation/*.jpg    images of any format
    labels/train/*.png    labels/validation/*.png    under the name of its image, a map with one channel of class ids;
                                                     255 marks pixels without a class
    classes.txt                                      the name of id 0 in the first line, of id 1 in the second, ...

The folder of the maps may be called "annotations" too. `classes.json` may stand for `classes.txt`: a list of names, or
a dictionary from ids to names.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import logging

from .configuration_piip import PiipConfig
from .data import (
    ImageDataArguments,
    ImageDataset,
    check_examples,
    check_shares,
    choose_examples,
    find_column,
    load_splits,
    open_image,
)
from .image_processing_piip import (
    IGNORED_LABEL,
    PiipImageProcessor,
    get_resized_size,
    read_segmentation_map,
    reduce_labels,
)
from .training import ModelArguments, load_image_processor
from .visualization import draw_segmentation_previews


logger = logging.get_logger(__name__)

LABEL_FOLDERS = ("labels", "annotations")
LABEL_COLUMNS = ("label", "annotation", "labels", "mask")
LAYOUT = (
    "Expected images/<split>/*.jpg and, under the same names, labels/<split>/*.png with a class id per pixel, and "
    "classes.txt with a class name per line."
)


@dataclass
class SegmentationDataArguments(ImageDataArguments):
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder with images/<split>/*.jpg, labels/<split>/*.png and classes.txt."},
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the maps of class ids. Default: 'label' or 'annotation'."}
    )
    class_names_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with a class name per line, or JSON file with a list of names or a dictionary from ids "
            "to names. Default: classes.txt or classes.json in --data_dir, id2label.json in the Hub data set."
        },
    )
    do_reduce_labels: bool | None = field(
        default=None,
        metadata={
            "help": "Whether id 0 of the maps means that a pixel has no class, as in ADE20K, and the first class has "
            "the id 1. Default: as the image processor of the checkpoint."
        },
    )
    check_data: bool = field(
        default=True, metadata={"help": "Read all images and maps before the training, to find unusable ones."}
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Warn about files that cannot be read and go on without them; else stop."}
    )
    num_previews: int = field(
        default=6,
        metadata={"help": "Draw this many validation images after every evaluation, in OUTPUT_DIR/previews."},
    )


@dataclass
class SegmentationAugmentationArguments:
    """What happens to training images; the defaults are those of the published PIIP segmenters."""

    augment: bool = field(
        default=True, metadata={"help": "Change training images at random; else process them as for evaluation."}
    )
    crop_size: int | None = field(
        default=None, metadata={"help": "Side of the random crops in pixels. Default: the image size of the model."}
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Smallest and largest random factor to the size that the image processor resizes to."},
    )
    max_class_ratio: float = field(
        default=0.75, metadata={"help": "Draw a crop again, up to ten times, if one class has more of it than this."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip. Use 0 for digits or text."})
    photometric: float = field(
        default=0.5,
        metadata={"help": "Probability of each of: another brightness, contrast, saturation, hue."},
    )

    def __post_init__(self):
        check_shares(self, "max_class_ratio", "hflip", "photometric")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"--scale_range needs two rising numbers above 0, got {self.scale_range}.")
        if self.crop_size is not None and self.crop_size < 1:
            raise ValueError(f"--crop_size must be at least 1 pixel, got {self.crop_size}.")


# Loading


def load_semantic_segmentation_data(
    args: SegmentationDataArguments, seed: int = 0, model_labels: list[str] | None = None, training: bool = True
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """
    Loads images with maps of class ids.

    Args:
        args ([`SegmentationDataArguments`]):
            Where the data is.
        seed (`int`, *optional*, defaults to 0):
            Chooses the images of `--train_val_split` and `--max_..._samples`.
        model_labels (`list[str]`, *optional*):
            Class names of the checkpoint; without `training` they stand in where the data brings no names.
        training (`bool`, *optional*, defaults to `True`):
            Whether the data is trained on.

    Returns:
        `tuple(dict[str, datasets.Dataset], list[str])`: the splits `"train"` and `"validation"`, as far as there are
        any, with the encoded images `image` and `label` (see [`open_image`]), and the class names.

    Raises:
        ValueError: If there is no usable data; the message says what is missing and what to do.
    """
    splits = load_splits(args, load_label_folder)
    features = next(iter(splits.values())).features
    usual_label = next((name for name in LABEL_COLUMNS if name in features), LABEL_COLUMNS[0])
    columns = {
        find_column(splits, args.image_column_name, datasets.Image, "image", "--image_column_name"): "image",
        find_column(splits, args.label_column_name, datasets.Image, usual_label, "--label_column_name"): "label",
    }
    for split, dataset in splits.items():
        dataset = dataset.select_columns(list(columns)).rename_columns(columns)
        for column in columns.values():
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        splits[split] = dataset
    label_names = load_class_names(args, None if training else model_labels)
    return choose_examples(splits, args, seed), label_names


def load_label_folder(folder: str) -> dict[str, datasets.Dataset]:
    """The splits of a folder as the module describes it; images without splits are the split "train"."""
    root = Path(folder)
    images = root / "images"
    labels = next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
    if not images.is_dir() or labels is None:
        raise ValueError(f"--data_dir {folder} has no folders 'images' and 'labels'. {LAYOUT}")
    names = sorted(path.name for path in images.iterdir() if path.is_dir())
    if not names:
        return {"train": pair_files(images, labels, "train")}
    unlabelled = [name for name in names if not (labels / name).is_dir()]
    if unlabelled:
        logger.warning(f"Left out, because there is no folder of the same name in {labels}: {', '.join(unlabelled)}.")
    return {name: pair_files(images / name, labels / name, name) for name in names if name not in unlabelled}


def pair_files(images: Path, labels: Path, split: str) -> datasets.Dataset:
    """Columns `image` and `label` with the files of the same name."""
    extensions = PIL.Image.registered_extensions()
    image_files = sorted(file for file in images.rglob("*") if file.suffix.lower() in extensions)
    if not image_files:
        raise ValueError(f"{images} holds no images. {LAYOUT}")
    label_files = [(labels / file.relative_to(images)).with_suffix(".png") for file in image_files]
    missing = [file for file in label_files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(image_files)} images in {images} have no map, the first one would be "
            f"{missing[0]}. Add the maps or remove these images."
        )
    columns = {"image": list(map(str, image_files)), "label": list(map(str, label_files))}
    encoded = datasets.Image(decode=False)
    features = datasets.Features({"image": encoded, "label": encoded})
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def load_class_names(args: SegmentationDataArguments, model_labels: list[str] | None) -> list[str]:
    """Class names in the order of their ids: of the file that was asked for, of the data, or of the checkpoint."""
    if args.class_names_file is not None:
        return read_class_names(Path(args.class_names_file))
    if args.data_dir is None:
        try:
            file = huggingface_hub.hf_hub_download(args.dataset_name, "id2label.json", repo_type="dataset")
            return read_class_names(Path(file))
        except (EntryNotFoundError, HFValidationError, OSError):  # the second one for a local folder
            logger.info(f"{args.dataset_name} has no id2label.json.")
    else:
        for name in ("classes.txt", "classes.json"):
            if (Path(args.data_dir) / name).is_file():
                return read_class_names(Path(args.data_dir) / name)
    if model_labels is None:
        raise ValueError(
            "The data does not name its classes: write classes.txt with a class name per line (the first one for id "
            "0) into --data_dir, or name such a file with --class_names_file."
        )
    return model_labels


def read_class_names(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"--class_names_file {file} is not a file.")
    text = file.read_text(encoding="utf-8")
    names = json.loads(text) if file.suffix == ".json" else text.splitlines()
    if isinstance(names, dict):
        ids = sorted(map(int, names))
        if ids != list(range(len(names))):
            raise ValueError(f"{file} must name the ids 0, 1, 2, ... without a gap, got {ids}.")
        names = [names[str(class_id)] for class_id in ids]
    names = [str(name).strip() for name in names]
    for class_id, name in enumerate(names):
        if not name or name in names[:class_id]:
            raise ValueError(
                f"{file} gives id {class_id} the name '{name}', but every class needs a name of its own. Ids without "
                "a class can be called 'unused 7'."
            )
    if len(names) < 2:
        raise ValueError(f"{file} names {len(names)} classes: a segmenter needs at least two.")
    return names


def load_segmentation_image_processor(
    model_args: ModelArguments,
    config: PiipConfig,
    data_args: SegmentationDataArguments,
    model_labels: list[str] | None,
    label_names: list[str],
) -> PiipImageProcessor:
    """The processor of the model, without a center crop, which would not show the whole image."""
    options = {"do_center_crop": False, "do_pad": False}
    if data_args.do_reduce_labels is not None:
        options["do_reduce_labels"] = data_args.do_reduce_labels
    image_processor = load_image_processor(model_args, config, **options)
    if image_processor.do_reduce_labels and data_args.do_reduce_labels is None and label_names != model_labels:
        raise ValueError(
            "The image processor of the model takes id 0 of a map for no class, as in ADE20K, but your classes are "
            f"others ({', '.join(label_names[:5])}, ...): say --do_reduce_labels true, or false if id 0 is a class."
        )
    return image_processor


# Augmentation


class RandomScale(v2.Transform):
    """Resizes to the size that the image processor resizes to, times a random factor."""

    def __init__(self, image_processor: BaseImageProcessor, scale_range: list[float]):
        super().__init__()
        self.size = image_processor.size
        self.interpolation = pil_torch_interpolation_mapping[image_processor.resample]
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list) -> dict:
        factor = torch.empty(()).uniform_(*self.scale_range).item()
        sides = get_resized_size(*F.get_size(flat_inputs[0]), self.size)
        return {"size": [max(round(side * factor), 1) for side in sides]}

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        return F.resize(inpt, interpolation=self.interpolation, antialias=True, **params)


class RandomClassRatioCrop(v2.Transform):
    """
    Random crop in which no class has more than a share of the pixels, and there is more than one class, if ten tries
    find such a crop. Images that are smaller stay as they are.
    """

    def __init__(self, size: int, max_class_ratio: float):
        super().__init__()
        self.size = size
        self.max_class_ratio = max_class_ratio

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        (class_ids,) = (inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask))
        for _ in range(10):
            place = {}
            for start, side, length in zip(("top", "left"), ("height", "width"), class_ids.shape):
                place[side] = min(self.size, length)
                place[start] = int(torch.randint(length - place[side] + 1, ()))
            crop = F.crop(class_ids, **place)
            counts = torch.bincount(crop[crop != IGNORED_LABEL])
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_ratio * counts.sum():
                break
        return place

    def transform(self, inpt: torch.Tensor, params: dict[str, int]) -> torch.Tensor:
        return F.crop(inpt, **params)


class SegmentationTransform:
    r"""
    The official training transform of an RGB image `(3, height, width)` and its map `(height, width)`: random scale,
    crop, flip and colours. Smaller images are padded to `crop_size`: with zeros after normalization, the map with 255.
    """

    def __init__(self, args: SegmentationAugmentationArguments, image_processor: BaseImageProcessor, crop_size: int):
        jitters = [{"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
        self.augment = v2.Compose(
            [
                RandomScale(image_processor, args.scale_range),
                RandomClassRatioCrop(crop_size, args.max_class_ratio),
                v2.RandomHorizontalFlip(args.hflip),
                *(v2.RandomApply([v2.ColorJitter(**jitter)], args.photometric) for jitter in jitters),
            ]
        )
        self.image_processor = image_processor
        self.crop_size = crop_size

    def __call__(self, image: torch.Tensor, class_ids: np.ndarray) -> dict[str, torch.Tensor]:
        image, class_ids = self.augment(tv_tensors.Image(image), tv_tensors.Mask(class_ids))
        height, width = class_ids.shape
        padding = [0, 0, self.crop_size - width, self.crop_size - height]
        pixel_values = self.image_processor(
            image.as_subclass(torch.Tensor), do_resize=False, do_pad=False, return_tensors="pt"
        ).pixel_values[0]
        return {
            "pixel_values": F.pad(pixel_values, padding),
            "labels": F.pad(class_ids, padding, fill=IGNORED_LABEL).as_subclass(torch.Tensor),
        }


class SemanticSegmentationDataset(ImageDataset):
    """
    `pixel_values` of shape `(num_channels, height, width)` and `labels` of shape `(label_height, label_width)` out of
    a split of [`load_semantic_segmentation_data`]. For evaluation the labels keep the size of the file, on which
    results are defined.
    """

    def __init__(self, *args, num_labels: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_labels = num_labels

    def read(self, index: int) -> tuple[PIL.Image.Image, np.ndarray]:
        example = self.dataset[index]
        image, label = (open_image(example[column], self.describe(index)) for column in ("image", "label"))
        name = f"The map {example['label']['path'] or ''} of {self.describe(index)}"
        class_ids = read_segmentation_map(label, name)
        if class_ids.shape != image.size[::-1]:
            raise ValueError(
                f"{name} has (height, width) {class_ids.shape}, but the image has {image.size[::-1]}: a map needs the "
                "size of its image."
            )
        if self.image_processor.do_reduce_labels:
            class_ids = reduce_labels(class_ids)
        unknown = class_ids[(class_ids != IGNORED_LABEL) & (class_ids >= self.num_labels)]
        if len(unknown) > 0:
            reduced = " after --do_reduce_labels" if self.image_processor.do_reduce_labels else ""
            raise ValueError(
                f"{name} holds the class id {unknown[0]}{reduced}, but there are {self.num_labels} class names (ids 0 "
                f"to {self.num_labels - 1}; {IGNORED_LABEL} is ignored). Name all classes, correct the map, or use "
                "--do_reduce_labels where id 0 means that a pixel has no class."
            )
        return image, class_ids

    def prepare(self, image: PIL.Image.Image, class_ids: np.ndarray) -> dict[str, torch.Tensor]:
        if self.transform is not None:
            pixels = self.image_processor.process_image(image, do_convert_rgb=True)
            return self.transform(torch.as_tensor(pixels), class_ids)
        if self.seed is None:
            pixel_values = self.image_processor(image, return_tensors="pt").pixel_values[0]
            return {"pixel_values": pixel_values, "labels": torch.from_numpy(class_ids)}
        features = self.image_processor(image, class_ids, do_reduce_labels=False, return_tensors="pt")
        return {name: values[0] for name, values in features.items()}

    def ignore_labels(self, example: dict) -> dict:
        return example | {"labels": torch.full_like(example["labels"], IGNORED_LABEL)}


def build_segmentation_datasets(
    splits: dict,
    image_processor: BaseImageProcessor,
    config: PiipConfig,
    data_args: SegmentationDataArguments,
    args: SegmentationAugmentationArguments,
    seed: int,
) -> tuple[SemanticSegmentationDataset | None, SemanticSegmentationDataset | None]:
    """Checked data: with augmentation for training, without for evaluation; `None` for a split that does not exist."""
    transform = None
    if args.augment:
        transform = SegmentationTransform(args, image_processor, args.crop_size or config.image_size)
    options = {"num_labels": config.num_labels, "skip_unreadable": data_args.skip_unreadable}
    train = validation = None
    if "train" in splits:
        train = SemanticSegmentationDataset(splits["train"], image_processor, transform, seed, **options)
    if "validation" in splits:
        validation = SemanticSegmentationDataset(splits["validation"], image_processor, **options)
    for dataset in (train, validation):
        if dataset is not None and data_args.check_data:
            check_examples(dataset)
    return train, validation


def check_last_batch(train_dataset: SemanticSegmentationDataset, batch_size: int):
    """Batch norm cannot train on a last batch of one image."""
    if len(train_dataset) % batch_size == 1 % batch_size:
        raise ValueError(
            f"{len(train_dataset)} training images in batches of {batch_size} leave one image for the last batch, on "
            "which the batch norm of UperNet cannot train: choose another --per_device_train_batch_size (at least 2), "
            f"or leave the image out with --max_train_samples {len(train_dataset) - 1}."
        )


def collate_maps(examples: list[dict]) -> dict[str, torch.Tensor]:
    """`pixel_values` `(batch_size, num_channels, height, width)` and `labels` `(batch_size, height, width)`."""
    sizes = {tuple(example["labels"].shape) for example in examples}
    if len(sizes) > 1:
        raise ValueError(
            f"The images of a batch have several sizes, such as {' and '.join(map(str, sorted(sizes)[:2]))}: evaluate "
            "with --per_device_eval_batch_size 1, and train with augmentation (which crops) or on images of one size."
        )
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "labels")}


# Results


def get_flat_maps(
    image_processor: PiipImageProcessor, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Predicted and true class ids, both `(batch_size, label_height * label_width)`: in this shape maps of several sizes
    can be padded and gathered.
    """
    sizes = [labels.shape[1:]] * len(labels)
    maps = image_processor.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), sizes)
    return torch.stack(maps).flatten(1), labels.flatten(1)


def name_results(results: dict[str, float | list[float]], label_names: list[str]) -> dict[str, float]:
    """Results of the metric with a number `iou_<class>` for every class that occurs."""
    named = {name: results[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")}
    per_class = zip(label_names, results["per_category_iou"])
    return named | {f"iou_{label}": iou for label, iou in per_class if not np.isnan(iou)}


def build_previews(
    dataset: SemanticSegmentationDataset | None, num_previews: int
) -> Callable[[torch.nn.Module], PIL.Image.Image] | None:
    """Draws the predictions of a model for some images of the data set; `None` where there is nothing to draw."""
    if dataset is None or num_previews < 1:
        return None
    indices = np.linspace(0, len(dataset) - 1, min(num_previews, len(dataset))).astype(int).tolist()
    examples = [dataset.read_readable(index)[1] for index in indices]
    return partial(draw_segmentation_previews, image_processor=dataset.image_processor, examples=examples)
