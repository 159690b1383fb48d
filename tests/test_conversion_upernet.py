"""Official segmentors to folders for `AutoModelForSemanticSegmentation`, and the preprocessing of their variants."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from modeling_piip import PiipConfig, PiipForSemanticSegmentation, PiipImageProcessor, PiipImageProcessorPil
from modeling_piip.conversion import ConversionError, build_image_processor, convert_config, convert_state_dict
from modeling_piip.conversion import rename_key as get_our_name
from scripts.convert_official_checkpoint import main

from .fixtures.inputs_rule import image
from .goldens import FIXTURES, read_manifest
from .head_goldens import HEADS, assert_matches_head, build_weight, read_case


VARIANTS = {
    "internvit-6b-512-upernet-ade20k": "upernet_internvit_6b_512_80k_ade20k_bs16_lr4e-5",
    "piip-h6b-512-192-upernet-ade20k": "upernet_internvit_h6b_192_512_80k_ade20k_bs16_lr4e-5",
    "piip-h6b-512-256-upernet-ade20k": "upernet_internvit_h6b_256_512_80k_ade20k_bs16_lr4e-5",
    "piip-h6b-512-384-upernet-ade20k": "upernet_internvit_h6b_384_512_80k_ade20k_bs16_lr4e-5",
    "piip-h6b-512-512-upernet-ade20k": "upernet_internvit_h6b_512_512_80k_ade20k_bs16_lr4e-5",
}
PREPROCESSING = json.loads((HEADS / "preprocessing.seg.json").read_text())["configs"][
    "upernet_internvit_h6b_256_512_80k_ade20k_bs16_lr4e-5"
]["images"]


def read_official(name: str) -> tuple[dict, dict[str, list[int]]]:
    """The official segmentor and the shapes of all its weights."""
    backbone = read_manifest(FIXTURES / "manifests" / f"{name}.json.gz")
    heads = read_manifest(FIXTURES / "head_manifests" / f"{name}.json.gz")
    official = heads["model_without_backbone"] | {"backbone": backbone["upstream_config"]}
    return official, backbone["state_dict"] | heads["state_dict"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_segmentors_map_one_to_one(variant):
    official, shapes = read_official(VARIANTS[variant])
    config = PiipConfig.from_variant(variant)
    with torch.device("meta"):
        model = PiipForSemanticSegmentation(config)
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted, left_out = convert_state_dict(weights, model)
    assert converted.keys() == model.state_dict().keys()
    assert len(converted) + len(left_out) == len(weights)
    assert not [name for name in left_out if "head" in name]
    assert len([name for name in converted if name.startswith(("decode_head.", "auxiliary_head."))]) == 82

    expected, model_class = convert_config(official, "segmentation")
    assert model_class is PiipForSemanticSegmentation
    assert config.uper_net == expected.uper_net and config.num_labels == expected.num_labels == 150
    # no windows at all, or none in every layer
    branches, expected_branches = (
        [asdict(branch) | {"window_size": branch.window_sizes} for branch in c.branches] for c in (config, expected)
    )
    assert branches == expected_branches
    assert config.architectures == ["PiipForSemanticSegmentation"]


@pytest.fixture(scope="module")
def converted_folder(tmp_path_factory):
    """The end-to-end case, converted by the command line from a checkpoint as mmsegmentation writes it."""
    case, folder = read_case("e2e_upernet_tiny"), tmp_path_factory.mktemp("official")
    official = case["model"] | {"backbone": case["backbone"]}
    with torch.device("meta"):
        model = PiipForSemanticSegmentation(convert_config(official)[0])
    weights = {name: build_weight(name, shape) for name, shape in case["state_dict"].items()}
    head_names = read_manifest(FIXTURES / "head_manifests" / f"{next(iter(VARIANTS.values()))}.json.gz")["state_dict"]
    for name in head_names:
        weights[name] = build_weight(name, model.state_dict()[get_our_name(name, model.config)].shape)
    classes = tuple(f"class {number}" for number in range(model.config.num_labels))
    # as mmsegmentation writes them for a data set that has none
    colours = np.arange(3 * len(classes)).reshape(-1, 3)
    torch.save({"meta": {"CLASSES": classes, "PALETTE": colours}, "state_dict": weights}, folder / "official.pth")
    (folder / "official.json").write_text(json.dumps({"model": official}))
    arguments = ["--official_config", str(folder / "official.json"), "--checkpoint", str(folder / "official.pth")]
    main([*arguments, "--output_dir", str(folder / "converted")])
    return folder / "converted"


@torch.no_grad()
def test_segmentor_becomes_a_folder_that_gives_the_official_logits(converted_folder):
    case = read_case("e2e_upernet_tiny")["case"]
    model = AutoModelForSemanticSegmentation.from_pretrained(converted_folder)
    assert type(model) is PiipForSemanticSegmentation
    pixel_values = torch.from_numpy(image(case["seed"], (1, 3, *case["image"])))
    assert_matches_head(model(pixel_values).logits, "e2e_upernet_tiny", "slide", "averaged_logits")


def test_classes_have_the_names_of_the_checkpoint(converted_folder):
    config = PiipConfig.from_pretrained(converted_folder)
    assert config.id2label == {number: f"class {number}" for number in range(config.num_labels)}
    assert config.label2id == {f"class {number}": number for number in range(config.num_labels)}


def test_folder_holds_the_preprocessing_of_the_official_segmentors(converted_folder):
    processor = AutoImageProcessor.from_pretrained(converted_folder)
    assert processor.do_reduce_labels
    features = processor(Image.new("RGB", (200, 150)), Image.new("L", (200, 150)), return_tensors="pt")
    assert features.pixel_values.shape == (1, 3, 128, 171)
    assert features.labels.unique().tolist() == [255]


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("decode_head", "align_corners", True),
        ("decode_head", "in_index", [1, 2, 3]),
        ("decode_head", "type", "FCNHead"),
        ("auxiliary_head", "num_convs", 2),
        ("auxiliary_head", "concat_input", True),
    ],
)
def test_heads_with_other_settings_are_refused(part, name, value):
    official, _ = read_official(VARIANTS["piip-h6b-512-192-upernet-ade20k"])
    official[part][name] = value
    with pytest.raises(ConversionError, match=f"`{name}` of `{part}` is"):
        convert_config(official, "segmentation")


def test_windows_that_are_no_squares_are_refused():
    official, _ = read_official(VARIANTS["piip-h6b-512-192-upernet-ade20k"])
    official["test_cfg"]["crop_size"] = [512, 640]
    with pytest.raises(ConversionError, match="`crop_size` of `test_cfg`.*only squares"):
        convert_config(official, "segmentation")


# Preprocessing


def draw_official_image(seed: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) in RGB, as the case file describes it."""
    rng = np.random.Generator(np.random.PCG64(seed))
    grid = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3)).repeat(16, 0).repeat(16, 1)
    noise = rng.integers(-40, 41, (height, width, 3))
    return np.clip(grid[:height, :width] + noise, 0, 255).astype(np.uint8)[..., ::-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_processors_of_variants_are_those_of_the_official_configurations(variant):
    config = PiipConfig.from_variant(variant)
    expected = build_image_processor(config, "segmentation").to_dict()
    folder = PiipImageProcessor.from_pretrained(FIXTURES.parents[1] / "configuration" / variant).to_dict()
    for name in ("size", "do_center_crop", "do_pad", "resample", "image_mean", "image_std", "do_reduce_labels"):
        assert folder[name] == expected[name], name


@pytest.mark.parametrize("processor_class", [PiipImageProcessor, PiipImageProcessorPil])
@pytest.mark.parametrize("example", PREPROCESSING, ids=lambda example: str(example["ori_hw"]))
def test_images_are_prepared_as_in_the_official_evaluation(example, processor_class):
    config = PiipConfig.from_variant("piip-h6b-512-256-upernet-ade20k")
    options = build_image_processor(config, "segmentation").to_dict()
    pixels = draw_official_image(example["image_seed"], *example["ori_hw"])
    pixel_values = processor_class(**options)(pixels, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, *example["img_shape"][:2])
    if "tensor" in example:
        stored = load_file(HEADS / "preprocessing.seg.safetensors")
        values = pixel_values.flatten()[stored[f"{example['tensor']}#idx"].long()]
        # two of 255 steps: OpenCV and Pillow round weights otherwise
        assert (values - stored[f"{example['tensor']}#val"]).abs().max() < 2 / 255 / 0.224 + 1e-3
