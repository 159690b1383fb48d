import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_piip import PiipBranchConfig, PiipConfig, PiipForImageClassification, training_loop


SCRIPTS = Path(__file__).parents[1] / "scripts"
NO_TRAINER = SCRIPTS / "run_image_classification_no_trainer.py"
# Everything random at once: a run that resumes must repeat all of it.
RANDOM = [
    *("--auto_augment", "rand-m5-mstd0.5-inc1", "--random_erasing", "0.5", "--mixup", "0.8", "--cutmix", "1.0"),
    *("--smoothing", "0.1", "--drop_path_rate", "0.2", "--ema_decay", "0.9"),
]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trainer_script = load_script("run_image_classification")
no_trainer_script = load_script("run_image_classification_no_trainer")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Six training and two test images of every digit."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for digit in range(10):
        for index, place in enumerate(np.flatnonzero(data.target == digit)[:8]):
            path = folder / ("train" if index < 6 else "test") / str(digit) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((data.images[place] * 15).astype(np.uint8))
            pixels.resize((32, 32)).convert("RGB").save(path)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    shared = {"patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    branches = [
        PiipBranchConfig(image_size=32, hidden_size=16, **shared),
        PiipBranchConfig(image_size=16, hidden_size=32, **shared),
    ]
    folder = tmp_path_factory.mktemp("config")
    PiipConfig(
        branches=branches,
        interaction_num_heads=4,
        interaction_drop_path_rate=0.0,
        merge_type="linear",
        num_groups=4,
        initializer_range=0.1,
    ).save_pretrained(folder)
    return str(folder)


def run_trainer(config, digits, output_dir, *options, batch_size=16):
    return trainer_script.main(
        [
            *("--config_name", config, "--data_dir", digits, "--output_dir", str(output_dir)),
            *("--do_train", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "3e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", str(batch_size), "--per_device_eval_batch_size", "20"),
            *map(str, options),
        ]
    )


def no_trainer_options(config, digits, output_dir, *options, batch_size=16) -> list[str]:
    return [
        *("--config_name", config, "--data_dir", digits, "--output_dir", str(output_dir)),
        *("--learning_rate", "3e-3", "--logging_steps", "1", "--per_device_eval_batch_size", "20"),
        *("--per_device_train_batch_size", str(batch_size), *map(str, options)),
    ]


def read_scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def trainer_log(output_dir: Path, key: str) -> list[float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def assert_same_weights(first: Path, second: Path):
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


# Trainer


@pytest.fixture(scope="module")
def trained(config, digits, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    results = run_trainer(config, digits, output_dir, "--num_train_epochs", 2, *RANDOM)
    return output_dir, results


def test_trainer_script_leaves_model_results_logs_and_card(trained):
    output_dir, results = trained
    written = json.loads((output_dir / "all_results.json").read_text())
    assert written["eval_accuracy"] == results["eval_accuracy"] and "train_loss" in written
    assert 0 <= results["eval_accuracy"] <= results["eval_top5_accuracy"] <= 1
    assert list((output_dir / "runs").rglob("events.out.tfevents.*"))
    card = (output_dir / "README.md").read_text()
    assert "trained from scratch" in card and f"{results['eval_accuracy']:.4f}".rstrip("0") in card
    model = AutoModelForImageClassification.from_pretrained(output_dir)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert dict(AutoImageProcessor.from_pretrained(output_dir).crop_size) == {"height": 32, "width": 32}
    assert "AutoModelForImageClassification" in json.loads((output_dir / "config.json").read_text())["auto_map"]


def test_evaluation_alone_reproduces_the_result(trained, digits, tmp_path):
    output_dir, results = trained
    again = trainer_script.main(
        [
            *("--model_name_or_path", str(output_dir), "--data_dir", digits, "--output_dir", str(tmp_path)),
            *("--do_eval", "--use_cpu", "--disable_tqdm", "true", "--per_device_eval_batch_size", "20"),
        ]
    )
    assert again["eval_accuracy"] == results["eval_accuracy"]
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] == again["eval_loss"]


def test_best_model_is_kept(trained):
    output_dir, results = trained
    assert results["eval_accuracy"] == max(trainer_log(output_dir, "eval_accuracy"))


@pytest.mark.parametrize(
    ("step", "workers"),
    [
        pytest.param(2, [], id="within an epoch"),
        pytest.param(
            4, ["--dataloader_num_workers", 1, "--dataloader_persistent_workers", "true"], id="between epochs"
        ),
    ],
)
def test_trainer_resumes_exactly_after_a_kill(config, digits, tmp_path, step, workers):
    options = ["--max_steps", 2 * step, "--save_strategy", "steps", "--save_steps", step, "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", *workers, *RANDOM]
    run_trainer(config, digits, tmp_path / "straight", *options)
    # what a kill leaves: a checkpoint, and a later one that was not finished
    shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", tmp_path / "killed" / f"checkpoint-{step}")
    last = f"checkpoint-{2 * step}"
    (tmp_path / "killed" / last).mkdir()
    run_trainer(config, digits, tmp_path / "killed", *options)
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    straight, killed = (torch.load(tmp_path / name / last / "training_weights.pt") for name in ("straight", "killed"))
    assert all(torch.equal(weight, killed[name]) for name, weight in straight.items())
    assert trainer_log(tmp_path / "straight", "loss") == trainer_log(tmp_path / "killed", "loss")


def test_loss_and_gradient_do_not_grow_with_accumulation(config, digits, tmp_path):
    options = ["--no_augment", "--max_steps", 2, "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    run_trainer(config, digits, tmp_path / "whole", *options, batch_size=20)
    run_trainer(config, digits, tmp_path / "parts", *options, "--gradient_accumulation_steps", 4, batch_size=5)
    for key in ("loss", "grad_norm"):
        assert trainer_log(tmp_path / "parts", key) == pytest.approx(trainer_log(tmp_path / "whole", key), rel=1e-4)


def test_missing_evaluation_split_is_an_error_before_training(config, digits, tmp_path):
    with pytest.raises(ValueError, match="no split to evaluate on: hold out a part .*--train_val_split"):
        run_trainer(config, str(Path(digits) / "train"), tmp_path)


def test_label_smoothing_of_the_trainer_is_refused(config, digits, tmp_path):
    with pytest.raises(ValueError, match="Use --smoothing"):
        run_trainer(config, digits, tmp_path, "--label_smoothing_factor", 0.1)


# Accelerate


def test_loop_resumes_exactly_after_a_kill(config, digits, tmp_path):
    options = ["--max_train_steps", 6, "--checkpointing_steps", 3, *RANDOM]
    straight = no_trainer_options(config, digits, tmp_path / "straight", *options, batch_size=15)
    results = no_trainer_script.main(straight)
    # 4 steps are an epoch
    model = PiipForImageClassification.from_pretrained(tmp_path / "straight")
    assert model.config.id2label[3] == "3"
    killed = no_trainer_options(config, digits, tmp_path / "killed", *options, batch_size=15)
    killed[killed.index("--max_train_steps") + 1] = "3"
    with pytest.MonkeyPatch.context() as patch:
        # killed while it evaluates, right after the checkpoint
        patch.setattr(training_loop, "build_scheduler", schedule_of(6))
        patch.setattr(no_trainer_script, "evaluate_model", kill)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(KeyboardInterrupt):
            no_trainer_script.main(killed)
    killed[killed.index("--max_train_steps") + 1] = "6"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert no_trainer_script.main(killed) == results
    assert_same_weights(tmp_path / "straight" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")


def test_checkpoint_beyond_the_last_step_is_an_error(config, digits, tmp_path):
    # 4 steps are an epoch
    options = ["--no_augment", "--checkpointing_steps", 1]
    no_trainer_script.main(no_trainer_options(config, digits, tmp_path, *options, "--max_train_steps", 2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="checkpoint-2 has done 2 steps.*ends after 1.*--max_train_steps"):
        no_trainer_script.main(no_trainer_options(config, digits, tmp_path, *options, "--max_train_steps", 1))


def test_only_the_main_process_writes_the_model_and_its_image_processor(config, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    no_trainer_script.main(no_trainer_options(config, digits, tmp_path, "--no_augment", "--max_train_steps", 1))
    assert {file.name for file in tmp_path.iterdir()} <= {"unfinished", "runs"}


def kill(*args):
    raise KeyboardInterrupt


def schedule_of(max_steps):
    original = training_loop.build_scheduler
    return lambda name, optimizer, warmup_steps, _, drops: original(name, optimizer, warmup_steps, max_steps, drops)


def test_loop_loss_does_not_grow_with_accumulation(config, digits, tmp_path):
    options = ["--no_augment", "--max_train_steps", 2]
    no_trainer_script.main(no_trainer_options(config, digits, tmp_path / "whole", *options, batch_size=20))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options += ["--gradient_accumulation_steps", 4]
    no_trainer_script.main(no_trainer_options(config, digits, tmp_path / "parts", *options, batch_size=5))
    whole, parts = (read_scalars(tmp_path / name / "runs", "loss") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_two_processes_get_the_loss_of_one(config, digits, tmp_path):
    options = ["--no_augment", "--num_train_epochs", 1]
    one = no_trainer_script.main(no_trainer_options(config, digits, tmp_path / "one", *options, batch_size=20))
    # `accelerate launch --cpu --num_processes 2` starts a single process where there is no MPI
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(NO_TRAINER)]
    command += no_trainer_options(config, digits, tmp_path / "two", *options, batch_size=10)
    environment = dict(os.environ, PYTHONPATH=str(SCRIPTS.parent), OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = read_scalars(tmp_path / "two" / "runs", "loss")
    assert len(losses) == 3, "a single process would need 6 steps for the 60 images"
    assert losses == pytest.approx(read_scalars(tmp_path / "one" / "runs", "loss"), rel=1e-4)
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert two["eval_accuracy"] == one["eval_accuracy"]


# Demo


def test_demo_predicts_without_the_package_and_draws_a_picture(trained, digits, tmp_path):
    load_script("make_digits_dataset")
    demo = load_script("demo")
    files = sorted(Path(digits, "test").glob("*/*.png"))
    photos = demo.save_photos(tmp_path / "photos")
    predictions = demo.predict(trained[0], files + photos)
    assert len(predictions) == 22 and all(len(scores) == 3 for scores in predictions)
    hits = [scores[0]["label"] == file.parent.name for file, scores in zip(files, predictions)]
    assert sum(hits) / 20 == pytest.approx(trained[1]["eval_accuracy"])
    demo.draw_predictions(files, predictions, photos, tmp_path / "predictions.png")
    assert Image.open(tmp_path / "predictions.png").size == (1228, 850)


# Help


@pytest.mark.parametrize("script", [trainer_script, no_trainer_script], ids=["trainer", "no_trainer"])
def test_help_explains_every_option_of_ours(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data_dir", "--model_name_or_path", "--auto_augment", "--layer_decay", "--ema_decay"):
        assert option in text
