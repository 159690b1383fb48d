# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Data of the training scripts: image folders and Hub data sets, augmentation, batches. Needs the `train` extra.

All randomness of the augmentation comes from the seed, the epoch and the index of an image, never from a global random
state. So a resumed run sees the same images as one that was never interrupted, with any number of workers.
"""

import contextlib
import io
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from tqdm import tqdm
from transformers import BaseImageProcessor
from transformers.utils import logging


logger = logging.get_logger(__name__)

EVALUATION_SPLITS = ("validation", "test")


@dataclass
class ImageDataArguments:
    """Where the images are: a data set of the Hub or a local folder."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hugging Face Hub, for example 'ethz/food101'."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub data set, if it has several."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Local folder with one folder of images per class in train/ and in validation/ or test/."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: 'validation', or else 'test'."}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of every class of the training split to evaluate on, for data without another split."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images. Default: the only one that holds images."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "Column with the classes. Default: 'label', or else the only one with classes."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images only, drawn at random."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many images only, drawn at random."}
    )

    def __post_init__(self):
        if (self.dataset_name is None) == (self.data_dir is None):
            raise ValueError(
                "Say where the images are: either --dataset_name (Hub) or --data_dir (local folder), got "
                f"--dataset_name {self.dataset_name} and --data_dir {self.data_dir}."
            )
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split must be between 0 and 1, got {self.train_val_split}.")
        check_at_least(1, self, "max_train_samples", "max_eval_samples")


@dataclass
class AugmentationArguments:
    """What happens to training images. The help texts name the values of the published PIIP classifiers."""

    augment: bool = field(
        default=True, metadata={"help": "Change training images at random; else process them as for evaluation."}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Smallest and largest share of the image area in a random crop (official: 0.08 1.0)."},
    )
    hflip: float = field(
        default=0.5, metadata={"help": "Probability of a horizontal flip (official: 0.5). Use 0 for digits or text."}
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Strength of random brightness, contrast and saturation; not used with --auto_augment."},
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "Policy in timm's notation (official: rand-m9-mstd0.5-inc1)."}
    )
    interpolation: str = field(
        default="bicubic",
        metadata={"help": "Filter of the random crop.", "choices": ["bicubic", "bilinear", "nearest", "random"]},
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability of overwriting a random rectangle with noise (official: 0)."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup, 0 for none (official: 0.8)."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix, 0 for none (official: 1.0)."})
    mixup_prob: float = field(
        default=1.0, metadata={"help": "Probability that a batch is mixed, by mixup or CutMix in equal shares."}
    )
    smoothing: float = field(
        default=0.0, metadata={"help": "Label smoothing, also of mixed labels (official: 0.1); in training only."}
    )

    def __post_init__(self):
        check_shares(self, "hflip", "random_erasing", "mixup_prob", "smoothing")
        for name in ("color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"--crop_scale needs two rising numbers above 0 and up to 1, got {self.crop_scale}.")


def check_shares(args, *names: str):
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} is a share and must be from 0 to 1, got {getattr(args, name)}.")


def check_at_least(smallest: int, args, *names: str):
    """Checks the options that are not `None`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} must be at least {smallest}, got {value}.")


# Loading


def load_image_classification_data(
    args: ImageDataArguments, seed: int = 0, model_labels: list[str] | None = None, training: bool = True
) -> tuple[dict, list[str]]:
    """
    Loads and checks a labelled image data set.

    Args:
        args ([`ImageDataArguments`]):
            Where the data is.
        seed (`int`, *optional*, defaults to 0):
            Chooses the images of `--train_val_split` and `--max_..._samples`.
        model_labels (`list[str]`, *optional*):
            Class names of the checkpoint. If the data has the same classes they get the ids of the checkpoint.
        training (`bool`, *optional*, defaults to `True`):
            Whether the data is trained on. If not, some of the classes of the checkpoint are enough.

    Returns:
        `tuple(dict[str, datasets.Dataset], list[str])`: the splits `"train"` and `"validation"`, as far as there are
        any, with the columns `image` (encoded, see [`open_image`]) and `label` (class id), and the class names.

    Raises:
        ValueError: If there is no usable data; the message says what is missing and what to do.
    """
    splits = load_splits(args, load_image_folder)
    label_column = find_column(splits, args.label_column_name, datasets.ClassLabel, "label", "--label_column_name")
    image_column = find_column(splits, args.image_column_name, datasets.Image, "image", "--image_column_name")
    data_labels = get_label_names(splits, label_column)
    label_names = match_label_names(data_labels, model_labels, training)
    for split, dataset in splits.items():
        dataset = dataset.select_columns([image_column, label_column])
        dataset = dataset.rename_columns({image_column: "image", label_column: "label"})
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
        splits[split] = set_class_ids(dataset, data_labels, label_names, split)
    check_classes(splits, data_labels)
    return choose_examples(splits, args, seed, stratify_by_column="label"), label_names


def load_splits(
    args: ImageDataArguments, load_folder: Callable[[str], dict[str, datasets.Dataset]]
) -> dict[str, datasets.Dataset]:
    """The splits "train" and "validation" as they are, whatever they are called in the data."""
    if args.data_dir is None:
        found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        found = load_folder(args.data_dir)
    splits = {}
    if args.train_split in found:
        splits["train"] = found[args.train_split]
    wanted = EVALUATION_SPLITS if args.eval_split is None else (args.eval_split,)
    evaluation = next((split for split in wanted if split in found), None)
    if evaluation is not None and args.train_val_split is None:
        splits["validation"] = found[evaluation]
    if args.eval_split is not None and evaluation is None:
        raise ValueError(f"--eval_split {args.eval_split} is not among the splits of the data: {', '.join(found)}.")
    if not splits:
        raise ValueError(
            f"The data has the splits {', '.join(found)}, but neither the training split '{args.train_split}' nor one "
            "to evaluate on: choose them with --train_split and --eval_split."
        )
    return splits


def choose_examples(
    splits: dict[str, datasets.Dataset], args: ImageDataArguments, seed: int, stratify_by_column: str | None = None
) -> dict[str, datasets.Dataset]:
    """Holds out `--train_val_split` of the training split, and limits the splits to `--max_..._samples`."""
    if args.train_val_split is not None and "train" in splits:
        parts = splits["train"].train_test_split(
            args.train_val_split, stratify_by_column=stratify_by_column, seed=seed
        )
        splits = {"train": parts["train"], "validation": parts["test"]}
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, dataset in splits.items():
        if limits[split] is not None and limits[split] < len(dataset):
            splits[split] = dataset.shuffle(seed=seed).select(range(limits[split]))
    return splits


def load_image_folder(folder: str) -> datasets.DatasetDict:
    if not os.path.isdir(folder):
        raise ValueError(f"--data_dir {folder} is not a folder.")
    extensions = PIL.Image.registered_extensions()
    files = (file for _, _, names in os.walk(folder, followlinks=True) for file in names)
    if not any(os.path.splitext(file)[1].lower() in extensions for file in files):
        raise ValueError(
            f"--data_dir {folder} holds no images. Expected one folder of images per class: train/<class>/*.jpg and "
            "validation/<class>/*.jpg (or test/), or <class>/*.jpg with --train_val_split."
        )
    return datasets.load_dataset("imagefolder", data_dir=os.path.abspath(folder), drop_labels=False)


def find_column(
    splits: dict[str, datasets.Dataset], name: str | None, feature_class: type, usual_name: str, option: str
) -> str:
    features = next(iter(splits.values())).features
    candidates = [column for column, feature in features.items() if isinstance(feature, feature_class)]
    if name is None:
        if usual_name in features:
            return usual_name
        if len(candidates) == 1:
            return candidates[0]
    elif name in features:
        return name
    missing = f"has no column '{name}'" if name is not None else f"does not show which column is the {usual_name}"
    raise ValueError(f"The data {missing}: choose {option} among {', '.join(features)}.")


def read_column(dataset: datasets.Dataset, column: str) -> list:
    return dataset.with_format("arrow")[:].column(column).to_pylist()


def get_label_names(splits: dict[str, datasets.Dataset], column: str) -> list[str]:
    """Class names of the data; without any, the sorted strings or `"0"`, `"1"`, ... up to the largest number."""
    feature = next(iter(splits.values())).features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = {value for dataset in splits.values() for value in read_column(dataset, column)} - {None}
    if values and all(isinstance(value, str) for value in values):
        return sorted(values)
    if values and all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values) + 1)]
    raise ValueError(f"The column '{column}' holds {feature}: expected one class, as text or as a number, per image.")


def match_label_names(data_labels: list[str], model_labels: list[str] | None, training: bool) -> list[str]:
    """The class names in the order of the ids: that of the checkpoint if it has these classes."""
    data, model = set(data_labels), set(model_labels or [])
    return model_labels if data == model or (not training and data < model) else data_labels


def set_class_ids(
    dataset: datasets.Dataset, data_labels: list[str], label_names: list[str], split: str
) -> datasets.Dataset:
    """Turns labels, which are text or positions in `data_labels`, into positions in `label_names`."""
    labels = read_column(dataset, "label")
    for index, label in enumerate(labels):
        if label is None or (isinstance(label, int) and not 0 <= label < len(data_labels)):
            raise ValueError(
                f"Image {index} of the {split} split has the label {label}, but there are {len(data_labels)} classes "
                f"(ids 0 to {len(data_labels) - 1}). Correct its label or remove the image."
            )
    if isinstance(dataset.features["label"], datasets.ClassLabel) and data_labels == label_names:
        return dataset
    ids = {name: class_id for class_id, name in enumerate(label_names)}
    class_ids = [ids[label if isinstance(label, str) else data_labels[label]] for label in labels]
    feature = datasets.ClassLabel(names=label_names)
    return dataset.remove_columns("label").add_column("label", class_ids, feature=feature)


def check_classes(splits: dict[str, datasets.Dataset], data_labels: list[str]):
    if len(data_labels) < 2:
        raise ValueError(
            f"The data has {len(data_labels)} class ({', '.join(data_labels)}): a classifier needs at least two. In a "
            "local folder every class is a folder, for example train/<class>/*.jpg."
        )
    present = {
        split: {dataset.features["label"].int2str(class_id) for class_id in read_column(dataset, "label")}
        for split, dataset in splits.items()
    }
    if len(present) < 2:
        return
    unknown = sorted(present["validation"] - present["train"])
    if unknown:
        raise ValueError(
            f"The split to evaluate on has classes without a training image: {', '.join(unknown)}. Both splits need "
            "the same classes, under the same names."
        )
    unused = sorted(present["train"] - present["validation"])
    if unused:
        logger.warning(f"The split to evaluate on has no image of {len(unused)} classes: {', '.join(unused[:10])}.")


class UnreadableImageError(ValueError):
    """An image file is missing, truncated or damaged."""


def open_image(encoded: dict | None, description: str) -> PIL.Image.Image:
    """
    Decodes an example of a `datasets.Image(decode=False)` column.

    Raises:
        UnreadableImageError: If the image cannot be read or is null; the message names its file and `description`.
    """
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise UnreadableImageError(f"The data holds null instead of an image file ({description}): remove that row.")
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    try:
        image = PIL.Image.open(source)
        image.load()
        return PIL.ImageOps.exif_transpose(image)
    # Pillow reports some damaged files as SyntaxError, and too many pixels as an error of no other kind
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"Cannot read the image {encoded['path'] or 'without a file name'} ({description}): {error}. Repair the "
            "file or remove it."
        ) from error


# Augmentation


def get_input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that the model trains on."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    if size["height"] is None or size["width"] is None:
        raise ValueError(f"Training needs images of one size: set `height` and `width` of the processor, got {size}.")
    return size["height"], size["width"]


def build_train_transform(
    args: AugmentationArguments, image_processor: BaseImageProcessor
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """timm's training transform, at the size and with the statistics of the processor; takes RGB images."""
    try:
        return create_transform(
            input_size=(3, *get_input_size(image_processor)),
            is_training=True,
            scale=tuple(args.crop_scale),
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.auto_augment,
            interpolation=args.interpolation,
            re_prob=args.random_erasing,
            re_mode="pixel",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"timm does not know the policy --auto_augment {args.auto_augment}; an example is rand-m9-mstd0.5-inc1."
        ) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch on the CPU, and leaves their random states as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class ImageDataset(torch.utils.data.Dataset):
    r"""
    Model inputs out of a data set with images; in training also the `seed` of the random choices. Subclasses read and
    prepare an example.

    Args:
        dataset (`datasets.Dataset`):
            Columns `image` and `label`.
        image_processor ([`PiipImageProcessor`]):
            Converts every image to RGB; without `transform` it does all the processing.
        transform (`Callable`, *optional*):
            Random transform in training.
        seed (`int`, *optional*):
            Makes it training data: with the epoch and the index of an image it decides every random choice.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether the next image takes the place of one that cannot be read, with a warning; else that is an error.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_processor: BaseImageProcessor,
        transform: Callable | None = None,
        seed: int | None = None,
        skip_unreadable: bool = False,
    ):
        self.dataset = dataset
        self.image_processor = image_processor
        self.transform = transform
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        # in shared memory, for workers that live longer than an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def read(self, index: int) -> tuple:
        """Image and label from the file."""
        raise NotImplementedError

    def prepare(self, image: PIL.Image.Image, label) -> dict:
        """Model inputs."""
        raise NotImplementedError

    def ignore_labels(self, example: dict) -> dict:
        """The same model inputs, but with labels that do not count."""
        raise NotImplementedError

    def set_epoch(self, epoch: int):
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if self.seed is None:
            found, contents = self.read_readable(index)
            example = self.prepare(*contents)
            # an image must not count twice
            return example if found == index else self.ignore_labels(example)
        seed = int(np.random.SeedSequence([self.seed, self.epoch.item(), index]).generate_state(1)[0])
        with seeded(seed):
            return self.prepare(*self.read_readable(index)[1]) | {"seed": seed}

    def read_readable(self, index: int) -> tuple[int, tuple]:
        """The first example from `index` on that can be read, and its index."""
        for found in (*range(index, len(self)), *range(index)):
            try:
                return found, self.read(found)
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise
                logger.warning(f"{error} The next image takes its place.")
        raise UnreadableImageError(f"None of the {len(self)} images can be read.")

    def describe(self, index: int) -> str:
        return f"image {index} of the {self.dataset.split or 'whole'} split"


def check_examples(dataset: ImageDataset):
    """
    Reads all examples, so that unusable ones are named before a training and not in the middle of it. With
    `skip_unreadable` images that cannot be read are left out.
    """

    def is_readable(index: int) -> bool:
        try:
            dataset.read(index)
        except UnreadableImageError as error:
            if not dataset.skip_unreadable:
                raise
            logger.warning(f"{error} It is left out.")
            return False
        return True

    with ThreadPoolExecutor() as pool:
        indices = range(len(dataset))
        flags = list(tqdm(pool.map(is_readable, indices), desc="Checking the images", total=len(indices), leave=False))
    if not any(flags):
        raise UnreadableImageError(f"None of the {len(dataset)} images can be read.")
    if not all(flags):
        dataset.dataset = dataset.dataset.select([index for index in indices if flags[index]])


class ImageClassificationDataset(ImageDataset):
    """
    `pixel_values` of shape `(num_channels, height, width)` and the class id `labels` out of a split of
    [`load_image_classification_data`].
    """

    def read(self, index: int) -> tuple[PIL.Image.Image, int]:
        example = self.dataset[index]
        return open_image(example["image"], self.describe(index)), example["label"]

    def prepare(self, image: PIL.Image.Image, label: int) -> dict:
        if self.transform is None:
            pixel_values = self.image_processor(image, return_tensors="pt").pixel_values[0]
        else:
            pixels = np.asarray(self.image_processor.process_image(image, do_convert_rgb=True))
            pixel_values = self.transform(PIL.Image.fromarray(pixels.transpose(1, 2, 0)))
        return {"pixel_values": pixel_values, "labels": label}


def build_datasets(
    splits: dict, image_processor: BaseImageProcessor, args: AugmentationArguments, seed: int
) -> tuple[ImageClassificationDataset | None, ImageClassificationDataset | None]:
    """Training data with augmentation and evaluation data without; `None` for a split that does not exist."""
    transform = build_train_transform(args, image_processor) if args.augment else None
    train = validation = None
    if "train" in splits:
        train = ImageClassificationDataset(splits["train"], image_processor, transform, seed)
    if "validation" in splits:
        validation = ImageClassificationDataset(splits["validation"], image_processor)
    return train, validation


# Batches


def collate_images(examples: list[dict]) -> dict[str, torch.Tensor]:
    """`pixel_values` `(batch_size, num_channels, height, width)` and class ids `labels` `(batch_size,)`."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


class MixupCollator:
    r"""
    Mixes the images of a training batch by timm's mixup and CutMix. `labels` become class probabilities of shape
    `(batch_size, num_labels)`, with label smoothing. Batches of evaluation data stay as they are.
    """

    def __init__(self, args: AugmentationArguments, num_labels: int):
        self.num_labels = num_labels
        self.smoothing = args.smoothing
        self.mixup = None
        if args.mixup > 0 or args.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                prob=args.mixup_prob,
                label_smoothing=args.smoothing,
                num_classes=num_labels,
            )

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate_images(examples)
        if "seed" not in examples[0]:
            return batch
        pixel_values, class_ids = batch["pixel_values"], batch["labels"]
        batch["labels"] = mixup_target(class_ids, self.num_labels, smoothing=self.smoothing)
        # images are mixed in pairs: the last one of an odd batch stays as it is
        paired = len(class_ids) // 2 * 2
        if self.mixup is not None and paired > 0:
            with seeded(examples[0]["seed"]):
                pixel_values[:paired], batch["labels"][:paired] = self.mixup(pixel_values[:paired], class_ids[:paired])
        return batch


def build_collator(args: AugmentationArguments, num_labels: int) -> Callable[[list[dict]], dict]:
    """What makes batches of training and of evaluation examples."""
    if args.mixup > 0 or args.cutmix > 0 or args.smoothing > 0:
        return MixupCollator(args, num_labels)
    return collate_images
