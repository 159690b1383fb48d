"""
Parameters and multiply-adds: the "official" convention against the numbers of the official scripts and of the paper
(`fixtures/complexity.json`), the "actual" one against what PyTorch sees in a forward pass.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from modeling_piip import (
    PiipBackbone,
    PiipConfig,
    PiipForImageClassification,
    PiipForObjectDetection,
    PiipForSemanticSegmentation,
)
from modeling_piip.complexity import count_actual, count_official, count_parameters
from scripts.complexity import main

from .common import build, images, tiny_branch, tiny_cls_config, tiny_config


ROOT = Path(__file__).parents[1]
# By the names of the official configurations; published numbers as they are printed, in millions and billions
OFFICIAL = json.loads((ROOT / "tests" / "fixtures" / "complexity.json").read_text())
VARIANT = "piip-tsb-368-192-128-in1k"
TINY_CONVNEXT = {
    "architecture": "convnext",
    "image_size": 64,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "stages": [1, 2, 2, 2],
}


def tiny_pyramid(**options) -> PiipConfig:
    """Regular pyramid of a ViT between two ConvNeXt branches."""
    vit = tiny_branch(image_size=48, num_hidden_layers=4, window_size=5)
    small_convnext = TINY_CONVNEXT | {"image_size": 32, "hidden_sizes": [8, 16, 16, 32]}
    branches = [TINY_CONVNEXT, vit, small_convnext]
    return tiny_config(branches=branches, merge_type="single_conv", merge_stages=[0, 1, 2], **options)


def run_script(capsys, *arguments: str) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def is_near(printed: str, number: int, unit: float) -> bool:
    """Whether a printed number is within one unit of its last digit."""
    last_digit = 10.0 ** -len(printed.partition(".")[2])
    return abs(number / unit - float(printed)) <= last_digit


# ----------------------------------------------------- official -----------------------------------------------------


def test_every_official_configuration_has_a_variant_to_count():
    variants = [PiipConfig.from_variant(name) for name in PiipConfig.list_variants()]
    assert sorted(config.official_config for config in variants) == sorted(OFFICIAL)


@pytest.mark.parametrize("variant", PiipConfig.list_variants())
def test_official_convention_gives_the_official_numbers(variant):
    config = PiipConfig.from_variant(variant)
    complexity, expected = count_official(config), OFFICIAL[config.official_config]
    assert complexity.total_parameters == expected["parameters"]
    assert complexity.total_flops == expected["flops"]
    if "published_parameters" in expected:
        assert is_near(expected["published_parameters"], complexity.total_parameters, 1e6)
    if "published_flops" in expected:
        assert is_near(expected["published_flops"], complexity.total_flops, 1e9)


def test_fixture_holds_all_published_pairs():
    assert sum("published_flops" in entry for entry in OFFICIAL.values()) == 29
    assert sum("published_parameters" in entry for entry in OFFICIAL.values()) == 21


def test_official_position_tables_have_one_entry_per_patch_of_the_input():
    config = tiny_config()
    small, large = (count_official(config, size).parameters for size in ((32, 32), (32, 64)))
    # 8 x 8 more patches for the first branch, 4 x 4 more for the second
    assert large["branch_1"] - small["branch_1"] == 64 * 16
    assert large["branch_2"] - small["branch_2"] == 16 * 32


def test_counting_leaves_the_configuration_as_it_is():
    config = tiny_config()
    before = config.to_dict()
    count_official(config)
    count_actual(config)
    assert config.to_dict() == before


# ------------------------------------------------------ actual ------------------------------------------------------


ACTUAL_CASES = {
    "windows padded before the projection": (PiipBackbone, tiny_config()),
    "windows padded after the projection": (
        PiipBackbone,
        tiny_config(branches=[tiny_branch(image_size=32, window_size=3, window_padding="qkv"), tiny_branch()]),
    ),
    "relative positions": (
        PiipBackbone,
        tiny_config(
            branches=[
                tiny_branch(image_size=32, window_size=3, position_embedding_type="relative", qkv_bias="qv"),
                tiny_branch(embedding_norm=True, qk_norm=True, norm_type="rmsnorm"),
            ]
        ),
    ),
    "class tokens and a classifier per branch": (PiipForImageClassification, tiny_cls_config()),
    "linear merge": (PiipForImageClassification, tiny_cls_config(merge_type="linear")),
    "cross attention": (PiipBackbone, tiny_config(interaction_attention="cross")),
    "no projections, norms and feed-forward networks between branches": (
        PiipBackbone,
        tiny_config(interaction_projection=False, interaction_norm=False, interaction_ffn_ratio=0),
    ),
    "fewer levels": (PiipBackbone, tiny_config(out_features=["p3", "p5"])),
    "regular pyramid with ConvNeXt": (PiipBackbone, tiny_pyramid()),
    "single ViT": (PiipBackbone, tiny_config(branches=[tiny_branch()], merge_type="concat", pyramid_norm="layer")),
    "UperNet": (PiipForSemanticSegmentation, tiny_config()),
    "DINO": (
        PiipForObjectDetection,
        tiny_config(dino={"hidden_size": 16, "num_queries": 6, "num_attention_heads": 2, "intermediate_size": 8}),
    ),
}


@pytest.mark.parametrize("name", ACTUAL_CASES)
def test_actual_convention_counts_every_product_that_pytorch_executes(name):
    model_class, config = ACTUAL_CASES[name]
    model = build(model_class, config)
    # PyTorch does not look into the fused attention of the CPU
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(images(1, 3, 72, 100))

    complexity = count_actual(config, (72, 100), model_class)
    # which does not count the sampling either
    sampling = sum(operations.get("sampling", 0) for operations in complexity.operations.values())
    assert 2 * (complexity.total_flops - sampling) == counter.get_total_flops()
    has_deformable_attention = len(config.branches) > 1 and config.interaction_attention == "deformable"
    assert (sampling > 0) == has_deformable_attention


@pytest.mark.parametrize("name", ACTUAL_CASES)
def test_parameters_are_those_of_the_model(name):
    model_class, config = ACTUAL_CASES[name]
    model = build(model_class, config)
    assert count_actual(config, (72, 100), model_class).total_parameters == model.num_parameters()


def test_sampling_counts_four_neighbours_and_one_weight_per_sample():
    # 8 x 8 and 4 x 4 queries, 2 points, values of half the width; two interactions
    expected = 2 * 5 * 2 * (64 * 16 // 2 + 16 * 32 // 2)
    assert count_actual(tiny_config()).operations["interactions"]["sampling"] == expected


def test_parts_are_those_of_the_model():
    model = build(PiipForImageClassification, tiny_cls_config(merge_type="linear"))
    modules = {
        "branch_1": model.piip.branches[0],
        "branch_2": model.piip.branches[1],
        "interactions": model.piip.interactions,
        "merge": model.piip.merges,
        "head": model.classifiers,
    }
    expected = {part: sum(weight.numel() for weight in module.parameters()) for part, module in modules.items()}
    assert {part: number for part, number in count_parameters(model).items() if number} == expected


# ------------------------------------------------------ script ------------------------------------------------------


@pytest.mark.parametrize("convention", ["official", "actual"])
def test_json_breakdown_adds_up_to_plain_numbers(capsys, convention):
    [network] = json.loads(run_script(capsys, "--variant", VARIANT, "--convention", convention, "--json"))
    assert network["variant"] == VARIANT
    assert network["official_config"] == "piip_3branch_tsb_368-192-128_cls_token_deit1"
    assert network["image_size"] == [368, 368]
    parts = list(network["breakdown"])
    assert parts == ["branch_1", "branch_2", "branch_3", "interactions", "merge", "pyramid", "head"]
    for name in ("parameters", "flops"):
        assert isinstance(network[name], int)
        assert network[name] == sum(part[name] for part in network["breakdown"].values())


def test_markdown_and_csv_hold_published_numbers_beside_ours(capsys):
    markdown = run_script(capsys, "--variant", VARIANT, "--markdown").splitlines()
    assert [cell.strip() for cell in markdown[2].strip("|").split("|")] == [
        VARIANT,
        "368/192/128",
        "144M",
        "144.0M",
        "17.4G",
        "17.4G",
        "top-1 82.1",
        "full",
    ]
    rows = list(csv.reader(run_script(capsys, "--variant", VARIANT, "--csv").splitlines()))
    assert rows[1] == [cell.strip() for cell in markdown[2].strip("|").split("|")]


def test_folder_of_a_model_is_counted_at_any_input_size(capsys, tmp_path):
    config = tiny_config(architectures=["PiipBackbone"])
    config.save_pretrained(tmp_path)
    arguments = ["--config", tmp_path, "--convention", "actual", "--image_size", 48, 40, "--json"]
    [network] = json.loads(run_script(capsys, *arguments))
    assert network["image_size"] == [48, 40]
    assert network["flops"] == count_actual(config, (48, 40)).total_flops
    assert "head" not in network["breakdown"]


def test_output_says_that_a_missing_head_is_not_counted(capsys, tmp_path):
    tiny_config(architectures=["PiipForDepthEstimation"]).save_pretrained(tmp_path)
    output = run_script(capsys, "--config", tmp_path, "--convention", "actual")
    assert "PiipForDepthEstimation" in output
    assert "head " not in output.splitlines()[-2]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--variant", "piip-tsb-368-192-128-imagenet"], VARIANT),
        (["--variant", VARIANT, "--image_size", "20", "20"], "too small"),
        (["--config", "no-such-folder"], "no-such-folder"),
    ],
)
def test_what_cannot_be_counted_ends_with_the_reason(arguments, reason):
    with pytest.raises(SystemExit, match=reason):
        main(arguments)


def test_largest_networks_are_counted_in_less_than_two_gigabytes():
    program = (
        "import resource; from scripts.complexity import main; "
        "main(['--variant', 'internvit-6b-1024-mask-rcnn-coco']); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(result.stdout.splitlines()[-1]) * unit < 2 * 1024**3
