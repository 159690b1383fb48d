"""Official Mask R-CNNs to folders for `AutoModelForInstanceSegmentation`."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from modeling_piip import PiipConfig, PiipForInstanceSegmentation, PiipInstanceSegmentationImageProcessor
from modeling_piip.conversion import (
    ConversionError,
    convert_config,
    convert_state_dict,
    get_pad_size_divisor,
    rename_key,
    unwrap_state_dict,
)
from scripts.convert_official_checkpoint import main

from .goldens import FIXTURES, read_manifest
from .head_goldens import build_weight, read_case, read_tensors
from .test_goldens_mask_rcnn import (
    END_TO_END,
    HEAD_NAMES,
    assert_same_detections,
    build_end_to_end_input,
    read_detections,
)


VARIANTS = [name for name in PiipConfig.list_variants() if "mask-rcnn" in name]


def test_all_published_ones_are_variants():
    official = {path.name.removesuffix(".json.gz") for path in (FIXTURES / "head_manifests").glob("mask_rcnn_*")}
    assert {PiipConfig.from_variant(name).official_config for name in VARIANTS} == official and len(official) == 30


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_map_one_to_one(variant):
    config = PiipConfig.from_variant(variant)
    backbone = read_manifest(FIXTURES / "manifests" / f"{config.official_config}.json.gz")
    heads = read_manifest(FIXTURES / "head_manifests" / f"{config.official_config}.json.gz")
    shapes = {f"backbone.{name}": shape for name, shape in backbone["state_dict"].items()} | heads["state_dict"]
    with torch.device("meta"):
        model = PiipForInstanceSegmentation(config)
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted, left_out = convert_state_dict(unwrap_state_dict(weights), model)
    assert converted.keys() == model.state_dict().keys()
    assert not [name for name in left_out if name in heads["state_dict"]]
    ours = [name for name in converted if name.startswith(("neck.", "rpn_head.", "roi_head."))]
    assert len(ours) == len(heads["state_dict"]) == 42


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_processor_of_instances(variant):
    config = PiipConfig.from_variant(variant)
    processor = AutoImageProcessor.from_pretrained(FIXTURES.parents[1] / "configuration" / variant)
    assert type(processor) is PiipInstanceSegmentationImageProcessor
    assert processor.pad_size_divisor == get_pad_size_divisor(config.branches)


@pytest.fixture(scope="module")
def official():
    case = read_case(END_TO_END)
    return case["model"] | {"backbone": case["backbone"]}


@pytest.fixture(scope="module")
def converted_folder(official, tmp_path_factory):
    """The end-to-end case, converted by the command line from a checkpoint as the official code writes it."""
    folder = tmp_path_factory.mktemp("official")
    with torch.device("meta"):
        model = PiipForInstanceSegmentation(convert_config(official)[0])
    shapes = {name: model.get_parameter(rename_key(name, model.config)).shape for name in HEAD_NAMES}
    shapes |= read_case(END_TO_END)["state_dict"]
    weights = {name: build_weight(name, shape) for name, shape in shapes.items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": weights}, folder / "official.pth")
    (folder / "official.json").write_text(json.dumps({"model": official}))
    arguments = ["--official_config", str(folder / "official.json"), "--checkpoint", str(folder / "official.pth")]
    main([*arguments, "--output_dir", str(folder / "converted")])
    return folder / "converted"


@torch.no_grad()
def test_detector_becomes_a_folder_that_gives_the_official_detections(converted_folder):
    model = AutoModelForInstanceSegmentation.from_pretrained(converted_folder)
    assert type(model) is PiipForInstanceSegmentation
    sizes = [meta["ori_shape"][:2] for meta in read_case(END_TO_END)["metas"]]
    stored = read_tensors(END_TO_END, "detections")
    for index, found in enumerate(read_detections(model(*build_end_to_end_input()), sizes)):
        assert_same_detections(*found, stored[f"boxes_img{index}"], stored[f"labels_img{index}"])


def test_folder_holds_the_processor_of_instances(converted_folder):
    processor = AutoImageProcessor.from_pretrained(converted_folder)
    assert type(processor) is PiipInstanceSegmentationImageProcessor
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (256 * 800 // 1333, 256)
    assert processor.pad_size_divisor == 224


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("neck", "num_outs", 4, "`num_outs` of `neck` is 4"),
        ("roi_head", "type", "CascadeRoIHead", "`type` of `roi_head` is"),
        ("rpn_head", "loss_bbox", {"type": "SmoothL1Loss"}, "`type` of `rpn_head.loss_bbox`"),
        ("rpn_head", "anchor_generator", {"scales": [4, 8], "ratios": [1.0]}, "only one scale"),
        ("rpn_head", "anchor_generator", {"scales": [8]}, "lacks `rpn_head.anchor_generator.ratios`"),
    ],
)
def test_other_detectors_are_refused(official, part, name, value, message):
    with pytest.raises(ConversionError, match=message):
        convert_config(official | {part: official[part] | {name: value}})
