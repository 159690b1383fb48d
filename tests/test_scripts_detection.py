import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from modeling_piip import training_loop

from .common import tiny_config


SCRIPTS = Path(__file__).parents[1] / "scripts"
CLASSES = {7: "red", 2: "green"}  # "green" has the smaller id
# Everything random at once: a run that resumes must repeat all of it.
RANDOM = ["--drop_path_rate", "0.2", "--ema_decay", "0.9", "--crop_prob", "0.5", "--hflip", "0.5"]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trainer_script = load_script("run_object_detection")
no_trainer_script = load_script("run_object_detection_no_trainer")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_scene(rng, height, width):
    """A dark image with one red or green rectangle, or with both, and its objects in COCO format."""
    pixels, objects = rng.integers(0, 60, (height, width, 3)), []
    for category_id, channel in ((7, 0), (2, 1)):
        if objects and rng.random() < 0.5:
            break
        sides = rng.integers(10, 20, 2)
        left, top = rng.integers(0, (width, height) - sides)
        pixels[top : top + sides[1], left : left + sides[0], channel] += 190
        box = [int(number) for number in (left, top, *sides)]
        objects.append({"bbox": box, "category_id": category_id, "area": box[2] * box[3], "iscrowd": 0})
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def write_split(folder, split, sizes, seed=0):
    rng = np.random.default_rng(seed)
    (folder / "images" / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": category_id, "name": name} for category_id, name in CLASSES.items()]
    for number, size in enumerate(sizes):
        image, objects = make_scene(rng, *size)
        image.save(folder / "images" / split / f"{number}.png")
        entry = {"id": 100 - number, "file_name": f"{number}.png", "height": size[0], "width": size[1]}
        content["images"].append(entry)
        for item in objects:
            annotation_id = len(content["annotations"]) + 1
            content["annotations"].append(item | {"id": annotation_id, "image_id": entry["id"]})
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 5 validation images; the latter in several sizes."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", [(32, 32)] * 24)
    write_split(folder, "validation", [(32, 32), (32, 40), (36, 32), (32, 32), (32, 48)], seed=1)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_config(interaction_drop_path_rate=0.0, initializer_range=0.1).save_pretrained(folder)
    return str(folder)


def run_trainer(config, data, output_dir, *options):
    return trainer_script.main(
        [
            *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_train", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "5e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "8", *map(str, options)),
        ]
    )


def evaluate_folder(model_folder, data, output_dir, *options):
    return trainer_script.main(
        [
            *("--model_name_or_path", str(model_folder), "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_eval", "--use_cpu", "--disable_tqdm", "true", *options),
        ]
    )


def no_trainer_options(config, data, output_dir, *options) -> list[str]:
    return [
        *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir), "--learning_rate", "5e-3"),
        *("--logging_steps", "1", "--per_device_train_batch_size", "8", *map(str, options)),
    ]


def run_processes(script, options):
    # `accelerate launch --cpu --num_processes 2` starts a single process where there is no MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ, PYTHONPATH=str(SCRIPTS.parent), OMP_NUM_THREADS="1")
    command += [str(SCRIPTS / script), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def trainer_log(output_dir: Path, key: str) -> list[float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def read_predictions(output_dir: Path) -> list[dict]:
    predictions = json.loads((output_dir / "predictions.json").read_text())
    return sorted(predictions, key=lambda result: (result["image_id"], -result["score"]))


def assert_same_predictions(first: Path, second: Path):
    one, two = read_predictions(first), read_predictions(second)
    assert len(one) == len(two) > 0
    for left, right in zip(one, two):
        assert (left["image_id"], left["category_id"]) == (right["image_id"], right["category_id"])
        assert left["score"] == pytest.approx(right["score"], abs=1e-5)
        assert left["bbox"] == pytest.approx(right["bbox"], abs=2e-3)


def assert_same_weights(first: Path, second: Path):
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


# Trainer


@pytest.fixture(scope="module")
def trained(config, data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    options = ["--do_eval", "--num_train_epochs", 2, "--crop_prob", 0, "--ema_decay", 0.9]
    return output_dir, run_trainer(config, data, output_dir, *options)


def test_trainer_script_leaves_model_results_logs_previews_and_card(trained):
    output_dir, results = trained
    written = json.loads((output_dir / "all_results.json").read_text())
    assert written["eval_box_ap"] == results["eval_box_ap"] and "train_loss" in written
    assert results["eval_box_ap"] == max(trainer_log(output_dir, "eval_box_ap")), "the best model is kept"
    per_class = [results[f"eval_box_ap_class_{name}"] for name in CLASSES.values()]
    assert np.mean(per_class) == pytest.approx(results["eval_box_ap"])
    assert "object-detection" in (output_dir / "README.md").read_text()

    steps = [int(file.stem.removeprefix("step-")) for file in (output_dir / "previews").iterdir()]
    assert sorted(steps) == [3, 6]
    (events,) = (folder for folder in (output_dir / "runs").iterdir() if folder.is_dir())
    assert {event.step for event in read_events(events).Images("previews")} == {3, 6}

    model = AutoModelForObjectDetection.from_pretrained(output_dir)
    assert model.config.id2label == {0: "green", 1: "red"}
    assert AutoImageProcessor.from_pretrained(output_dir).do_pad is True


def test_terms_of_the_loss_are_logged_and_sum_to_it(trained):
    state = json.loads((trained[0] / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        terms = {name: value for name, value in entry.items() if name.startswith("loss_")}
        assert {"loss_class", "loss_giou_0", "loss_bbox_encoder", "loss_class_denoising"} <= terms.keys()
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-4)


def test_evaluation_alone_reproduces_the_result(trained, data, tmp_path, monkeypatch):
    output_dir, results = trained
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = evaluate_folder(output_dir, data, tmp_path / "again")
    for name, value in results.items():
        if "_ap" in name or "_ar" in name or name == "eval_loss":
            assert again[name] == pytest.approx(value, rel=1e-5), name
    assert_same_predictions(output_dir, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "all_results.json").read_text())["eval_box_ap"] == again["eval_box_ap"]
    assert not list((tmp_path / "elsewhere").iterdir()), "nothing is written to the current folder"


def test_predictions_file_gives_the_result_by_pycocotools(trained, data):
    output_dir, results = trained
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(Path(data, "annotations", "validation.json")))
        evaluation = COCOeval(truth, truth.loadRes(str(output_dir / "predictions.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ["ap", "ap50", "ap75", "ap_small"]
    expected = [results[f"eval_box_{name}"] for name in names]
    assert evaluation.stats[:4].tolist() == pytest.approx(expected, abs=1e-6)


def test_trainer_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", *RANDOM]
    run_trainer(config, data, tmp_path / "straight", *options)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    run_trainer(config, data, tmp_path / "killed", *options)
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    for key in ("loss", "loss_giou"):
        assert trainer_log(tmp_path / "straight", key) == trainer_log(tmp_path / "killed", key)


def test_learning_rate_falls_in_steps_and_bf16_trains(config, data, tmp_path):
    options = ["--max_steps", 6, "--eval_strategy", "no", "--load_best_model_at_end", "false", "--bf16"]
    run_trainer(config, data, tmp_path, *options, "--warmup_steps", 2)
    rates = trainer_log(tmp_path, "learning_rate")
    # drops after 0.6667 and 0.9167 of six steps
    assert rates == pytest.approx([0, 2.5e-3, 5e-3, 5e-3, 5e-3, 5e-4])
    assert np.isfinite(trainer_log(tmp_path, "loss")).all()


def test_layer_decay_and_large_scale_jitter_train(config, data, tmp_path):
    options = ["--max_steps", 2, "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--layer_decay", 0.8, "--large_scale_jitter", 0.5, 1.5, "--pad_to", 32]
    run_trainer(config, data, tmp_path, *options)
    assert np.isfinite(trainer_log(tmp_path, "loss")).all()


def test_bad_data_is_an_error_before_training(config, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "images" / "validation" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 5 images .* missing, the first one is .*validation/3\.png"):
        run_trainer(config, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_data_set_is_evaluated(trained, data, tmp_path):
    content = json.loads(Path(data, "annotations", "validation.json").read_text())
    rows = {"image": [], "image_id": [], "objects": []}
    for image in content["images"]:
        items = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        rows["image"].append(str(Path(data, "images", "validation", image["file_name"])))
        rows["image_id"].append(image["id"])
        # the other way round than in the checkpoint
        classes = [["red", "green"].index(CLASSES[item["category_id"]]) for item in items]
        rows["objects"].append({"bbox": [item["bbox"] for item in items], "category": classes})
    number = datasets.Value("float32")
    objects = {
        "bbox": datasets.List(datasets.List(number, length=4)),
        "category": datasets.List(datasets.ClassLabel(names=["red", "green"])),
    }
    features = datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("int64"), "objects": objects})
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
    results = trainer_script.main(
        [
            *("--model_name_or_path", str(trained[0]), "--dataset_name", str(folder), "--do_eval", "--use_cpu"),
            *("--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true", "--num_previews", "0"),
        ]
    )
    for name in ("eval_box_ap", "eval_box_ap50", "eval_box_ap_class_red"):
        assert results[name] == pytest.approx(trained[1][name], abs=1e-5)


# Overfitting


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(tmp_path):
    """The recipe's model finds all digits of eight scenes within minutes: AP 0.93 was reached after 150 steps."""
    make_digits = load_script("make_digits_dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits, "NUM_SCENES", {"train": 8, "validation": 1})
        make_digits.make_dataset("detection", tmp_path / "scenes")
    options = ["--data_dir", str(tmp_path / "scenes"), "--output_dir", str(tmp_path / "model")]
    options += ["--config_name", str(SCRIPTS / "recipes" / "digit_detection.json"), "--eval_split", "train"]
    options += ["--max_steps", "160", "--eval_strategy", "no", "--save_strategy", "no", "--no_augment"]
    options += ["--load_best_model_at_end", "no", "--warmup_steps", "10", "--lr_scheduler_type", "cosine"]
    options += ["--use_cpu", "--disable_tqdm", "true"]
    results = trainer_script.main([str(SCRIPTS / "recipes" / "digit_detection.yaml"), *options])
    assert results["eval_box_ap"] >= 0.9


# Accelerate


def test_loop_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_train_steps", 4, "--checkpointing_steps", 2, *RANDOM]
    straight = no_trainer_options(config, data, tmp_path / "straight", *options)
    results = no_trainer_script.main(straight)
    assert json.loads((tmp_path / "straight" / "all_results.json").read_text()) == results
    assert "eval_box_ap" in results and read_predictions(tmp_path / "straight")
    events = read_events(tmp_path / "straight" / "runs")
    assert events.Images("previews") and (tmp_path / "straight" / "previews" / "step-4.png").exists()
    terms = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss_")]
    assert len(terms) > 3
    total = sum(events.Scalars(tag)[0].value for tag in terms)
    assert total == pytest.approx(events.Scalars("loss")[0].value, rel=1e-4)

    killed = no_trainer_options(config, data, tmp_path / "killed", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", save_and_kill(training_loop.save_checkpoint))
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(KeyboardInterrupt):
            no_trainer_script.main(killed)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert no_trainer_script.main(killed) == results
    assert_same_weights(tmp_path / "straight" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")


def save_and_kill(save_checkpoint):
    def save(*args):
        save_checkpoint(*args)
        raise KeyboardInterrupt

    return save


@pytest.mark.slow
def test_two_processes_get_the_results_of_one(trained, config, data, tmp_path):
    output_dir, results = trained
    options = ["--model_name_or_path", str(output_dir), "--data_dir", data, "--do_eval", "--use_cpu"]
    run_processes("run_object_detection.py", [*options, "--output_dir", str(tmp_path / "trainer")])
    written = json.loads((tmp_path / "trainer" / "all_results.json").read_text())
    # five images on two processes: some are drawn twice and must count once
    assert_same_predictions(output_dir, tmp_path / "trainer")
    for name, value in results.items():
        if "_ap" in name or "_ar" in name:
            assert written[name] == pytest.approx(value, abs=1e-6), name

    options = no_trainer_options(config, data, tmp_path / "loop", "--num_train_epochs", 1)
    run_processes("run_object_detection_no_trainer.py", options)
    written = json.loads((tmp_path / "loop" / "all_results.json").read_text())
    again = evaluate_folder(tmp_path / "loop", data, tmp_path / "again")
    assert_same_predictions(tmp_path / "loop", tmp_path / "again")
    assert written["eval_box_ap"] == pytest.approx(again["eval_box_ap"], abs=1e-6)


# Help


@pytest.mark.parametrize("script", [trainer_script, no_trainer_script], ids=["trainer", "no_trainer"])
def test_help_explains_every_option_of_ours(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data_dir", "--bbox_format", "--crop_range", "--large_scale_jitter", "--lr_drops", "--pad_to"):
        assert option in text


def test_recipe_names_options_and_a_configuration_that_exist(tmp_path):
    recipe = SCRIPTS / "recipes" / "digit_detection.yaml"
    with pytest.raises(ValueError, match="has no annotations"):
        config = SCRIPTS / "recipes" / "digit_detection.json"
        trainer_script.main([str(recipe), "--data_dir", str(tmp_path), "--config_name", str(config), "--use_cpu"])
