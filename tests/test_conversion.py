"""Official checkpoints to folders for `from_pretrained`, through the command line as users run it."""

import argparse
import copy
import functools
import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_piip import PiipBackbone, PiipConfig, PiipForImageClassification
from modeling_piip.conversion import (
    ConversionError,
    convert_config,
    convert_state_dict,
    load_official_checkpoint,
    set_class_names,
)
from scripts.convert_official_checkpoint import main

from .goldens import (
    CASES,
    GOLDENS,
    assert_matches,
    build_input,
    build_official_weights,
    get_official_config,
)
from .head_goldens import read_case


@pytest.fixture
def case_files(tmp_path):
    """Writes configuration and weights of a golden case; returns the arguments of the command line."""

    def write(name, wrap=lambda weights: weights, official=None):
        case = CASES[name]
        config_file, checkpoint = tmp_path / "official.json", tmp_path / "official.pth"
        config_file.write_text(json.dumps(official or get_official_config(case)))
        torch.save(wrap(build_official_weights(case)), checkpoint)
        folder = tmp_path / "converted"
        arguments = ["--official_config", str(config_file), "--checkpoint", str(checkpoint)]
        return folder, [*arguments, "--output_dir", str(folder)]

    return write


def assert_maps_match(name, model):
    case = CASES[name]
    with torch.no_grad():
        feature_maps = model.eval()(build_input(case)).feature_maps
    stored = load_file(GOLDENS / case["file"])
    entries = {output: entry for output, entry in case["outputs"].items() if output.startswith("map")}
    assert len(feature_maps) == len(entries)
    for k, (output, entry) in enumerate(entries.items()):
        assert output == f"map{k}"
        assert_matches(feature_maps[k], output, entry, stored)


def add_prefix(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


WRAPPERS = {
    "bare": lambda weights: weights,
    "mmcv": lambda weights: {
        "meta": {"epoch": 12, "CLASSES": ("a", "b"), "best": np.float64(0.5)},
        "state_dict": add_prefix(weights, "backbone."),
    },
    "classification": lambda weights: {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
    "deepspeed": lambda weights: {"module": add_prefix(weights, "backbone."), "optimizer": None, "dp_world_size": 8},
    "data_parallel": lambda weights: {"state_dict": add_prefix(weights, "module.backbone.")},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_backbone_dictionary_becomes_a_backbone_folder(wrapper, case_files):
    folder, arguments = case_files("det_tiny_dino", WRAPPERS[wrapper])
    main(arguments)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_piip.py"} <= set(
        os.listdir(folder)
    )
    assert_maps_match("det_tiny_dino", PiipBackbone.from_pretrained(folder))


def test_old_pickle_format_is_read(case_files, tmp_path):
    folder, arguments = case_files("seg_tiny_2branch")
    weights = build_official_weights(CASES["seg_tiny_2branch"])
    torch.save(weights, tmp_path / "official.pth", _use_new_zipfile_serialization=False)
    main(arguments)
    assert_maps_match("seg_tiny_2branch", PiipBackbone.from_pretrained(folder))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads the memory map of Linux")
def test_weights_stay_in_the_file_until_they_are_written(case_files, tmp_path):
    # 6B models are larger than the memory of many machines
    case_files("det_tiny_2branch_internvit")
    weights = load_official_checkpoint(tmp_path / "official.pth")
    with torch.device("meta"):
        model = PiipBackbone(convert_config(get_official_config(CASES["det_tiny_2branch_internvit"]), "detection")[0])
    converted, _ = convert_state_dict(weights, model)
    with open("/proc/self/maps") as file:
        mapped = [line.split()[0].split("-") for line in file if line.endswith("official.pth\n")]
    ranges = [range(int(start, 16), int(end, 16)) for start, end in mapped]
    assert converted and all(any(value.data_ptr() in part for part in ranges) for value in converted.values())


def test_weights_are_written_in_the_wanted_type(case_files):
    folder, arguments = case_files("seg_tiny_2branch")
    main([*arguments, "--dtype", "bfloat16"])
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    model = PiipBackbone.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    # the model computes; the numbers have only 8 bits of precision
    with torch.no_grad():
        maps = model(build_input(CASES["seg_tiny_2branch"]).bfloat16()).feature_maps
    assert all(torch.isfinite(feature_map).all() for feature_map in maps)


def test_classification_dictionary_becomes_a_classifier(case_files):
    name = "cls_tiny_merge_head"
    official = {"model": {"backbone": get_official_config(CASES[name])}}
    folder, arguments = case_files(name, official=official)
    main([*arguments, "--official_codebase", "classification"])
    model = PiipForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(build_input(CASES[name])).logits
    assert_matches(logits, "logits", CASES[name]["outputs"]["logits"], load_file(GOLDENS / CASES[name]["file"]))


@pytest.mark.slow
def test_published_variant_gives_the_official_logits(tmp_path):
    case = CASES["full_piip_3branch_tsb_368-192-128_cls_token_deit1"]
    checkpoint, folder = tmp_path / "official.pth", tmp_path / "piip-tsb"
    torch.save({"model": build_official_weights(case)}, checkpoint)
    variant = "piip-tsb-368-192-128-in1k"
    main(["--variant", variant, "--checkpoint", str(checkpoint), "--output_dir", str(folder)])
    model = PiipForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(build_input(case)).logits
    assert_matches(logits, "logits", case["outputs"]["logits"], load_file(GOLDENS / case["file"]))
    assert model.config.id2label[1] == "goldfish, Carassius auratus"


def test_variant_without_checkpoint_is_downloaded_from_the_official_repository(monkeypatch, tmp_path):
    requested = []

    def download(repository, filename):
        requested.append((repository, filename))
        raise FileNotFoundError("no network in a test")

    monkeypatch.setattr("modeling_piip.conversion.hf_hub_download", download)
    with pytest.raises(SystemExit, match="no network"):
        main(["--variant", "piip-sbl-384-192-128-in1k", "--output_dir", str(tmp_path / "out")])
    assert requested == [
        ("OpenGVLab/PIIP", "classification/piip_3branch_sbl_384-192-128_cls_token_augreg.pth"),
    ]


def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(case_files):
    def damage(weights):
        weights["branch1.blocks.0.mlp.fc3.weight"] = torch.zeros(2, 2)
        weights["w1"] = torch.zeros(3, 3)
        del weights["branch2.pos_embed"]
        return weights

    folder, arguments = case_files("det_tiny_dino", damage)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    message = str(error.value)
    assert "3 problems" in message
    assert "unknown    branch1.blocks.0.mlp.fc3.weight (2, 2)" in message
    assert "misshapen  w1 (3, 3), expected (1,)" in message
    assert "missing    piip.branches.1.embeddings.position_embeddings (1, 16, 32)" in message
    assert not folder.exists()


def test_checkpoint_of_another_variant_is_refused(tmp_path):
    checkpoint = tmp_path / "official.pth"
    torch.save(build_official_weights(CASES["cls_tiny_deit_3branch"]), checkpoint)
    arguments = ["--variant", "piip-tsb-368-192-128-in1k", "--checkpoint", str(checkpoint)]
    with pytest.raises(SystemExit, match="misshapen  branch1.cls_token"):
        main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["official.pth"]


def test_interrupted_conversion_leaves_nothing(case_files, monkeypatch):
    folder, arguments = case_files("det_tiny_dino")

    def interrupt(self, path, **options):
        (path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PiipBackbone, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert sorted(os.listdir(folder.parent)) == ["official.json", "official.pth"]


def test_folder_with_content_is_not_touched(case_files):
    folder, arguments = case_files("det_tiny_dino")
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit, match="is not empty"):
        main(arguments)
    assert os.listdir(folder) == ["mine.txt"]


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "epoch": Attack()}, "evil.pth")
    with pytest.raises(Exception, match="mkdir"):
        load_official_checkpoint("evil.pth")
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_heads_of_detectors_are_left_out_by_name(case_files, capsys):
    def add_heads(weights):
        weights["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
        weights["rpn_head.rpn_conv.weight"] = torch.zeros(1)
        return weights

    _, arguments = case_files("det_tiny_dino", add_heads)
    main(arguments)
    printed = capsys.readouterr().out
    assert "Left out 1 weights: rpn_head.* belongs to Mask R-CNN" in printed
    assert "Left out 6 weights: the official code builds them and never uses them" in printed


def test_fourth_branch_of_detectors_follows_the_shapes_of_the_checkpoint():
    case = CASES["det_tiny_4branch_branch4_from_branch3"]
    official = get_official_config(case)
    as_published, _ = convert_config(official, "detection", build_official_weights(case))
    assert as_published.branches[0].hidden_size == official["branch3"]["embed_dim"]
    own_width = official["branch4"]["embed_dim"]
    repaired = {"branch4.patch_embed.proj.bias": torch.zeros(own_width)}
    config, _ = convert_config(official, "detection", repaired)
    assert config.branches[0].hidden_size == own_width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interact_attn_type": "magic"}, "interact_attn_type"),
        ({"branch1": {"real_size": 96, "pretrained": None, "interaction_indexes": [[0, 1]]}}, "pretrained"),
    ],
)
def test_configurations_that_are_not_understood_are_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        convert_config(get_official_config(CASES["det_tiny_dino"]) | change, "detection")


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("e2e_dino_tiny", "neck.out_channels"),
        ("e2e_dino_tiny", "train_cfg.assigner.cls_cost.weight"),
        ("e2e_dino_tiny", "bbox_head.transformer.decoder.transformerlayers.attn_cfgs"),
        ("e2e_dino_tiny", "bbox_head.num_classes"),
        ("e2e_upernet_tiny", "decode_head.channels"),
        ("e2e_upernet_tiny", "auxiliary_head.loss_decode.loss_weight"),
        ("e2e_upernet_tiny", "test_cfg.stride"),
    ],
)
def test_what_a_configuration_of_a_head_lacks_is_named(case, path):
    case = read_case(case)
    official = copy.deepcopy(case["model"] | {"backbone": case["backbone"]})
    *parts, name = path.split(".")
    del functools.reduce(dict.__getitem__, parts, official)[name]
    with pytest.raises(ConversionError, match=f"lacks `{re.escape(path)}`"):
        convert_config(official)


def test_segmentation_with_three_branches_is_refused():
    with pytest.raises(ConversionError, match="relative to the second one"):
        convert_config(get_official_config(CASES["det_tiny_dino"]), "segmentation")


@pytest.mark.parametrize(
    "meta",
    [{"CLASSES": ("a", "b", "c")}, {"CLASSES": "ab"}, {"CLASSES": ["a", "a"]}, {"CLASSES": None}, {}, None, "x"],
)
def test_names_that_do_not_fit_the_classes_are_left_alone(meta):
    config = PiipConfig(num_labels=2)
    set_class_names(config, {"meta": meta})
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    set_class_names(config, {"meta": {"CLASSES": ["a", "b"]}})
    assert config.id2label == {0: "a", 1: "b"} and config.label2id == {"a": 0, "b": 1}


def test_file_without_weights_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConversionError, match="holds a list"):
        load_official_checkpoint(tmp_path / "list.pth")


def test_blocks_must_all_run_in_order():
    official = get_official_config(CASES["det_tiny_dino"])
    branch = official["branch1"] | {"interaction_indexes": [[0, 0], [0, 1]]}
    with pytest.raises(ConversionError, match="do not run through its 2 blocks"):
        convert_config(official | {"branch1": branch}, "detection")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--official_config", "x.json"], "needs --checkpoint"),
        (["--variant", "x", "--official_config", "x.json"], "not allowed with"),
        (["--variant", "x", "--official_codebase", "detection"], "goes with --official_config"),
        ([], "required"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--output_dir", "out"])
    assert message in capsys.readouterr().err


def test_unknown_variant_lists_close_names():
    with pytest.raises(ValueError, match="piip-tsb-368-192-128-in1k"):
        PiipConfig.from_variant("piip-tsb-368")
