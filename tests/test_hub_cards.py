"""Model cards: equal to what the script writes, valid for the Hub, true to the results table, and their code runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import modeling_piip
from modeling_piip import PiipBackbone, PiipConfig, PiipImageProcessor
from modeling_piip.configuration_piip import find_variant
from modeling_piip.conversion import convert_config, convert_variant_checkpoint
from scripts import convert_official_checkpoint, make_hub_cards
from scripts.make_hub_cards import CARDS, TASKS, load_results, render_card

from .common import build, tiny_config
from .goldens import CASES, FIXTURES, build_official_weights, get_official_config


ROOT = CARDS.parent
VARIANTS = PiipConfig.list_variants()
RESULTS = load_results()
RECIPES = {
    Path(entry["config"]).stem: entry
    for entry in json.loads((FIXTURES / "head_manifests" / "summary.json").read_text(encoding="utf-8"))
}
TASK_NAMES = [task.model_class for task in TASKS]
# Options that make the head as small as the rest of the model
SMALL_HEADS = {"PiipForSemanticSegmentation": {"uper_net": {"hidden_size": 8, "auxiliary_hidden_size": 8}}}


def read_card(variant: str) -> str:
    return (CARDS / f"{variant}.md").read_text(encoding="utf-8")


def first_variant_of(model_class: str) -> str:
    return next(name for name in VARIANTS if PiipConfig.from_variant(name).architectures == [model_class])


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def run_code_blocks(card: str, folder: Path) -> str:
    """Runs the Python blocks of a card beside an image, without network, in a process of their own."""
    Image.new("RGB", (50, 40), "orange").save(folder / "image.jpg")
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    program = "\n".join(code_blocks(card, "python"))
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{program}\n{result.stderr}"
    return result.stdout


# -------------------------------------------- cards and their sources --------------------------------------------


def test_cards_and_results_cover_exactly_the_variants():
    assert sorted(path.stem for path in CARDS.glob("*.md")) == VARIANTS
    assert sorted(RESULTS) == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_card_is_what_the_script_writes(variant):
    assert read_card(variant) == render_card(variant), f"run: python scripts/make_hub_cards.py {variant}"


def test_script_says_what_it_changed(tmp_path, monkeypatch, capsys):
    for source in ("results.json", "template.md.jinja"):
        (tmp_path / source).write_text((CARDS / source).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(make_hub_cards, "CARDS", tmp_path)
    stale, fresh, missing = VARIANTS[:3]
    (tmp_path / f"{stale}.md").write_text("old", encoding="utf-8")
    (tmp_path / f"{fresh}.md").write_text(read_card(fresh), encoding="utf-8")
    make_hub_cards.main([stale, fresh, missing])
    assert capsys.readouterr().out.splitlines() == [
        f"changed: hub_cards/{stale}.md",
        f"new: hub_cards/{missing}.md",
        "1 of 3 cards unchanged",
    ]
    assert {path.stem for path in tmp_path.glob("*.md")} == {stale, fresh, missing}
    assert (tmp_path / f"{stale}.md").read_text(encoding="utf-8") == read_card(stale)


def test_unknown_variant_is_refused_with_close_names():
    with pytest.raises(SystemExit, match="piip-tsb-368-192-128-in1k"):
        make_hub_cards.main(["piip-tsb-368"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata_is_valid_and_holds_the_published_results(variant):
    card, row = ModelCard(read_card(variant)), RESULTS[variant]
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert len(card.data.datasets) == 1 and "piip" in card.data.tags
    assert card.data.pipeline_tag in ("image-classification", "object-detection", "image-segmentation")
    results = card.data.eval_results or []
    names = {"top-1 accuracy": "top1", "box AP": "box_ap", "mask AP": "mask_ap", "mIoU": "mean_iou"}
    assert {names[result.metric_name]: result.metric_value for result in results} == (row["accuracy"] or {})
    assert ("model-index" in read_card(variant)) == bool(results) == bool(card.data.metrics)
    for result in results:
        assert "authors of the paper" in result.source_name
        assert result.source_url == f"https://github.com/OpenGVLab/PIIP/blob/main/{row['source']}"
        assert result.dataset_type == card.data.datasets[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_holds_the_published_numbers(variant):
    card, row = read_card(variant), RESULTS[variant]
    table = re.findall(r"^\| \S.* \| (.+) \| ([\d.]+) \|$", card.split("## Published results")[1], flags=re.MULTILINE)
    assert [float(value) for _, value in table] == list((row["accuracy"] or {}).values())
    assert re.findall(r"#Param ([\d.]+M)", card) == ([row["parameters"]] if row["parameters"] else [])
    assert re.findall(r"#FLOPs ([\d.]+G)", card) == ([row["flops"]] if row["flops"] else [])
    assert ("None: the authors published this configuration without a result." in card) == (not row["accuracy"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_card_and_results_agree_with_the_configuration(variant):
    card, row, config = read_card(variant), RESULTS[variant], PiipConfig.from_variant(variant)
    assert row["checkpoint"] == getattr(config, "official_checkpoint", None)
    assert f"`{config.official_config}`" in card
    rows = re.findall(r"^\| (\d) \| (\d+) \| ([^|]+) \|", card, flags=re.MULTILINE)
    assert [int(size) for _, size, _ in rows] == [branch.image_size for branch in config.branches]


@pytest.mark.parametrize("variant", VARIANTS)
def test_card_says_whether_a_checkpoint_was_published(variant):
    card, checkpoint = read_card(variant), RESULTS[variant]["checkpoint"]
    assert ("No checkpoint was published" in card) == (checkpoint is None)
    if checkpoint:
        assert f"(https://huggingface.co/OpenGVLab/PIIP/blob/main/{checkpoint})" in card


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_command_is_understood(variant):
    (command,) = code_blocks(read_card(variant), "bash")
    python, script, *arguments = command.replace("\\\n", " ").split()
    assert (python, script) == ("python", "scripts/convert_official_checkpoint.py")
    args = convert_official_checkpoint.parse_args(arguments)
    assert args.variant == variant and args.output_dir == Path(variant)
    assert (args.checkpoint is None) == (RESULTS[variant]["checkpoint"] is not None)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.endswith("in1k")])
def test_recipe_is_the_official_one(variant):
    row, official = RESULTS[variant], RECIPES[PiipConfig.from_variant(variant).official_config]
    recipe = row["recipe"]
    assert recipe["learning_rate"] == official["lr"]
    assert recipe["batch_size"] == official["total_batch"]
    assert recipe["layer_decay"] == official["paramwise"].get("layer_decay_rate")
    if row["dataset"] == "coco":
        epochs, drops = make_hub_cards.EPOCHS[row["schedule"]]
        assert official["runner"]["max_epochs"] == epochs
        assert drops == "{} and {}".format(*official["lr_config"]["step"])
        assert (official["grad_clip"] is not None) == ("clipped" in read_card(variant))
    else:
        assert row["schedule"] == "80k" and official["runner"]["max_iters"] == 80_000
    scales = official["train_resize"][0]["img_scale"]
    if len(official["train_resize"]) == 3:
        assert recipe["short_sides"] == [scales[0][0], scales[-1][0]] and len(scales) == 11
        assert {long_side for _, long_side in scales} == {recipe["longest_side"]}
        size = PiipConfig.from_variant(variant).image_size
        assert official["train_crop"][1]["crop_size"] == [size, size]
    else:
        assert "short_sides" not in recipe


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_start_is_named_per_branch(variant):
    assert len(RESULTS[variant]["pretraining"]) == len(PiipConfig.from_variant(variant).branches)


# ------------------------------------------------- heads and code -------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_card_changes_when_the_head_exists(task, monkeypatch):
    variant = first_variant_of(task.model_class)
    monkeypatch.setattr(modeling_piip, task.model_class, PiipBackbone, raising=False)
    with_head = render_card(variant)
    monkeypatch.delattr(modeling_piip, task.model_class)
    without_head = render_card(variant)
    assert task.auto_class in with_head and "Status: backbone only" not in with_head
    assert f"`{task.model_class}` does not exist" in without_head and "PiipBackbone" in without_head
    assert task.auto_class not in without_head


@pytest.mark.parametrize("variant", VARIANTS)
def test_code_compiles(variant):
    blocks = code_blocks(read_card(variant), "python")
    assert blocks and all(f'"{variant}"' in block for block in blocks)
    for block in blocks:
        compile(block, variant, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_code_runs_on_a_small_model(task, tmp_path):
    variant = first_variant_of(task.model_class)
    model_class = getattr(modeling_piip, task.model_class, PiipBackbone)
    options = SMALL_HEADS.get(model_class.__name__, {})
    build(model_class, tiny_config(**options)).save_pretrained(tmp_path / variant)
    settings = json.loads((find_variant(variant) / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor_class = getattr(modeling_piip, settings["image_processor_type"])
    size = {"height": 32, "width": 32}
    processor_class(size=size, crop_size=size).save_pretrained(tmp_path / variant)
    output = run_code_blocks(read_card(variant), tmp_path)
    if model_class is PiipBackbone:
        assert "p2 (1," in output
    elif "detection" not in task.tags and task.pipeline_tag != "object-detection":
        assert "LABEL_" in output


# ------------------------------------------- cards of converted folders -------------------------------------------


@pytest.fixture
def tiny_variant(tmp_path, monkeypatch):
    """A published variant shrunk to a golden case, and official weights for it."""
    case, variant = CASES["cls_tiny_deit_3branch"], "piip-tsb-368-192-128-in1k"
    config, model_class = convert_config(get_official_config(case), "classification")
    config.architectures = [model_class.__name__]
    folder, checkpoint = tmp_path / "configuration" / variant, tmp_path / "official.pth"
    config.save_pretrained(folder)
    size = {"height": config.image_size, "width": config.image_size}
    PiipImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    torch.save({"model": build_official_weights(case)}, checkpoint)
    monkeypatch.setattr("modeling_piip.conversion.find_variant", lambda name: tmp_path / "configuration" / name)
    return variant, checkpoint


@pytest.mark.slow
def test_converted_variant_carries_its_card_and_the_code_in_it_runs(tiny_variant, tmp_path):
    variant, checkpoint = tiny_variant
    convert_variant_checkpoint(variant, checkpoint, tmp_path / variant)
    card = (tmp_path / variant / "README.md").read_text(encoding="utf-8")
    assert card == read_card(variant)
    assert "LABEL_" in run_code_blocks(card, tmp_path)


@pytest.mark.slow
def test_other_converted_models_carry_a_short_card_that_claims_nothing(tmp_path):
    case = CASES["det_tiny_dino"]
    (tmp_path / "official.json").write_text(json.dumps(get_official_config(case)), encoding="utf-8")
    torch.save(build_official_weights(case), tmp_path / "official.pth")
    arguments = ["--official_config", str(tmp_path / "official.json"), "--checkpoint", str(tmp_path / "official.pth")]
    convert_official_checkpoint.main([*arguments, "--output_dir", str(tmp_path / "my-piip")])
    card = ModelCard.load(tmp_path / "my-piip" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.license is None and card.data.eval_results is None and card.data.datasets is None
    run_code_blocks(card.content, tmp_path)
