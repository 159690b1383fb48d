"""Write scikit-learn's handwritten digits as a data set on disk, to try the training scripts without a download.

    python scripts/make_digits_dataset.py --task classification --output_dir data/digits
    python scripts/make_digits_dataset.py --task semantic --output_dir data/digit_scenes
    python scripts/make_digits_dataset.py --task detection --output_dir data/digit_detection
    python scripts/make_digits_dataset.py --task instance --output_dir data/digit_instances

The 1,797 digits come with scikit-learn: 8 x 8 pixels with ink values from 0 to 16. One fifth of every class is held
out, chosen by --seed; the same seed gives the same files, byte for byte.

classification: every digit once, white on black, as a 64 x 64 RGB PNG file (bicubic), so that a person can look at it
and any training script can read it. The number in a file name is the digit's place in
`sklearn.datasets.load_digits()`. Read the folder back with `datasets.load_dataset("imagefolder", data_dir=...)`.

    data/digits/train/<0 ... 9>/*.png    1,437 images
    data/digits/test/<0 ... 9>/*.png       360 images

semantic: scenes of 128 x 128 pixels, with up to six bright digits, 40 to 80 pixels high, on procedural textures and
on crops of the two photos that come with scikit-learn. Maps hold one class id per pixel: 0 for the background, and one
more than the digit where there is ink. Held-out scenes show held-out digits.

    data/digit_scenes/classes.txt                   background, 0, ..., 9: the names of the ids 0 to 10
    data/digit_scenes/images/{train,validation}/*.jpg    1,200 and 200 images
    data/digit_scenes/labels/{train,validation}/*.png    their maps, under the same names

detection, instance: the same scenes, with the digits as objects in COCO format. Boxes are those of the ink; for
instances, each digit also has its mask, run-length encoded. `category_id` is the digit.

    data/digit_instances/images/{train,validation}/*.jpg         1,200 and 200 images
    data/digit_instances/annotations/{train,validation}.json     their objects
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from modeling_piip.files import new_folder
from modeling_piip.image_processing_piip_instance_segmentation import encode_rle, get_box


IMAGE_SIZE = 64
TEST_FRACTION = 0.2

SCENE_SIZE = 128
NUM_SCENES = {"train": 1200, "validation": 200}
NUM_DIGITS_PER_SCENE = (3, 6)
DIGIT_HEIGHTS = (40, 80)
BACKGROUND_BRIGHTNESS = 0.6
INK_THRESHOLD = 0.45  # share of full ink from which on a pixel belongs to a digit


def digit_image(pixels: np.ndarray) -> Image.Image:
    """Turn one (8, 8) array of ink values from 0 to 16 into an RGB image."""
    image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def split_indices(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split the positions of `labels` into train and test, with the same share of every class."""
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=seed)
    return {"train": np.sort(train), "test": np.sort(test)}


def write_classification(folder: Path, seed: int) -> dict[str, int]:
    """Write an image folder, `<split>/<class>/*.png`, and return the number of images per split."""
    digits = load_digits()
    splits = split_indices(digits.target, seed)
    with tqdm(total=len(digits.target), desc="Writing digits", unit="image") as progress:
        for split, indices in splits.items():
            for label in digits.target_names:
                (folder / split / str(label)).mkdir(parents=True)
            for index in indices:
                path = folder / split / str(digits.target[index]) / f"digit_{index:04d}.png"
                digit_image(digits.images[index]).save(path)
                progress.update()
    return {split: len(indices) for split, indices in splits.items()}


# Scenes


def random_texture(rng: np.random.Generator) -> np.ndarray:
    """Clouds, or a pattern of tilted waves, in random colours: (SCENE_SIZE, SCENE_SIZE, 3) from 0 to 255."""
    if rng.random() < 0.5:
        cells = rng.integers(2, 17)
        clouds = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(clouds.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC), dtype=np.float64)
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(6, 40)
    rows, columns = np.mgrid[:SCENE_SIZE, :SCENE_SIZE]
    phase = 2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / wavelength
    first, second = rng.uniform(0, 255, (2, 3))
    return first + (second - first) * (0.5 + 0.5 * np.sin(phase))[:, :, None]


def random_photo_crop(rng: np.random.Generator, photos: list[np.ndarray]) -> np.ndarray:
    """A square out of one of the photos: (SCENE_SIZE, SCENE_SIZE, 3) from 0 to 255."""
    photo = photos[rng.integers(len(photos))]
    side = rng.integers(SCENE_SIZE, min(photo.shape[:2]) + 1)
    top, left = (rng.integers(length - side + 1) for length in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    return np.asarray(crop.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC), dtype=np.float64)


def random_place(rng: np.random.Generator, height: int, width: int, taken: np.ndarray) -> tuple[slice, slice] | None:
    """A rectangle where nothing is `taken` yet; `None` if twenty tries find none."""
    for _ in range(20):
        top, left = rng.integers(0, SCENE_SIZE - height + 1), rng.integers(0, SCENE_SIZE - width + 1)
        place = (slice(top, top + height), slice(left, left + width))
        if not taken[place].any():
            return place
    return None


def random_color(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A colour that is clearly brighter than the mean of `background`."""
    luminance = np.array([0.299, 0.587, 0.114])
    while True:
        color = rng.uniform(0, 255, 3)
        if (color - background.mean(axis=(0, 1))) @ luminance > 80:
            return color


def make_scene(
    rng: np.random.Generator, images: np.ndarray, targets: np.ndarray, photos: list[np.ndarray]
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """An RGB scene of some of the (8, 8) `images`, and the digit and the mask (SCENE_SIZE, SCENE_SIZE) of each."""
    scene = random_texture(rng) if rng.random() < 0.5 else random_photo_crop(rng, photos)
    scene = BACKGROUND_BRIGHTNESS * scene + rng.normal(0, rng.uniform(0, 8), scene.shape)
    objects, taken = [], np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=bool)
    low, high = NUM_DIGITS_PER_SCENE
    for index in rng.integers(0, len(images), rng.integers(low, high + 1)):
        height = int(rng.integers(DIGIT_HEIGHTS[0], DIGIT_HEIGHTS[1] + 1))
        width = height * 6 // 8
        place = random_place(rng, height, width, taken)
        if place is None:
            continue
        # the first and the last column of a digit are almost always empty
        ink = Image.fromarray((images[index][:, 1:-1] / 16).astype(np.float32))
        ink = np.asarray(ink.resize((width, height), Image.Resampling.BICUBIC))
        # one pixel of transition from background to ink
        opacity = np.clip((ink - INK_THRESHOLD) * height / 8 + 0.5, 0, 1)
        color = random_color(rng, scene[place])
        scene[place] += opacity[:, :, None] * (color - scene[place])
        mask = np.zeros_like(taken)
        mask[place] = opacity > 0.5
        objects.append((int(targets[index]), mask))
        taken[place] = True
    return Image.fromarray(scene.round().clip(0, 255).astype(np.uint8)), objects


def write_scenes(folder: Path, seed: int) -> Iterator[tuple[str, str, list[tuple[int, np.ndarray]]]]:
    """Write `images/<split>/*.jpg`, and yield split, name and objects of each image."""
    digits, photos = load_digits(), load_sample_images().images
    train, test = split_indices(digits.target, seed).values()
    with tqdm(total=sum(NUM_SCENES.values()), desc="Writing scenes", unit="image") as progress:
        for split, indices in zip(NUM_SCENES, (train, test)):
            (folder / "images" / split).mkdir(parents=True)
            rng = np.random.default_rng([seed, len(indices)])
            for number in range(NUM_SCENES[split]):
                scene, objects = make_scene(rng, digits.images[indices], digits.target[indices], photos)
                scene.save(folder / "images" / split / f"scene_{number:04d}.jpg", quality=92)
                yield split, f"scene_{number:04d}", objects
                progress.update()


def write_semantic(folder: Path, seed: int) -> dict[str, int]:
    """Write the scenes, `labels/<split>/*.png` and `classes.txt`, and return the number of images per split."""
    (folder / "classes.txt").write_text("\n".join(["background", *map(str, range(10))]) + "\n")
    for split in NUM_SCENES:
        (folder / "labels" / split).mkdir(parents=True)
    for split, name, objects in write_scenes(folder, seed):
        labels = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=np.uint8)
        for digit, mask in objects:
            labels[mask] = digit + 1
        Image.fromarray(labels).save(folder / "labels" / split / f"{name}.png")
    return NUM_SCENES


def describe_object(digit: int, mask: np.ndarray, with_mask: bool) -> dict:
    """A digit as COCO writes objects; `area` is that of the mask, or of the box where there is no mask."""
    box = get_box(mask)
    described = {"category_id": digit, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    if with_mask:
        described |= {"area": int(mask.sum()), "segmentation": encode_rle(torch.from_numpy(mask))}
    return described


def write_coco(folder: Path, seed: int, with_masks: bool) -> dict[str, int]:
    """Write the scenes and `annotations/<split>.json`, and return the number of images per split."""
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    contents = {split: {"images": [], "annotations": [], "categories": categories} for split in NUM_SCENES}
    for split, name, objects in write_scenes(folder, seed):
        images, annotations = contents[split]["images"], contents[split]["annotations"]
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": f"{name}.jpg", "height": SCENE_SIZE, "width": SCENE_SIZE})
        for digit, mask in objects:
            ids = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append(ids | describe_object(digit, mask, with_masks))
    (folder / "annotations").mkdir()
    for split, content in contents.items():
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return NUM_SCENES


# For each --task: the function that writes its data set into an empty folder, and the script that trains on it.
TASKS: dict[str, tuple[Callable[[Path, int], dict[str, int]], str]] = {
    "classification": (write_classification, "run_image_classification.py"),
    "semantic": (write_semantic, "run_semantic_segmentation.py"),
    "detection": (partial(write_coco, with_masks=False), "run_object_detection.py"),
    "instance": (partial(write_coco, with_masks=True), "run_instance_segmentation.py"),
}


def make_dataset(task: str, output_dir: Path, seed: int = 0) -> dict[str, int]:
    """Write the data set of `task` to `output_dir`, whole or not at all, and return the number of images per split.

    Raises:
        FileExistsError: when `output_dir` is a file or a folder that is not empty.
    """
    write, _ = TASKS[task]
    with new_folder(output_dir) as folder:
        return write(folder, seed)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS, help="which kind of data set to write")
    parser.add_argument("--output_dir", required=True, type=Path, help="new or empty folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="chooses the test images (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        counts = make_dataset(args.task, args.output_dir, args.seed)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    listed = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"Wrote {sum(counts.values()):,} images ({listed}) to {args.output_dir}")
    _, training_script = TASKS[args.task]
    print(
        f"Next: python scripts/{training_script} --data_dir {args.output_dir} --model_name_or_path FOLDER_OR_HUB_ID "
        "--output_dir outputs/digits --do_train --do_eval"
    )


if __name__ == "__main__":
    main()
