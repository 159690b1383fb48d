"""Write scikit-learn's handwritten digits as a data set on disk, to try the training scripts without a download.

    python scripts/make_digits_dataset.py --task classification --output_dir data/digits

The 1,797 digits come with scikit-learn: 8 x 8 pixels with ink values from 0 to 16. They are written white on black as
64 x 64 RGB PNG files (bicubic), so that a person can look at them and any training script can read them. One fifth of
every class is the test split, chosen by --seed; the same seed gives the same files, byte for byte.

    data/digits/train/<0 ... 9>/*.png    1,437 images
    data/digits/test/<0 ... 9>/*.png       360 images

The number in a file name is the digit's place in `sklearn.datasets.load_digits()`. Read the folder back with
`datasets.load_dataset("imagefolder", data_dir="data/digits")`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from modeling_piip.files import new_folder


IMAGE_SIZE = 64
TEST_FRACTION = 0.2


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


# For each --task: the function that writes its data set into an empty folder, and the script that trains on it.
TASKS: dict[str, tuple[Callable[[Path, int], dict[str, int]], str]] = {
    "classification": (write_classification, "run_image_classification.py"),
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
