"""Write the folders of the published variants in configuration/ from the table configuration/variants.json.

    python scripts/make_configuration.py

How the table is read is explained in configuration/README.md.
"""

import argparse
import inspect
import json
from pathlib import Path

from timm.data import ImageNetInfo

from modeling_piip import PiipConfig


FOLDER = Path(__file__).parents[1] / "configuration"
BRANCHES_AND_HEADS = ("branches", "uper_net", "dino", "mask_rcnn")
OTHER_OPTIONS = [
    name
    for name in (*inspect.get_annotations(PiipConfig), "out_features")
    if not name.startswith("_") and name not in BRANCHES_AND_HEADS
]
DESCRIPTION = ("model_type", "architectures", "id2label", "label2id", "official_config")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where the folders are written")
    return parser.parse_args(argv)


def merge(base: dict, changes: dict) -> dict:
    """`changes` win; dictionaries inside dictionaries are merged, everything else is replaced."""
    merged = dict(base)
    for name, value in changes.items():
        both_are_dicts = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both_are_dicts else value
    return merged


def resolve(entry: dict, families: dict) -> dict:
    """An entry of the table with everything that its families say, each later one above the earlier ones."""
    resolved = {}
    for family in entry.get("families", []):
        resolved = merge(resolved, resolve(families[family], families))
    return merge(resolved, {name: value for name, value in entry.items() if name != "families"})


def build_branch(parts: list, image_size: int, for_all: dict, templates: dict) -> dict:
    branch = {"image_size": image_size}
    for part in [*parts, for_all]:
        branch |= templates[part] if isinstance(part, str) else part
    return branch


def build_config(variant: dict, table: dict) -> dict:
    """The content of config.json: all options of the model, whatever defaults and Transformers version are later."""
    for_all = variant.get("all_branches", {})
    branches = [
        build_branch(parts, size, for_all, table["branches"])
        for parts, size in zip(variant["branches"], variant["image_sizes"], strict=True)
    ]
    labels = dict(enumerate(get_labels(variant["labels"], table)))
    config = PiipConfig(
        branches=branches,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
        official_config=variant["official"].rpartition("/")[2],
        **variant["config"],
    ).to_dict()
    names = (*BRANCHES_AND_HEADS, *OTHER_OPTIONS, *DESCRIPTION)
    output = {name: config[name] for name in names if config[name] is not None}
    # None: no weights were published
    output["official_checkpoint"] = f"{variant['official']}.pth" if variant.get("published", True) else None
    return output


def get_labels(name: str, table: dict) -> list[str]:
    if name == "imagenet-1k":
        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(info.num_classes())]
    return table["labels"][name]


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    table = json.loads((FOLDER / "variants.json").read_text(encoding="utf-8"))
    for name, entry in table["variants"].items():
        variant = resolve(entry, table["families"])
        processor = {"image_processor_type": "PiipImageProcessor"} | variant["image_processor"]
        write_json(args.output_dir / name / "config.json", build_config(variant, table))
        write_json(args.output_dir / name / "preprocessor_config.json", processor)


if __name__ == "__main__":
    main()
