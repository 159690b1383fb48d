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
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from modeling_piip import PiipForSemanticSegmentation, PiipImageProcessor, training_loop
from modeling_piip.visualization import draw_class_map, get_color

from .common import tiny_config


SCRIPTS = Path(__file__).parents[1] / "scripts"
CLASSES = ["background", "square", "stripes"]
# Everything random at once: a run that resumes must repeat all of it.
RANDOM = [*("--drop_path_rate", "0.2", "--ema_decay", "0.9", "--scale_range", "0.5", "2.0", "--photometric", "0.5")]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trainer_script = load_script("run_semantic_segmentation")
no_trainer_script = load_script("run_semantic_segmentation_no_trainer")
predict_script = load_script("predict")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_pair(rng, height, width):
    """Bright squares and striped squares on a dark background, and their map."""
    image, class_ids = rng.integers(0, 60, (height, width, 3)), np.zeros((height, width))
    for class_id in (1, 2):
        top, left = rng.integers(0, (height - 12, width - 12))
        image[top : top + 12, left : left + 12] += 150
        class_ids[top : top + 12, left : left + 12] = class_id
        if class_id == 2:
            image[top : top + 12 : 4, left : left + 12] -= 150
            image[top + 1 : top + 12 : 4, left : left + 12] -= 150
    return image.clip(0, 255), class_ids


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 training and 5 validation images; the latter in several sizes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    sizes = {"train": [(32, 32)] * 32, "validation": [(32, 32), (32, 40), (36, 32), (32, 32), (32, 48)]}
    for split, sizes_of_split in sizes.items():
        for index, size in enumerate(sizes_of_split):
            for kind, suffix, pixels in zip(("images", "labels"), ("png", "png"), make_pair(rng, *size)):
                file = folder / kind / split / f"{index}.{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    uper_net = {"hidden_size": 16, "auxiliary_hidden_size": 8, "crop_size": 32, "stride": 24}
    tiny_config(interaction_drop_path_rate=0.0, initializer_range=0.1, uper_net=uper_net).save_pretrained(folder)
    return str(folder)


def run_trainer(config, data, output_dir, *options, batch_size=8):
    return trainer_script.main(
        [
            *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_train", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "5e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", str(batch_size), *map(str, options)),
        ]
    )


def evaluate_folder(model_folder, data, output_dir, *options):
    return trainer_script.main(
        [
            *("--model_name_or_path", str(model_folder), "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_eval", "--use_cpu", "--disable_tqdm", "true", *options),
        ]
    )


def no_trainer_options(config, data, output_dir, *options, batch_size=8) -> list[str]:
    return [
        *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir), "--learning_rate", "5e-3"),
        *("--logging_steps", "1", "--per_device_train_batch_size", str(batch_size), *map(str, options)),
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


def assert_same_weights(first: Path, second: Path):
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def mean_iou_by_hand(model, image_processor, data: str) -> float:
    counts = np.zeros((3, 3))
    for file in sorted(Path(data, "images", "validation").iterdir()):
        image = Image.open(file)
        with torch.no_grad():
            outputs = model(**image_processor(image, return_tensors="pt"))
        predicted = image_processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])[0]
        true = np.asarray(Image.open(Path(data, "labels", "validation", file.name)))
        np.add.at(counts, (true, predicted.numpy()), 1)
    hits = counts.diagonal()
    return (hits / (counts.sum(axis=0) + counts.sum(axis=1) - hits)).mean()


# Trainer


@pytest.fixture(scope="module")
def trained(config, data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    results = run_trainer(config, data, output_dir, "--do_eval", "--num_train_epochs", 2, *RANDOM)
    return output_dir, results


def test_trainer_script_leaves_model_results_logs_previews_and_card(trained):
    output_dir, results = trained
    written = json.loads((output_dir / "all_results.json").read_text())
    assert written["eval_mean_iou"] == results["eval_mean_iou"] and "train_loss" in written
    per_class = [results[f"eval_iou_{name}"] for name in CLASSES]
    assert np.mean(per_class) == pytest.approx(results["eval_mean_iou"])
    assert 0 < results["eval_overall_accuracy"] <= 1
    assert results["eval_mean_iou"] == max(trainer_log(output_dir, "eval_mean_iou")), "the best model is kept"
    assert "image-segmentation" in (output_dir / "README.md").read_text()

    steps = [int(file.stem.removeprefix("step-")) for file in (output_dir / "previews").iterdir()]
    assert sorted(steps) == [4, 8]
    (events,) = (folder for folder in (output_dir / "runs").iterdir() if folder.is_dir())
    assert {event.step for event in read_events(events).Images("previews")} == {4, 8}

    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert AutoImageProcessor.from_pretrained(output_dir).do_center_crop is False


def test_evaluation_alone_reproduces_the_result(trained, data, tmp_path, monkeypatch):
    output_dir, results = trained
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = evaluate_folder(output_dir, data, tmp_path / "again")
    assert again["eval_mean_iou"] == results["eval_mean_iou"]
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    written = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert written["eval_mean_iou"] == again["eval_mean_iou"]
    model = PiipForSemanticSegmentation.from_pretrained(output_dir)
    expected = mean_iou_by_hand(model, PiipImageProcessor.from_pretrained(output_dir), data)
    assert again["eval_mean_iou"] == pytest.approx(expected)
    assert not list((tmp_path / "elsewhere").iterdir()), "nothing is written to the current folder"


def test_evaluation_follows_the_inference_mode(trained, data, tmp_path):
    model = PiipForSemanticSegmentation.from_pretrained(trained[0])
    image_processor = PiipImageProcessor.from_pretrained(trained[0])
    model.config.uper_net.inference_mode = "slide"
    model.save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    results = evaluate_folder(tmp_path / "model", data, tmp_path / "again")
    assert results["eval_mean_iou"] == pytest.approx(mean_iou_by_hand(model.eval(), image_processor, data))
    assert results["eval_loss"] != trained[1]["eval_loss"]


def test_trainer_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", *RANDOM]
    run_trainer(config, data, tmp_path / "straight", *options, batch_size=12)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    run_trainer(config, data, tmp_path / "killed", *options, batch_size=12)
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    assert trainer_log(tmp_path / "straight", "loss") == trainer_log(tmp_path / "killed", "loss")


def test_learning_rate_is_polynomial_and_bf16_trains(config, data, tmp_path):
    options = ["--max_steps", 4, "--eval_strategy", "no", "--load_best_model_at_end", "false", "--bf16"]
    run_trainer(config, data, tmp_path, *options, "--warmup_steps", 2)
    rates = trainer_log(tmp_path, "learning_rate")
    assert rates[:3] == pytest.approx([0, 2.5e-3, 5e-3]) and rates[3] == pytest.approx(2.5e-3, rel=1e-3)
    assert np.isfinite(trainer_log(tmp_path, "loss")).all()


def test_unreadable_file_in_the_middle_of_a_run_stops_it_or_is_skipped(config, data, tmp_path, caplog):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "images" / "train" / "7.png").write_bytes(b"damaged")
    options = ["--num_train_epochs", 1, "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--no_check_data"]
    with pytest.raises(ValueError, match=r"Cannot read the image .*images/train/7\.png"):
        run_trainer(config, str(tmp_path / "data"), tmp_path / "stops", *options)
    results = run_trainer(config, str(tmp_path / "data"), tmp_path / "goes_on", *options, "--skip_unreadable")
    assert results["epoch"] == 1.0


def test_bad_data_is_an_error_before_training(config, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    Image.fromarray(np.full((32, 32), 9, dtype=np.uint8)).save(tmp_path / "data" / "labels" / "validation" / "3.png")
    with pytest.raises(ValueError, match=r"labels/validation/3\.png .* class id 9, but there are 3 class names"):
        run_trainer(config, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The documented run, shorter


@pytest.mark.slow
def test_short_version_of_the_documented_run_beats_the_background(tmp_path, monkeypatch):
    # two digits instead of ten, one or two per scene, and everything half as large
    make_digits = load_script("make_digits_dataset")
    monkeypatch.setattr(make_digits, "load_digits", lambda: load_digits(n_class=2))
    monkeypatch.setattr(make_digits, "NUM_SCENES", {"train": 192, "validation": 48})
    monkeypatch.setattr(make_digits, "SCENE_SIZE", 64)
    monkeypatch.setattr(make_digits, "DIGIT_HEIGHTS", (32, 48))
    monkeypatch.setattr(make_digits, "NUM_DIGITS_PER_SCENE", (1, 2))
    make_digits.make_dataset("semantic", tmp_path / "scenes")
    recipe = json.loads((SCRIPTS / "recipes" / "digit_scenes.json").read_text())
    for branch in recipe["branches"]:
        branch["image_size"] //= 2
    (tmp_path / "config.json").write_text(json.dumps(recipe))

    options = ["--config_name", str(tmp_path / "config.json"), "--data_dir", str(tmp_path / "scenes")]
    options += ["--output_dir", str(tmp_path / "model"), "--num_train_epochs", "10", "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "no", "--use_cpu", "--disable_tqdm", "true"]
    results = trainer_script.main([str(SCRIPTS / "recipes" / "digit_scenes.yaml"), *options])
    maps = [np.asarray(Image.open(file)) for file in (tmp_path / "scenes" / "labels" / "validation").iterdir()]
    only_background = np.mean(np.array(maps) == 0) / 3
    print(f"mIoU {results['eval_mean_iou']:.3f}, of the background alone {only_background:.3f}")
    # a model that has learned nothing calls everything background; one that finds half of the ink is above this floor
    assert results["eval_mean_iou"] > max(only_background + 0.1, 0.5)


# Accelerate


def test_loop_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_train_steps", 4, "--checkpointing_steps", 2, *RANDOM]
    straight = no_trainer_options(config, data, tmp_path / "straight", *options, batch_size=12)
    results = no_trainer_script.main(straight)
    assert json.loads((tmp_path / "straight" / "all_results.json").read_text()) == results
    assert read_events(tmp_path / "straight" / "runs").Images("previews")
    assert (tmp_path / "straight" / "previews" / "step-4.png").exists()

    killed = no_trainer_options(config, data, tmp_path / "killed", *options, batch_size=12)
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
    run_processes("run_semantic_segmentation.py", [*options, "--output_dir", str(tmp_path / "trainer")])
    written = json.loads((tmp_path / "trainer" / "all_results.json").read_text())
    # five images on two processes: one is drawn twice and must count once
    for name, value in results.items():
        if "iou" in name or "accuracy" in name:
            assert written[name] == value, name

    options = no_trainer_options(config, data, tmp_path / "loop", "--num_train_epochs", 1)
    run_processes("run_semantic_segmentation_no_trainer.py", options)
    written = json.loads((tmp_path / "loop" / "all_results.json").read_text())
    again = evaluate_folder(tmp_path / "loop", data, tmp_path / "again")
    assert written["eval_mean_iou"] == pytest.approx(again["eval_mean_iou"])


# Pictures


def test_overlay_has_the_colours_of_the_classes_and_spares_ignored_pixels():
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    pixels = np.asarray(draw_class_map(image, np.array([[0, 1, 255]]), num_labels=2))[0]
    expected = [[int(0.4 * 100 + 0.6 * value) for value in get_color(class_id)] for class_id in (0, 1)]
    assert pixels.tolist() == [*expected, [100, 100, 100]]
    assert len({get_color(class_id) for class_id in range(150)}) == 150


def predict(trained, output_dir, *arguments):
    options = ["--task", "semantic-segmentation", "--model", str(trained[0]), "--output_dir", str(output_dir)]
    predict_script.main([*options, "--device", "cpu", *map(str, arguments)])


def test_predict_draws_files_folders_and_patterns(trained, data, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for name in ("trip/a.png", "b.png"):
        shutil.copy(Path(data, "images", "validation", "1.png"), folder / name)
    (folder / "notes.txt").write_text("no image")
    file = Path(data, "images", "validation", "0.png")
    predict(trained, tmp_path / "out", file, folder, Path(data, "images", "val*", "4.png"))
    drawn = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["0.png", "4.png", "b.png", "trip/a.png"]
    # an image of 40 x 32 pixels, with the legend beside it
    picture = Image.open(tmp_path / "out" / "b.png")
    assert picture.width > 40 + 3 * 8
    assert "Drew 4 of 4 images" in capsys.readouterr().out


def test_predict_names_unreadable_files_and_stops_or_goes_on(trained, data, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"damaged")
    shutil.copy(Path(data, "images", "validation", "0.png"), tmp_path / "b.png")
    with pytest.raises(SystemExit, match=r"a\.png cannot be read"):
        predict(trained, tmp_path.parent / f"{tmp_path.name}-out", tmp_path)
    predict(trained, tmp_path.parent / f"{tmp_path.name}-out", tmp_path, "--skip_unreadable")
    assert "Drew 1 of 2 images" in capsys.readouterr().out
    assert (tmp_path.parent / f"{tmp_path.name}-out" / "b.png").exists()


def test_predict_refuses_missing_images_and_pictures_of_one_name(trained, data, tmp_path):
    with pytest.raises(SystemExit, match="nowhere.jpg is no image"):
        predict(trained, tmp_path, "nowhere.jpg")
    images = Path(data, "images")
    with pytest.raises(SystemExit, match="would both be drawn to 0.png"):
        predict(trained, tmp_path, images / "train" / "0.png", images / "validation" / "0.png")


def test_predict_does_not_replace_an_image(data, tmp_path):
    file = tmp_path / "photos" / "trip" / "a.png"
    file.parent.mkdir(parents=True)
    shutil.copy(Path(data, "images", "validation", "0.png"), file)
    before = file.read_bytes()
    # refused before the model, which does not exist, is loaded
    for output_dir, source in ((tmp_path / "photos", tmp_path / "photos"), (file.parent / ".." / "trip", file)):
        with pytest.raises(SystemExit, match=r"replace the image .*a\.png: name another --output_dir"):
            predict(["no model"], output_dir, source)
    assert file.read_bytes() == before


def test_predict_names_an_image_with_too_many_pixels(trained, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    shutil.copy(Path(data, "images", "validation", "0.png"), tmp_path / "b.png")
    with pytest.raises(SystemExit, match=r"a\.png cannot be read .*exceeds limit"):
        predict(trained, tmp_path / "out", tmp_path)
    predict(trained, tmp_path / "out", tmp_path, "--skip_unreadable")
    assert "Drew 1 of 2 images" in capsys.readouterr().out


# Help


@pytest.mark.parametrize("script", [trainer_script, no_trainer_script], ids=["trainer", "no_trainer"])
def test_help_explains_every_option_of_ours(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data_dir", "--class_names_file", "--scale_range", "--skip_unreadable", "--layer_decay"):
        assert option in text
