"""Draw what a model sees in images.

    python scripts/predict.py --task semantic-segmentation --model FOLDER_OR_HUB_ID --output_dir outputs/predictions \\
        photo.jpg folder "more/**/*.png"

Takes any model of Transformers that knows the task, so that PIIP can be compared with others. A folder stands for all
images below it. Every picture is written under the name of its image; images of a folder keep their sub-folders.
"""

import argparse
import glob
import os
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import modeling_piip  # noqa: F401 (lets the Auto classes know PIIP)
from modeling_piip.visualization import draw_semantic_segmentation


# For each --task: the class that loads its model, and the function that draws its prediction.
TASKS: dict[str, tuple[type, Callable]] = {
    "semantic-segmentation": (AutoModelForSemanticSegmentation, draw_semantic_segmentation),
}


def find_images(sources: list[str]) -> dict[Path, Path]:
    """
    The images of files, folders and glob patterns, and the relative path of the picture of each.

    Raises:
        FileNotFoundError: If a source holds no image.
        ValueError: If two images would be drawn to the same file.
    """
    images = {}
    for source in sources:
        found = {}
        for path in [Path(source)] if os.path.exists(source) else sorted(map(Path, glob.glob(source, recursive=True))):
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if is_image(file))
                found |= {file: file.relative_to(path) for file in files}
            elif path.is_file():
                found[path] = Path(path.name)
        if not found:
            raise FileNotFoundError(f"{source} is no image, folder with images, or pattern of their names.")
        images |= found
    outputs = {}
    for image, output in images.items():
        images[image] = output = output.with_suffix(".png")
        if output in outputs:
            raise ValueError(
                f"{outputs[output]} and {image} would both be drawn to {output}: use another --output_dir for one."
            )
        outputs[output] = image
    return images


def is_image(file: Path) -> bool:
    return file.suffix.lower() in PIL.Image.registered_extensions()


def open_image(file: Path) -> PIL.Image.Image:
    with PIL.Image.open(file) as image:
        return PIL.ImageOps.exif_transpose(image)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or glob patterns (in quotes)")
    parser.add_argument("--task", required=True, choices=TASKS, help="what the model predicts")
    parser.add_argument("--model", required=True, help="saved folder or Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/predictions"), help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help="for example cpu or cuda:1 (default: the accelerator if there is one)"
    )
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="name files that cannot be read and go on; else stop"
    )
    return parser.parse_args(argv)


def choose_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        images = find_images(args.images)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    model_class, draw = TASKS[args.task]
    model = model_class.from_pretrained(args.model).to(choose_device(args.device)).eval()
    image_processor = AutoImageProcessor.from_pretrained(args.model)

    num_drawn = 0
    for file, output in tqdm(images.items(), desc="Predicting", unit="image", disable=len(images) == 1):
        try:
            image = open_image(file)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow reports some damaged files as SyntaxError
            if not args.skip_unreadable:
                raise SystemExit(f"error: {file} cannot be read ({error}); --skip_unreadable goes on") from error
            tqdm.write(f"{file} cannot be read ({error}): skipped")
            continue
        picture = draw(model, image_processor, image)
        (args.output_dir / output).parent.mkdir(parents=True, exist_ok=True)
        picture.save(args.output_dir / output)
        num_drawn += 1
    print(f"Drew {num_drawn} of {len(images)} images to {args.output_dir}")


if __name__ == "__main__":
    main()
