"""Draw what a model sees in images.

    python scripts/predict.py --task semantic-segmentation --model FOLDER_OR_HUB_ID --output_dir outputs/predictions \\
        photo.jpg folder "more/**/*.png"

Takes any model of Transformers that knows the task, so that PIIP can be compared with others. A folder stands for all
images below it. Every picture is written under the name of its image; images of a folder keep their sub-folders.

Beside the picture of an image with detected objects lies a JSON file with a list of them, best first:

    {"label": "dog", "label_id": 16, "score": 0.93, "box": [x1, y1, x2, y2], "mask": {"size": ..., "counts": ...}}

Boxes are in pixels; masks, which instance segmentation adds, are run-length encodings as in COCO.
"""

import argparse
import glob
import json
import os
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING

import modeling_piip  # noqa: F401 (lets the Auto classes know PIIP)
from modeling_piip.image_processing_piip_instance_segmentation import encode_rle
from modeling_piip.visualization import (
    draw_objects,
    draw_semantic_segmentation,
    get_label_names,
    predict_instances,
    predict_objects,
)


def load_instance_segmenter(name: str) -> PreTrainedModel:
    is_universal = type(AutoConfig.from_pretrained(name)) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
    model_class = AutoModelForUniversalSegmentation if is_universal else AutoModelForInstanceSegmentation
    return model_class.from_pretrained(name)


# For each --task: what loads its model, and what finds objects in an image, if the task is about objects.
TASKS: dict[str, tuple[Callable, Callable | None]] = {
    "semantic-segmentation": (AutoModelForSemanticSegmentation.from_pretrained, None),
    "object-detection": (AutoModelForObjectDetection.from_pretrained, predict_objects),
    "instance-segmentation": (load_instance_segmenter, predict_instances),
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


def check_originals(images: dict[Path, Path], output_dir: Path):
    """
    Raises:
        ValueError: If a picture would replace an image.
    """
    originals = {image.resolve() for image in images}
    for output in images.values():
        if (output_dir / output).resolve() in originals:
            raise ValueError(f"A picture would replace the image {output_dir / output}: name another --output_dir.")


def is_image(file: Path) -> bool:
    return file.suffix.lower() in PIL.Image.registered_extensions()


def open_image(file: Path) -> PIL.Image.Image:
    with PIL.Image.open(file) as image:
        return PIL.ImageOps.exif_transpose(image)


def list_objects(objects: dict[str, torch.Tensor], label_names: list[str]) -> list[dict]:
    """Predicted objects as the JSON files hold them."""
    columns = (objects[name].tolist() for name in ("labels", "scores", "boxes"))
    listed = [
        {"label": label_names[label], "label_id": label, "score": score, "box": box}
        for label, score, box in zip(*columns, strict=True)
    ]
    if "segmentation" in objects:
        for index, item in enumerate(listed):
            item["mask"] = encode_rle(objects["segmentation"] == index)
    return listed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or glob patterns (in quotes)")
    parser.add_argument("--task", required=True, choices=TASKS, help="what the model predicts")
    parser.add_argument("--model", required=True, help="saved folder or Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/predictions"), help="default: %(default)s")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="smallest score of detected objects (default: %(default)s)"
    )
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
        check_originals(images, args.output_dir)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    load, predict = TASKS[args.task]
    model = load(args.model).to(choose_device(args.device)).eval()
    image_processor = AutoImageProcessor.from_pretrained(args.model)

    num_drawn = 0
    for file, output in tqdm(images.items(), desc="Predicting", unit="image", disable=len(images) == 1):
        try:
            image = open_image(file)
        # Pillow reports some damaged files as SyntaxError, and too many pixels as an error of no other kind
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            if not args.skip_unreadable:
                raise SystemExit(f"error: {file} cannot be read ({error}); --skip_unreadable goes on") from error
            tqdm.write(f"{file} cannot be read ({error}): skipped")
            continue
        file = args.output_dir / output
        file.parent.mkdir(parents=True, exist_ok=True)
        if predict is None:
            draw_semantic_segmentation(model, image_processor, image).save(file)
        else:
            objects = predict(model, image_processor, image, args.threshold)
            label_names = get_label_names(model)
            draw_objects(image, objects, label_names).save(file)
            file.with_suffix(".json").write_text(json.dumps(list_objects(objects, label_names)), encoding="utf-8")
        num_drawn += 1
    print(f"Drew {num_drawn} of {len(images)} images to {args.output_dir}")


if __name__ == "__main__":
    main()
