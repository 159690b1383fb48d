"""Count parameters and multiply-adds ("FLOPs") of PIIP networks, without weights and in seconds.

    python scripts/complexity.py --variant piip-tsb-368-192-128-in1k     a published variant
    python scripts/complexity.py --config my-piip/                       your own: a folder or a config.json
    python scripts/complexity.py --all --markdown                        all variants beside the paper's numbers

Two conventions:

    official   how the paper's tables were made: use it to compare with published numbers. For networks of ViTs, also
               in detectors and segmenters, it is the work of branches and interactions inside a classification
               network with 1000 classes; for networks with ConvNeXt, that of the backbone without its pyramid.
    actual     what our forward executes for one image of --image_size: linear layers, convolutions, attention with
               the padding of its windows, and the samples of deformable attention. Norms, activations, softmax,
               additions and the resizing of images and maps are not counted.

One multiply-add counts as one. The breakdown names branches from the highest resolution (branch_1) to the lowest, then
interactions, merge, feature pyramid and head. The network lives on the meta device: even the largest variants, with
7 billion parameters, need less than a gigabyte of memory.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import modeling_piip
from modeling_piip import PiipConfig
from modeling_piip.complexity import PiipComplexity, count_actual, count_official, counts_head
from modeling_piip.configuration_piip import find_variant
from modeling_piip.conversion import MODEL_CLASSES


RESULTS = Path(__file__).parents[1] / "hub_cards" / "results.json"
METRIC_NAMES = {"top1": "top-1", "box_ap": "box AP", "mask_ap": "mask AP", "mean_iou": "mIoU"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--variant", nargs="+", metavar="NAME", help="published variants: folders in configuration/")
    source.add_argument("--config", type=Path, help="a config.json or the folder of a model")
    source.add_argument("--all", action="store_true", help="all published variants")
    parser.add_argument(
        "--convention", choices=["official", "actual"], default="official", help="default: %(default)s"
    )
    parser.add_argument(
        "--image_size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="input in pixels (default: a square of the highest resolution)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="a list with plain numbers and the breakdown")
    output.add_argument("--markdown", action="store_true", help="one table, published numbers beside ours")
    output.add_argument("--csv", action="store_true", help="the same table for spreadsheets")
    args = parser.parse_args(argv)
    if args.image_size and min(args.image_size) < 1:
        parser.error(f"--image_size must be two positive numbers, got {args.image_size}.")
    return args


def load_configs(args: argparse.Namespace) -> dict[str, PiipConfig]:
    """Configurations by the names to print."""
    if args.config:
        if not args.config.exists():
            raise FileNotFoundError(f"{args.config} does not exist. --variant takes the names of published variants.")
        return {str(args.config): PiipConfig.from_pretrained(args.config)}
    names = PiipConfig.list_variants() if args.all else args.variant
    return {name: PiipConfig.from_pretrained(find_variant(name)) for name in names}


def get_architecture(config: PiipConfig) -> str:
    return (config.architectures or ["PiipBackbone"])[0]


def count(config: PiipConfig, convention: str, image_size: list[int] | None) -> tuple[PiipComplexity, list[str]]:
    """The counted network, and what a reader has to know about it."""
    image_size = tuple(image_size) if image_size else None
    if convention == "official":
        return count_official(config, image_size), []
    architecture = get_architecture(config)
    model_class = getattr(modeling_piip, architecture, None)
    if model_class is None:
        return count_actual(config, image_size), [f"The head of {architecture} is not built yet and not counted."]
    notes = []
    if not counts_head(model_class):
        notes.append(f"#FLOPs are without the head of {architecture}: they depend on what is in the image.")
    return count_actual(config, image_size, model_class), notes


def describe(name: str, config: PiipConfig, args: argparse.Namespace) -> dict:
    """A network as plain data."""
    complexity, notes = count(config, args.convention, args.image_size)
    breakdown = {
        part: {
            "parameters": complexity.parameters[part],
            "flops": complexity.flops[part],
            "flops_by_operation": complexity.operations[part],
        }
        for part in complexity.parameters
    }
    return {
        "variant": name,
        "official_config": getattr(config, "official_config", None),
        "convention": args.convention,
        "image_size": list(complexity.image_size),
        "parameters": complexity.total_parameters,
        "flops": complexity.total_flops,
        "breakdown": breakdown,
        "notes": notes,
    }


# ------------------------------------------------------ output ------------------------------------------------------


def in_millions(number: int) -> str:
    return f"{number / 1e6:.1f}M"


def in_billions(number: int) -> str:
    return f"{number / 1e9:.1f}G"


def align(rows: list[list[str]]) -> list[str]:
    """Rows as lines with columns of equal width: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])])
        for row in rows
    ]


def format_breakdown(network: dict) -> str:
    """The parts of one network for the terminal."""
    height, width = network["image_size"]
    rows = [["part", "#Param", "#FLOPs"]]
    for part, numbers in network["breakdown"].items():
        rows.append([part, in_millions(numbers["parameters"]), in_billions(numbers["flops"])])
    rows.append(["total", in_millions(network["parameters"]), in_billions(network["flops"])])
    title = f"{network['variant']} at {height} x {width} pixels, {network['convention']} convention"
    return "\n".join([title, *align(rows), *network["notes"]])


def tabulate(networks: list[dict], configs: dict[str, PiipConfig]) -> list[list[str]]:
    """Published numbers beside ours; the first row is the header."""
    header = ["Variant", "Resolution", "#Param published", "#Param", "#FLOPs published", "#FLOPs"]
    rows = [[*header, "Accuracy published", "Conversion"]]
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for network in networks:
        name = network["variant"]
        config, published = configs[name], results.get(name, {})
        rows.append(
            [
                name,
                "/".join(str(branch.image_size) for branch in config.branches),
                published.get("parameters") or "-",
                in_millions(network["parameters"]),
                published.get("flops") or "-",
                in_billions(network["flops"]),
                format_accuracy(published.get("accuracy")),
                "full" if get_architecture(config) in MODEL_CLASSES else "backbone",
            ]
        )
    return rows


def format_accuracy(accuracy: dict[str, float] | None) -> str:
    return ", ".join(f"{METRIC_NAMES.get(name, name)} {value}" for name, value in (accuracy or {}).items()) or "-"


def print_markdown(rows: list[list[str]]) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("| " + " | ".join(row) + " |")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        configs = load_configs(args)
        networks = [describe(name, config, args) for name, config in configs.items()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.json:
        print(json.dumps(networks, indent=2))
    elif args.markdown:
        print_markdown(tabulate(networks, configs))
    elif args.csv:
        csv.writer(sys.stdout).writerows(tabulate(networks, configs))
    else:
        print("\n\n".join(map(format_breakdown, networks)))


if __name__ == "__main__":
    main()
