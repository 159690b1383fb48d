"""Write the model cards of the published variants, hub_cards/<variant>.md.

    python scripts/make_hub_cards.py                                 all of them
    python scripts/make_hub_cards.py piip-tsb-368-192-128-in1k       only the named ones

Never edit a card. Everything in it comes from

    configuration/<variant>/        branches and preprocessing
    hub_cards/results.json          published accuracy, size and cost, pretraining and recipe
    hub_cards/template.md.jinja     the text
    modeling_piip                   whether the head exists; if not, the card shows the backbone

so change one of these and run the script again. A test holds the cards equal to what it writes. The converter copies
the card of a variant into the folder that it makes, as README.md.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import modeling_piip
from modeling_piip import PiipBranchConfig, PiipConfig, PiipImageProcessor
from modeling_piip.configuration_piip import find_variant


CARDS = Path(__file__).parents[1] / "hub_cards"
OFFICIAL_FILES = "https://github.com/OpenGVLab/PIIP/blob/main"


@dataclass
class Task:
    """What the cards of all variants with one model class share."""

    model_class: str
    auto_class: str
    head: str
    pipeline_tag: str
    tags: list[str]
    purpose: str
    limits: str


TASKS = [
    Task(
        model_class="PiipForImageClassification",
        auto_class="AutoModelForImageClassification",
        head="The classifier",
        pipeline_tag="image-classification",
        tags=[],
        purpose="Naming the main object of a photograph, one of the 1,000 categories of ImageNet-1K; and fine-tuning "
        "on categories of your own.",
        limits="several objects in one image, or telling that none of the categories fits: the scores always sum to "
        "one.",
    ),
    Task(
        model_class="PiipForInstanceSegmentation",
        auto_class="AutoModelForInstanceSegmentation",
        head="Mask R-CNN",
        pipeline_tag="image-segmentation",
        tags=["instance-segmentation", "object-detection"],
        purpose="Finding the objects in a photograph with a box and a mask each, of the 80 categories of COCO; and "
        "fine-tuning on categories of your own.",
        limits="telling who a person is, labelling every pixel, or categories outside COCO without fine-tuning.",
    ),
    Task(
        model_class="PiipForObjectDetection",
        auto_class="AutoModelForObjectDetection",
        head="DINO",
        pipeline_tag="object-detection",
        tags=[],
        purpose="Finding the objects in a photograph with a box each, of the 80 categories of COCO; and fine-tuning "
        "on categories of your own.",
        limits="telling who a person is, masks, or categories outside COCO without fine-tuning.",
    ),
    Task(
        model_class="PiipForSemanticSegmentation",
        auto_class="AutoModelForSemanticSegmentation",
        head="UperNet",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation"],
        purpose="Labelling every pixel of a photograph with one of the 150 categories of ADE20K; and fine-tuning on "
        "categories of your own.",
        limits="telling two objects of the same category apart, or categories outside ADE20K without fine-tuning.",
    ),
]

# By the data set's name in results.json: repository on the Hub, name and the split of the published results
DATASETS = {
    "imagenet-1k": ("ILSVRC/imagenet-1k", "ImageNet-1K", "validation"),
    "coco": ("detection-datasets/coco", "COCO", "val2017"),
    "ade20k": ("zhoubolei/scene_parse_150", "ADE20K", "validation"),
}
# By the metric's name in results.json: task and metric as the Hub knows them, and the name to print
METRICS = {
    "top1": ("image-classification", "accuracy", "top-1 accuracy"),
    "box_ap": ("object-detection", "mean_average_precision", "box AP"),
    "mask_ap": ("image-segmentation", "mean_average_precision", "mask AP"),
    "mean_iou": ("image-segmentation", "mean_iou", "mIoU"),
}
# How the official scripts count; the classification one is used for detectors and segmenters with ViTs only, too
CONVENTIONS = {
    "classification": "This counts the branches at these resolutions inside the official classification network: "
    "its merging and a classifier for 1,000 categories instead of feature pyramid and {head}.",
    "detection": "This counts the official detection backbone without {head}, and without the layers that rescale a "
    "merged map to four levels.",
}
VIT_NAMES = {192: "ViT-T", 384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 3200: "InternViT-6B"}
CONVNEXT_NAMES = {(96, 9): "ConvNeXt-T", (96, 27): "ConvNeXt-S", (128, 27): "ConvNeXt-B", (192, 27): "ConvNeXt-L"}
PRETTY_NAMES = {"piip": "PIIP", "vit": "ViT", "internvit": "InternViT", "convnext": "ConvNeXt"}
# Epochs, and the epochs after which the learning rate falls to a tenth
EPOCHS = {"1x": (12, "8 and 11"), "2x": (24, "16 and 22"), "3x": (36, "27 and 33")}
RESAMPLE_NAMES = {2: "bilinear", 3: "bicubic"}


def load_results() -> dict[str, dict]:
    """The published facts by variant."""
    return json.loads((CARDS / "results.json").read_text(encoding="utf-8"))


def get_task(config: PiipConfig) -> Task:
    return next(task for task in TASKS if task.model_class in config.architectures)


def join_words(words: list) -> str:
    """1, 2 and 3"""
    *rest, last = map(str, words)
    return f"{', '.join(rest)} and {last}" if rest else last


def format_table(rows: list[list]) -> str:
    """A Markdown table; the first row is its header."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, row))} |".replace(" --- ", "---") for row in rows)


# ------------------------------------------------ parts of the text ------------------------------------------------


def get_model_name(variant: str) -> str:
    """The paper's name: "piip-sbl-384-192-128-in1k" is PIIP-SBL."""
    words = re.split(r"-\d{2,4}-", variant)[0].split("-")
    return "-".join(PRETTY_NAMES.get(word, word.upper()) for word in words)


def get_network_name(branch: PiipBranchConfig) -> str:
    if branch.architecture == "convnext":
        return CONVNEXT_NAMES[branch.hidden_sizes[0], branch.depths[2]]
    return VIT_NAMES[branch.hidden_size]


def describe_model(variant: str, config: PiipConfig, task: Task, row: dict) -> str:
    name = get_model_name(variant)
    where = DATASETS[row["dataset"]][1]
    head = "" if task.model_class == "PiipForImageClassification" else f" with a {task.head} head"
    text = f"{name}{head} for {where}"
    sizes = [branch.image_size for branch in config.branches]
    if len(sizes) == 1:
        return f"{text}: one network at {sizes[0]} pixels, a baseline that the PIIP papers compare with."
    return (
        f"{text}: a Parameter-Inverted Image Pyramid Network. Its {len(sizes)} branches see the image at "
        f"{join_words(sizes)} pixels, the smallest network at the highest resolution. They exchange features "
        f"{config.num_stages} times, and their outputs are merged."
    )


def make_branch_table(config: PiipConfig, row: dict) -> str:
    rows = [["branch", "resolution", "network", "channels", "layers", "started from"]]
    for k, (branch, pretraining) in enumerate(zip(config.branches, row["pretraining"], strict=True)):
        if branch.architecture == "convnext":
            channels, layers = "/".join(map(str, branch.hidden_sizes)), "/".join(map(str, branch.depths))
        else:
            channels, layers = branch.hidden_size, branch.num_hidden_layers
        rows.append([k + 1, branch.image_size, get_network_name(branch), channels, layers, pretraining])
    return format_table(rows)


def describe_convention(task: Task, row: dict) -> str:
    if task.model_class == "PiipForImageClassification":
        return "This counts the whole network."
    return CONVENTIONS.get(row["convention"], "").format(head=task.head)


def describe_preprocessing(processor: dict) -> list[str]:
    size, method = processor["size"], RESAMPLE_NAMES[processor["resample"]]
    if "longest_edge" in size:
        limits = f"{size['shortest_edge']} on the short and {size['longest_edge']} on the long side"
        steps = [f"Resize ({method}) to the largest size within {limits}, keeping the aspect ratio."]
    else:
        steps = [f"Resize ({method}) the short side to {size['shortest_edge']} pixels, keeping the aspect ratio."]
    if processor["do_center_crop"]:
        steps.append("Cut {height} x {width} pixels from the centre.".format(**processor["crop_size"]))
    mean, std = (", ".join(f"{value:.4g}" for value in processor[name]) for name in ("image_mean", "image_std"))
    steps.append(f"Scale RGB values to 0 ... 1, subtract the mean {mean}, divide by the deviation {std}.")
    if processor["do_pad"]:
        steps.append(f"Pad with zeros, right and bottom, to multiples of {processor['pad_size_divisor']} pixels.")
    return steps


def describe_drop_path(config: PiipConfig) -> str:
    rates = [branch.drop_path_rate for branch in config.branches]
    if len(rates) == 1:
        return f"Drop path {rates[0]}."
    text = rates[0] if len(set(rates)) == 1 else join_words(rates)
    return f"Drop path {text} in the branches, {config.interaction_drop_path_rate} in the interactions."


def describe_classification_recipe(config: PiipConfig, row: dict) -> list[str]:
    recipe = row["recipe"]
    return [
        f"ImageNet-1K training images, {row['schedule']}, {recipe['batch_size']:,} images per step on 8 GPUs.",
        f"AdamW, learning rate {recipe['learning_rate']:g} and ten times that for layers that were not pretrained, "
        "weight decay 0.1; 5 warm-up epochs, then a cosine down to 1e-05.",
        "RandAugment, mixup 0.8, CutMix 1.0, label smoothing 0.1; no random erasing, no repeated augmentation.",
        describe_drop_path(config),
        f"From the command in the [official README]({OFFICIAL_FILES}/classification/README.md), which is written for "
        "PIIP-SBL 384/192/128, and the defaults of its script.",
    ]


def describe_optimizer(recipe: dict) -> str:
    text = f"AdamW (0.9, 0.999), learning rate {recipe['learning_rate']:g}, weight decay 0.05"
    if recipe["layer_decay"] is not None:
        text += f", layer-wise decay {recipe['layer_decay']} in the branches"
    return f"{text}; bfloat16."


def describe_training_images(config: PiipConfig, row: dict) -> str:
    recipe, crop = row["recipe"], config.image_size
    if row["dataset"] == "ade20k":
        return (
            "Images scaled by 0.5 to 2, random crops of 512 x 512 pixels with at most 75% of one category, random "
            "flips, photometric distortion."
        )
    if "short_sides" in recipe:
        low, high = recipe["short_sides"]
        return (
            f"The short side is one of 11 sizes from {low} to {high} pixels (the long side at most "
            f"{recipe['longest_side']}); half of the images are cropped at random before; then crops of at most "
            f"{crop} x {crop} pixels and random flips."
        )
    return "Images resized as in the preprocessing above, random flips."


def describe_dense_recipe(config: PiipConfig, task: Task, row: dict) -> list[str]:
    recipe = row["recipe"]
    batch = "2 images per GPU"
    batch += f", {recipe['batch_size']} per step" if recipe["batch_size"] else "; how many GPUs is not recorded"
    if row["dataset"] == "ade20k":
        schedule = "80,000 iterations; the learning rate falls linearly after 1,500 warm-up iterations"
        images = "ADE20K training images"
    else:
        epochs, drops = EPOCHS[row["schedule"]]
        schedule = f"{epochs} epochs ({row['schedule']}); 500 warm-up iterations, a tenth of the learning rate after "
        schedule += f"epochs {drops}"
        images = "COCO train2017"
    steps = [
        f"{images}, {batch}.",
        f"{schedule}.",
        describe_optimizer(recipe),
        describe_training_images(config, row),
        describe_drop_path(config),
    ]
    if task.model_class == "PiipForObjectDetection":
        steps.append("Gradients are clipped at norm 0.1.")
    return steps


# ----------------------------------------------------- the card -----------------------------------------------------


def get_source_url(row: dict) -> str | None:
    return row["source"] and f"{OFFICIAL_FILES}/{row['source']}"


def build_eval_results(row: dict) -> list[EvalResult]:
    """The published accuracy for the `model-index`, marked as the authors' own."""
    repository, name, split = DATASETS[row["dataset"]]
    results = []
    for metric, value in (row["accuracy"] or {}).items():
        task_type, metric_type, metric_name = METRICS[metric]
        result = EvalResult(
            task_type=task_type,
            dataset_type=repository,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
            source_name="Reported by the authors of the paper, not measured again",
            source_url=get_source_url(row),
        )
        results.append(result)
    return results


def build_metadata(variant: str, task: Task, row: dict, eval_results: list[EvalResult]) -> ModelCardData:
    metrics = {result.metric_type for result in eval_results}
    return ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        datasets=[DATASETS[row["dataset"]][0]],
        metrics=sorted(metrics) or None,
        tags=["piip", "image-pyramid", "vision", *task.tags],
        model_name=variant,
        # without results there is no model-index
        eval_results=eval_results or None,
    )


def render_card(variant: str) -> str:
    """The Markdown of one card."""
    folder = find_variant(variant)
    config = PiipConfig.from_pretrained(folder)
    # with the defaults of what the file leaves out
    processor = PiipImageProcessor.from_pretrained(folder).to_dict()
    row, task = load_results()[variant], get_task(config)
    eval_results = build_eval_results(row)
    if row["dataset"] == "imagenet-1k":
        recipe = describe_classification_recipe(config, row)
    else:
        recipe = describe_dense_recipe(config, task, row)
    card = ModelCard.from_template(
        build_metadata(variant, task, row, eval_results),
        template_path=str(CARDS / "template.md.jinja"),
        variant=variant,
        official_config=config.official_config,
        row=row,
        task=task,
        head_exists=hasattr(modeling_piip, task.model_class),
        is_6b=any(branch.hidden_size == 3200 for branch in config.branches),
        summary=describe_model(variant, config, task, row),
        branch_table=make_branch_table(config, row),
        eval_results=eval_results,
        source_url=get_source_url(row),
        convention=describe_convention(task, row),
        preprocessing=describe_preprocessing(processor),
        recipe=recipe,
    )
    return f"{card.content.rstrip()}\n"


def write_card(variant: str) -> str:
    """Writes one card and says what that did to the file."""
    path, content = CARDS / f"{variant}.md", render_card(variant)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if content == before:
        return "unchanged"
    path.write_text(content, encoding="utf-8")
    return "new" if before is None else "changed"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names of folders in configuration/ (all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        variants = [find_variant(name).name for name in args.variants] or PiipConfig.list_variants()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    unchanged = 0
    for variant in variants:
        outcome = write_card(variant)
        if outcome == "unchanged":
            unchanged += 1
        else:
            print(f"{outcome}: hub_cards/{variant}.md")
    print(f"{unchanged} of {len(variants)} cards unchanged")


if __name__ == "__main__":
    main()
