"""Published variants: table, folders and official files agree, and official weights fit."""

import filecmp
import json
import math
import re
from dataclasses import asdict

import pytest
import torch

from modeling_piip import PiipBackbone, PiipConfig, PiipImageProcessor
from modeling_piip.configuration_piip import find_variant
from modeling_piip.conversion import (
    BASELINE_TYPES,
    MODEL_CLASSES,
    convert_config,
    convert_state_dict,
    fit_fourth_branch,
    unwrap_state_dict,
)
from scripts import convert_official_checkpoint, make_configuration

from .goldens import FIXTURES, read_manifest


VARIANTS = PiipConfig.list_variants()
DENSE_VARIANTS = [name for name in VARIANTS if not name.endswith("-in1k")]
BACKBONE_PREFIXES = ("piip.", "feature_pyramid.", "classifiers.")
# Official parameters that no forward of the official code uses, and buffers that we compute
UNUSED_TEXTS = (".relative_position_index", "convnext_model.layernorm.", "fpn1.")


def read_backbone_manifest(config: PiipConfig) -> dict:
    return read_manifest(FIXTURES / "manifests" / f"{config.official_config}.json.gz")


def read_head_manifest(config: PiipConfig) -> dict:
    """What the official files of a detector or segmenter hold beside the backbone; classifiers have nothing."""
    path = FIXTURES / "head_manifests" / f"{config.official_config}.json.gz"
    return read_manifest(path) if path.exists() else {"model_without_backbone": {}, "state_dict": {}}


def get_official_model(config: PiipConfig) -> tuple[dict, str]:
    """The official `model` dictionary of a variant, and the code base it comes from."""
    manifest = read_backbone_manifest(config)
    backbone = manifest["upstream_config"]
    if manifest["upstream_class"] in BASELINE_TYPES:
        backbone = backbone | {"type": manifest["upstream_class"]}
    return read_head_manifest(config)["model_without_backbone"] | {"backbone": backbone}, get_kind(manifest)


def get_kind(manifest: dict) -> str:
    return manifest["kind"].removesuffix("-backbone")


def describe_branches(config: PiipConfig) -> list[dict]:
    return [asdict(branch) | {"window_size": branch.window_sizes} for branch in config.branches]


def list_files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/*")}


def test_folders_are_what_the_table_gives(tmp_path):
    make_configuration.main(["--output_dir", str(tmp_path)])
    files = list_files(make_configuration.FOLDER)
    assert files == list_files(tmp_path) and len(files) == 2 * 41
    _, changed, missing = filecmp.cmpfiles(make_configuration.FOLDER, tmp_path, files, shallow=False)
    assert changed + missing == [], "run scripts/make_configuration.py"


def test_variant_of_the_documentation_can_be_built():
    document = (make_configuration.FOLDER / "README.md").read_text(encoding="utf-8")
    entries = json.loads("{" + re.search(r"```json\n(.+?)```", document, flags=re.DOTALL)[1] + "}")
    table = json.loads((make_configuration.FOLDER / "variants.json").read_text(encoding="utf-8"))
    (entry,) = entries.values()
    config = PiipConfig(**make_configuration.build_config(make_configuration.resolve(entry, table["families"]), table))
    assert [branch.image_size for branch in config.branches] == entry["image_sizes"]
    assert [branch.window_size for branch in config.branches] == [14, 14, 14]
    assert [branch.drop_path_rate for branch in config.branches] == [0.05, 0.05, 0.2]
    assert (config.interaction_num_points, config.mask_rcnn.box_score_thresh) == (8, 0.01)
    assert config.official_checkpoint is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_the_official_configuration(variant):
    config = PiipConfig.from_variant(variant)
    official, codebase = get_official_model(config)
    expected, _ = convert_config(official, codebase)
    if official["backbone"].get("type") in ("vit_models", "InternViT6B"):
        # the official dictionary of a single ViT does not say at which resolution it runs
        expected.branches[0].image_size = config.branches[0].image_size
    assert describe_branches(config) == describe_branches(expected)
    heads = [name for name in ("uper_net", "dino", "mask_rcnn") if getattr(expected, name) is not None]
    for name in (*make_configuration.OTHER_OPTIONS, *heads):
        assert getattr(config, name) == getattr(expected, name), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_are_those_of_the_data_set(variant):
    config = PiipConfig.from_variant(variant)
    labels = list(config.id2label.values())
    first, last, number = {
        "in1k": ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue", 1000),
        "coco": ("person", "toothbrush", 80),
        "ade20k": ("wall", "flag", 150),
    }[variant.rpartition("-")[2]]
    assert list(config.id2label) == list(range(number)) and (labels[0], labels[-1]) == (first, last)
    assert all(config.id2label[index] == label for label, index in config.label2id.items())
    assert set(labels) == set(config.label2id)


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_rates_are_the_official_ones(variant):
    config = PiipConfig.from_variant(variant)
    official = read_backbone_manifest(config)["drop_path_rates"]
    for number, branch in enumerate(reversed(config.branches), start=1):
        prefix = f"branch{number}." if len(config.branches) > 1 else ""
        # one class has a module per layer, another one per residual; layers with the rate 0 have none
        names = [name for name in official if name.startswith(prefix) and name.endswith(("drop_path", "drop_path1"))]
        rates = [rate for rate in branch.drop_path_rates if rate > 0]
        assert [official[name] for name in names] == pytest.approx(rates, abs=1e-6)
    interactions = {rate for name, rate in official.items() if name.startswith("interactions.")}
    assert interactions <= {config.interaction_drop_path_rate}


@pytest.mark.parametrize("variant", DENSE_VARIANTS)
def test_preprocessing_is_the_official_one(variant):
    config = PiipConfig.from_variant(variant)
    processor = PiipImageProcessor.from_pretrained(find_variant(variant))
    official = read_head_manifest(config)["preprocessing"]["digest"]["test"]
    (normalize,), (test,) = official["normalize"], official["multi_scale_flip_aug"]
    assert [round(value * 255, 3) for value in processor.image_mean] == normalize["mean"]
    assert [round(value * 255, 3) for value in processor.image_std] == normalize["std"]
    long, short = test["img_scale"]
    assert processor.size["shortest_edge"] == short
    # the official test resize of segmenters knows the short side only; a far limit makes ours round like it
    assert processor.size["longest_edge"] == (8192 if config.uper_net else long)
    divisors = [pad["size_divisor"] for pad in official["pad"]]
    assert ([processor.pad_size_divisor] if processor.do_pad else []) == divisors
    assert processor.resample == 2 and not processor.do_center_crop


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_weights_map_one_to_one(variant):
    config = PiipConfig.from_variant(variant)
    model_class = MODEL_CLASSES.get(config.architectures[0], PiipBackbone)
    backbone, head = read_backbone_manifest(config)["state_dict"], read_head_manifest(config)["state_dict"]
    with torch.device("meta"):
        model = model_class(config)
        weights = {f"backbone.{name}": torch.empty(shape) for name, shape in backbone.items()}
        weights |= {name: torch.empty(shape) for name, shape in head.items()}
    weights = unwrap_state_dict({"state_dict": weights})
    assert weights.keys() == backbone.keys() | head.keys()
    converted, left_out = convert_state_dict(weights, model)
    # nothing is left over on either side, or `convert_state_dict` had raised; here: no two weights became one
    folded = {name for name in backbone if name.endswith("temporal_pos_embed.weight")}
    unused = {name for name in left_out if any(text in name for text in UNUSED_TEXTS)}
    ours = {name: value for name, value in converted.items() if name.startswith(BACKBONE_PREFIXES)}
    assert len(ours) == len(backbone.keys() - folded - unused)
    if model_class is PiipBackbone:
        assert set(left_out) - unused == head.keys() and len(converted) == len(ours)
    else:
        assert set(left_out) == unused
        # heads may hold one official weight in several parts
        parts = [value.numel() for name, value in converted.items() if name not in ours]
        assert sum(parts) == sum(math.prod(shape) for shape in head.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_checkpoint_is_named_by_its_path(variant):
    config = PiipConfig.from_variant(variant)
    folder = get_kind(read_backbone_manifest(config))
    assert config.official_checkpoint in (None, f"{folder}/{config.official_config}.pth")


def test_variant_without_published_weights_says_so(tmp_path):
    arguments = ["--variant", "piip-lh6b-1536-1024-512-dino-coco", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="No weights were published for piip-lh6b-1536-1024-512-dino-coco"):
        convert_official_checkpoint.main(arguments)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "-tsbl-" in name])
@pytest.mark.parametrize("width", [384, 192])
def test_width_of_the_fourth_branch_is_read_from_the_checkpoint(variant, width):
    config = PiipConfig.from_variant(variant)
    weights = {"branch4.patch_embed.proj.bias": torch.empty(width, device="meta")}
    expected, _ = convert_config(*get_official_model(config), weights)
    fit_fourth_branch(config, weights)
    assert config.branches[0].hidden_size == width
    assert describe_branches(config) == describe_branches(expected)
