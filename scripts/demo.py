"""Fine-tune a small PIIP on handwritten digits, save it, load it without this package, and look at what it sees.

    make demo

Needs no download and takes a few minutes on two CPU cores. Everything is left in outputs/demo: the data (digits), the
model with its logs (model) and a picture of its predictions (predictions.png). A second run skips what is done.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from make_digits_dataset import make_dataset
from PIL import Image, ImageDraw, ImageFont, ImageOps
from run_image_classification import main as run_image_classification
from sklearn.datasets import load_sample_image

from modeling_piip import PiipBranchConfig, PiipConfig


ROOT = Path(__file__).parents[1]
PHOTOS = ("china.jpg", "flower.jpg")

# Runs in a process of its own, as on a machine that only has Transformers.
PREDICT = """
import json, sys
sys.modules["modeling_piip"] = None  # from here on `import modeling_piip` fails

from transformers import AutoModelForImageClassification, pipeline

model_folder, files = json.load(sys.stdin)
model = AutoModelForImageClassification.from_pretrained(model_folder, trust_remote_code=True)
print(f"Loaded {type(model).__name__} with {model.num_parameters():,} parameters", file=sys.stderr)
classify = pipeline("image-classification", model=model_folder, trust_remote_code=True)
json.dump(classify(files, top_k=3, batch_size=60), sys.stdout)
"""


def small_piip() -> PiipConfig:
    """Three branches: the smallest network sees 64 pixels, the largest one 32; they interact after every layer."""
    branches = [
        PiipBranchConfig(
            image_size=image_size,
            patch_size=8,
            hidden_size=hidden_size,
            num_hidden_layers=3,
            num_attention_heads=hidden_size // 16,
        )
        for image_size, hidden_size in ((64, 32), (48, 64), (32, 96))
    ]
    return PiipConfig(
        branches=branches,
        interaction_num_heads=4,
        interaction_drop_path_rate=0.1,
        merge_type="linear",
        num_groups=8,
        initializer_range=0.1,  # narrow layers from scratch need larger weights
    )


def train(data_dir: Path, output_dir: Path, num_train_epochs: int) -> dict[str, float]:
    # such small layers gain little from many threads, and lose much where other programs run too
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    config_folder = output_dir / "config"
    small_piip().save_pretrained(config_folder)
    return run_image_classification(
        [
            *("--config_name", str(config_folder), "--data_dir", str(data_dir)),
            *("--output_dir", str(output_dir / "model")),
            *("--do_train", "--do_eval", "--num_train_epochs", str(num_train_epochs)),
            *("--per_device_train_batch_size", "64", "--per_device_eval_batch_size", "120"),
            *("--learning_rate", "2e-3", "--warmup_steps", "0.1", "--ema_decay", "0.99"),
            *("--crop_scale", "0.7", "1.0", "--hflip", "0", "--smoothing", "0.1"),
            # the last model, not the best one: the digits to test on must not choose it
            *("--load_best_model_at_end", "false"),
            *("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"),
        ]
    )


def predict(model_folder: Path, files: list[Path]) -> list[list[dict]]:
    """Three classes per file with their scores, by a process that cannot import this package."""
    request = json.dumps([str(model_folder.resolve()), [str(file.resolve()) for file in files]])
    command = [sys.executable, "-c", PREDICT]
    result = subprocess.run(command, input=request, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def save_photos(folder: Path) -> list[Path]:
    """The two photos that come with scikit-learn."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in PHOTOS]
    for file in files:
        Image.fromarray(load_sample_image(file.name)).save(file)
    return files


# The picture


def draw_tile(picture: Image.Image, file: Path, place: tuple[int, int], text: str, color: str):
    """One image with a frame and a line of text below."""
    x, y = place
    image = ImageOps.fit(Image.open(file).convert("RGB"), (80, 80), Image.Resampling.BICUBIC)
    picture.paste(ImageOps.expand(image, border=4, fill=color), (x, y))
    font = ImageFont.load_default(15)
    ImageDraw.Draw(picture).text((x + 44, y + 92), text, fill=color, font=font, anchor="mt")


def draw_predictions(files: list[Path], predictions: list[list[dict]], photos: list[Path], output_file: Path):
    """A column per digit, its errors on top in red, and the photos below."""
    columns, rows, tile, margin = 10, 5, 120, 30
    right, wrong, grey = "#1a7f4b", "#d1242f", "#57606a"
    first = [(Path(file), scores[0]) for file, scores in zip(files, predictions)]
    errors = sum(score["label"] != file.parent.name for file, score in first)
    picture = Image.new("RGB", (2 * margin + columns * tile - 32, 250 + rows * tile), "white")
    draw = ImageDraw.Draw(picture)
    title = f"A small PIIP on {len(first)} handwritten digits it has never seen: {len(first) - errors} right"
    draw.text((margin, 24), f"{title}, {errors} wrong", fill="black", font=ImageFont.load_default(24))

    for column in range(columns):
        examples = [(file, score) for file, score in first if file.parent.name == str(column)]
        examples.sort(key=lambda example: example[1]["label"] == str(column))
        for row, (file, score) in enumerate(examples[:rows]):
            is_right = score["label"] == str(column)
            text = f"{score['label']}  {score['score']:.0%}" if is_right else f"{score['label']}? {score['score']:.0%}"
            place = (margin + column * tile, 76 + row * tile)
            draw_tile(picture, file, place, text, right if is_right else wrong)

    y = 90 + rows * tile
    text = "Photos, not digits; but digits are all that the model can say:"
    draw.text((margin, y), text, fill=grey, font=ImageFont.load_default(18))
    for index, (file, scores) in enumerate(zip(photos, predictions[len(files) :])):
        x = margin + index * 4 * tile
        draw_tile(picture, file, (x, y + 36), file.stem, grey)
        for row, score in enumerate(scores):
            top = y + 44 + 26 * row
            draw.text((x + 104, top), score["label"], fill=grey, font=ImageFont.load_default(18))
            draw.rectangle((x + 126, top + 2, x + 126 + int(180 * score["score"]), top + 18), fill="#afb8c1")
            draw.text((x + 134, top), f"{score['score']:.0%}", fill="black", font=ImageFont.load_default(15))
    picture.save(output_file)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="default: outputs/demo")
    parser.add_argument("--num_train_epochs", type=int, default=12, help="default: %(default)s")
    args = parser.parse_args(argv)
    start = time.time()

    data_dir, model_dir = args.output_dir / "digits", args.output_dir / "model"
    if not data_dir.exists():
        make_dataset("classification", data_dir)
    results = train(data_dir, args.output_dir, args.num_train_epochs)

    files = sorted((data_dir / "test").glob("*/*.png"))
    random.Random(0).shuffle(files)
    photos = save_photos(args.output_dir / "photos")
    predictions = predict(model_dir, files + photos)
    draw_predictions(files, predictions, photos, args.output_dir / "predictions.png")

    hits = sum(scores[0]["label"] == file.parent.name for file, scores in zip(files, predictions))
    print(f"\nAccuracy on {len(files)} held-out digits: {results['eval_accuracy']:.1%} by the Trainer,")
    print(f"    {hits / len(files):.1%} by pipeline() in a process without this package")
    for photo, scores in zip(photos, predictions[len(files) :]):
        best = scores[0]
        print(f"{photo.name}: a photo, not a digit; the model still says {best['label']} ({best['score']:.0%} sure)")
    print(f"Time: {time.time() - start:.0f} seconds")
    print(f"\nLook at   {args.output_dir / 'predictions.png'}")
    print(f"The model {model_dir}")
    print("\nWhat to try next:")
    print("  your own images   python scripts/run_image_classification.py --help")
    print(f"  the curves        tensorboard --logdir {model_dir / 'runs'}")
    print(f"  its files         {model_dir / 'README.md'}")


if __name__ == "__main__":
    main()
