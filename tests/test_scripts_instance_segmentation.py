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
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
)

from modeling_piip import (
    PiipForInstanceSegmentation,
    PiipForObjectDetection,
    PiipImageProcessor,
    PiipInstanceSegmentationImageProcessor,
    training_loop,
)
from modeling_piip.image_processing_piip_instance_segmentation import decode_segmentation
from modeling_piip.visualization import draw_objects, get_color, predict_instances, read_annotation
from scripts import make_digits_dataset

from .common import build, tiny_config


SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPE = SCRIPTS / "recipes" / "digit_instances.yaml"
# Everything random at once: a run that resumes must repeat all of it.
RANDOM = [
    *("--drop_path_rate", "0.2", "--ema_decay", "0.9", "--scale_range", "0.8", "1.2", "--crop_prob", "0.5"),
    *("--crop_resize", "1", "--crop_range", "0.7", "1"),
]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trainer_script = load_script("run_instance_segmentation")
no_trainer_script = load_script("run_instance_segmentation_no_trainer")
predict_script = load_script("predict")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 training and 5 validation scenes of 40 x 40 pixels."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits_dataset, "NUM_SCENES", {"train": 12, "validation": 5})
        patch.setattr(make_digits_dataset, "SCENE_SIZE", 40)
        patch.setattr(make_digits_dataset, "DIGIT_HEIGHTS", (16, 24))
        patch.setattr(make_digits_dataset, "NUM_DIGITS_PER_SCENE", (1, 3))
        make_digits_dataset.make_dataset("instance", folder)
    return str(folder)


def save_config(folder: Path, **options) -> str:
    # every region is detected as something, so that an untrained model has predictions to compare
    head = {"hidden_size": 8, "box_hidden_size": 16, "mask_num_convs": 1, "max_detections": 8, "box_score_thresh": 0.0}
    tiny_config(
        interaction_drop_path_rate=0.0, initializer_range=0.1, mask_rcnn=head | options, num_labels=10
    ).save_pretrained(folder)
    PiipInstanceSegmentationImageProcessor(size={"shortest_edge": 32}, pad_size_divisor=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("config"))


def run_trainer(config, data, output_dir, *options):
    return trainer_script.main(
        [
            *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_train", "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "5e-3", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", *map(str, options)),
        ]
    )


def evaluate_folder(model_folder, data, output_dir, *options):
    return trainer_script.main(
        [
            *("--model_name_or_path", str(model_folder), "--data_dir", data, "--output_dir", str(output_dir)),
            *("--do_eval", "--use_cpu", "--disable_tqdm", "true", *options),
        ]
    )


def trainer_log(output_dir: Path, key: str) -> list[float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def assert_same_weights(first: Path, second: Path):
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


def results_of_file(data: str, split: str, predictions: Path) -> dict[str, float]:
    """AP of detections in a file by the evaluation of COCO on the annotations as they are on disk."""
    results = {}
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        truth = COCO(json.loads(Path(data, "annotations", f"{split}.json").read_text()))
        evaluation = COCOeval_faster(truth, truth.loadRes(json.loads(predictions.read_text())), iou_type)
        evaluation.run()
        results[kind] = evaluation.stats[0]
    return results


# Trainer


@pytest.fixture(scope="module")
def trained(config, data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    results = run_trainer(config, data, output_dir, "--do_eval", "--num_train_epochs", 2, *RANDOM)
    return output_dir, results


def test_trainer_script_leaves_model_results_detections_and_previews(trained, data):
    output_dir, results = trained
    written = json.loads((output_dir / "all_results.json").read_text())
    assert {"eval_box_ap", "eval_mask_ap", "eval_mask_ap50", "eval_box_ar100", "train_loss"} <= written.keys()
    assert written["eval_mask_ap"] == results["eval_mask_ap"]
    assert all(np.isfinite(trainer_log(output_dir, "loss_mask")))
    assert "image-segmentation" in (output_dir / "README.md").read_text()
    assert {file.name for file in (output_dir / "previews").iterdir()} == {"step-3.png", "step-6.png"}

    detections = json.loads((output_dir / "predictions.json").read_text())
    assert {detection["image_id"] for detection in detections} == {1, 2, 3, 4, 5}
    for detection in detections:
        assert decode_segmentation(detection["segmentation"], 40, 40, "detection").shape == (40, 40)
    by_hand = results_of_file(data, "validation", output_dir / "predictions.json")
    assert results["eval_box_ap"] == pytest.approx(by_hand["box"], abs=1e-6)
    assert results["eval_mask_ap"] == pytest.approx(by_hand["mask"], abs=1e-6)

    model = AutoModelForInstanceSegmentation.from_pretrained(output_dir)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    assert isinstance(AutoImageProcessor.from_pretrained(output_dir), PiipInstanceSegmentationImageProcessor)


def test_evaluation_alone_reproduces_the_result(trained, data, tmp_path):
    output_dir, results = trained
    again = evaluate_folder(output_dir, data, tmp_path)
    for name, value in results.items():
        if "_ap" in name or "_ar" in name:
            assert again[name] == value, name
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert (tmp_path / "predictions.json").read_text() == (output_dir / "predictions.json").read_text()


def test_trainer_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false", *RANDOM]
    run_trainer(config, data, tmp_path / "straight", *options)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    run_trainer(config, data, tmp_path / "killed", *options)
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    assert trainer_log(tmp_path / "straight", "loss_mask") == trainer_log(tmp_path / "killed", "loss_mask")


def test_large_scale_jitter_and_bf16_train(config, data, tmp_path):
    options = ["--max_steps", 3, "--eval_strategy", "no", "--load_best_model_at_end", "false", "--bf16"]
    run_trainer(config, data, tmp_path, *options, "--large_scale_jitter", "0.5", "2", "--layer_decay", "0.85")
    assert np.isfinite(trainer_log(tmp_path, "loss_mask")).all()


def test_model_without_masks_trains_and_is_evaluated_on_boxes(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for file in (tmp_path / "data" / "annotations").iterdir():
        content = json.loads(file.read_text())
        for item in content["annotations"]:
            del item["segmentation"]
        file.write_text(json.dumps(content))
    config = save_config(tmp_path / "config", with_masks=False)
    options = ["--do_eval", "--num_train_epochs", 1]
    results = run_trainer(config, str(tmp_path / "data"), tmp_path / "model", *options)
    assert "eval_box_ap" in results and not any("mask" in name for name in results)
    assert list((tmp_path / "model" / "previews").iterdir())
    detections = json.loads((tmp_path / "model" / "predictions.json").read_text())
    assert detections and not any("segmentation" in detection for detection in detections)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "has no 'segmentation'"),
        ([[1, 2, 3, 4]], "broken polygon"),
        ({"size": [30, 40], "counts": [1200]}, r"of the size \[30, 40\], but its image has \[40, 40\]"),
    ],
)
def test_bad_masks_are_an_error_before_training(config, data, tmp_path, segmentation, message):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "validation.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["segmentation"] = segmentation
    file.write_text(json.dumps(content))
    image_id = content["annotations"][2]["image_id"]
    with pytest.raises(ValueError, match=rf"validation split, image_id {image_id}: object 3 .*{message}"):
        run_trainer(config, str(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [RANDOM, ["--no_augment"]], ids=["augmented", "not augmented"])
def test_images_without_objects_and_crowds_are_trained_on(config, data, tmp_path, options):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] > 4]
    for item in content["annotations"]:
        item["iscrowd"] = int(item["image_id"] <= 8)
    file.write_text(json.dumps(content))
    options = [*options, "--num_train_epochs", 1, "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    run_trainer(config, str(tmp_path / "data"), tmp_path / "out", *options)
    assert np.isfinite(trainer_log(tmp_path / "out", "loss")).all()


def test_boxes_are_taken_from_masks(trained, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "validation.json"
    content = json.loads(file.read_text())
    for item in content["annotations"]:
        del item["bbox"]
    file.write_text(json.dumps(content))
    results = evaluate_folder(trained[0], str(tmp_path / "data"), tmp_path / "out")
    assert results["eval_box_ap"] == trained[1]["eval_box_ap"]


# The run that shows that everything fits together


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(make_digits_dataset, "NUM_SCENES", {"train": 8, "validation": 1})
    make_digits_dataset.make_dataset("instance", tmp_path / "scenes")
    monkeypatch.chdir(SCRIPTS.parent)
    options = ["--data_dir", str(tmp_path / "scenes"), "--eval_split", "train", "--no_augment", "--use_cpu"]
    options += ["--output_dir", str(tmp_path / "model"), "--max_steps", "240", "--per_device_train_batch_size", "4"]
    options += ["--learning_rate", "2e-3", "--ema_decay", "0.9", "--eval_strategy", "no", "--save_strategy", "no"]
    options += ["--load_best_model_at_end", "no", "--disable_tqdm", "true"]
    results = trainer_script.main([str(RECIPE), *options])
    print(f"box AP {results['eval_box_ap']:.3f}, mask AP {results['eval_mask_ap']:.3f}")
    assert results["eval_box_ap"] >= 0.9 and results["eval_mask_ap"] >= 0.9
    by_hand = results_of_file(str(tmp_path / "scenes"), "train", tmp_path / "model" / "predictions.json")
    assert results["eval_box_ap"] == pytest.approx(by_hand["box"], abs=1e-3)
    assert results["eval_mask_ap"] == pytest.approx(by_hand["mask"], abs=1e-3)


# Accelerate


def no_trainer_options(config, data, output_dir, *options) -> list[str]:
    return [
        *("--config_name", config, "--data_dir", data, "--output_dir", str(output_dir), "--learning_rate", "5e-3"),
        *("--logging_steps", "1", "--per_device_train_batch_size", "4", *map(str, options)),
    ]


def test_loop_resumes_exactly_after_a_kill(config, data, tmp_path):
    options = ["--max_train_steps", 4, "--checkpointing_steps", 2, *RANDOM]
    results = no_trainer_script.main(no_trainer_options(config, data, tmp_path / "straight", *options))
    assert json.loads((tmp_path / "straight" / "all_results.json").read_text()) == results
    assert "eval_mask_ap" in results and (tmp_path / "straight" / "predictions.json").exists()

    def save_and_kill(*args, save_checkpoint=training_loop.save_checkpoint):
        save_checkpoint(*args)
        raise KeyboardInterrupt

    killed = no_trainer_options(config, data, tmp_path / "killed", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", save_and_kill)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(KeyboardInterrupt):
            no_trainer_script.main(killed)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert no_trainer_script.main(killed) == results
    assert_same_weights(tmp_path / "straight" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")


@pytest.mark.slow
def test_two_processes_get_the_results_of_one(trained, data, tmp_path):
    output_dir, results = trained
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPTS / "run_instance_segmentation.py"), "--model_name_or_path", str(output_dir)]
    command += ["--data_dir", data, "--do_eval", "--use_cpu", "--output_dir", str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(SCRIPTS.parent), OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "all_results.json").read_text())
    # five images on two processes: one is drawn twice and must count once
    for name, value in results.items():
        if "_ap" in name or "_ar" in name:
            assert written[name] == pytest.approx(value, abs=1e-6), name


# Pictures


def two_objects(height: int = 500, width: int = 400) -> dict:
    """One at the top left, and one that it covers in part."""
    segmentation = torch.full((height, width), -1)
    segmentation[100:300, 100:250] = 1
    segmentation[50:200, 50:200] = 0
    return {
        "scores": torch.tensor([0.9, 0.6]),
        "labels": torch.tensor([2, 1]),
        "boxes": torch.tensor([[50.0, 50, 200, 200], [100, 100, 250, 300]]),
        "segmentation": segmentation,
    }


def test_picture_shows_masks_and_boxes_in_the_colour_of_the_object():
    image = Image.new("RGB", (400, 500), (100, 100, 100))
    objects = two_objects()
    pixels = np.asarray(draw_objects(image, objects, ["cat", "cow", "dog"]))
    assert pixels.shape == (500, 400, 3)
    for index, place in enumerate(((120, 150), (250, 220))):
        assert pixels[place].tolist() == [int(0.4 * 100 + 0.6 * value) for value in get_color(index)]
    assert pixels[125, 50].tolist() == list(get_color(0)) and pixels[299, 180].tolist() == list(get_color(1))
    assert pixels[450, 50].tolist() == [100, 100, 100]
    # the name stands above the box
    assert len(np.unique(pixels[38:48, 52:90].reshape(-1, 3), axis=0)) > 2

    del objects["segmentation"]
    pixels = np.asarray(draw_objects(image, objects, ["cat", "cow", "dog"]))
    assert pixels[125, 50].tolist() == list(get_color(2)) and pixels[120, 150].tolist() == [100, 100, 100]


def test_small_pictures_are_enlarged_and_nothing_is_drawn_without_objects():
    image = Image.new("L", (40, 20), 100)
    nothing = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    for segmentation in ({}, {"segmentation": torch.full((20, 40), -1)}):
        picture = draw_objects(image, nothing | segmentation, ["cat"])
        assert picture.size == (400, 200) and set(np.asarray(picture).flat) == {100}


def test_annotations_become_what_predictions_are(data):
    content = json.loads(Path(data, "annotations", "train.json").read_text())
    items = [item for item in content["annotations"] if item["image_id"] == 1]
    objects = read_annotation({"image_id": 1, "annotations": items}, 40, 40)
    for index, item in enumerate(items):
        assert (objects["segmentation"] == index).sum() == item["area"]
        x, y, width, height = item["bbox"]
        assert objects["boxes"][index].tolist() == [x, y, x + width, y + height]
    assert objects["labels"].tolist() == [item["category_id"] for item in items]
    without = [{"bbox": item["bbox"], "category_id": 0} for item in items]
    assert "segmentation" not in read_annotation({"image_id": 1, "annotations": without}, 40, 40)


def predict(task, model_folder, output_dir, *arguments) -> list[dict]:
    options = ["--task", task, "--model", str(model_folder), "--output_dir", str(output_dir), "--device", "cpu"]
    predict_script.main([*options, *map(str, arguments)])
    (file,) = output_dir.glob("*.json")
    assert file.with_suffix(".png").exists()
    return json.loads(file.read_text())


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def save_piip_detector(folder):
    build(PiipForObjectDetection).save_pretrained(folder)
    PiipImageProcessor(size={"shortest_edge": 32}, do_center_crop=False, do_pad=True).save_pretrained(folder)


def save_mask_rcnn_without_masks(folder):
    head = {"hidden_size": 8, "box_hidden_size": 16, "max_detections": 10, "with_masks": False}
    build(PiipForInstanceSegmentation, tiny_config(mask_rcnn=head)).save_pretrained(folder)
    PiipInstanceSegmentationImageProcessor(size={"shortest_edge": 32}, pad_size_divisor=16).save_pretrained(folder)


def save_detr(folder):
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_labels=3,
        **sizes,
        **heads,
    )
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_piip_detector, save_mask_rcnn_without_masks, save_detr])
def test_predict_detects_objects_with_any_model_of_the_task(save, photo, tmp_path):
    save(tmp_path / "model")
    found = predict("object-detection", tmp_path / "model", tmp_path / "all", photo, "--threshold", "0")
    assert found
    for item in found:
        left, top, right, bottom = item["box"]
        assert left <= right and top <= bottom and "mask" not in item
        assert item["label"] == f"LABEL_{item['label_id']}" and 0 < item["score"] <= 1
    scores = [item["score"] for item in found]
    assert len(set(scores)) > 1, "a threshold can separate them"
    threshold = sorted(scores)[len(found) // 2]
    some = predict("object-detection", tmp_path / "model", tmp_path / "some", photo, "--threshold", str(threshold))
    assert some == [item for item in found if item["score"] > threshold]
    assert predict("object-detection", tmp_path / "model", tmp_path / "none", photo, "--threshold", "1") == []


def save_piip_segmenter(folder):
    build(PiipForInstanceSegmentation).save_pretrained(folder)
    PiipInstanceSegmentationImageProcessor(size={"shortest_edge": 32}, pad_size_divisor=16).save_pretrained(folder)


def save_mask2former(folder):
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "num_attention_heads": 2}
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=5, num_labels=3, **sizes, **layers)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_piip_segmenter, save_mask2former], ids=["PIIP", "Mask2Former"])
def test_predict_segments_instances_with_any_model_of_the_task(save, photo, tmp_path):
    save(tmp_path / "model")
    found = predict("instance-segmentation", tmp_path / "model", tmp_path / "all", photo, "--threshold", "0.01")
    assert found
    taken = np.zeros((60, 80), dtype=bool)
    for item in found:
        mask = decode_segmentation(item["mask"], 60, 80, "mask")
        rows, columns = np.nonzero(mask)
        assert item["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert item["label"] == f"LABEL_{item['label_id']}" and item["score"] > 0.01
        assert not (mask & taken).any()
        taken |= mask
    assert predict("instance-segmentation", tmp_path / "model", tmp_path / "none", photo, "--threshold", "1") == []


def test_instances_are_those_of_the_processor(photo):
    model = build(PiipForInstanceSegmentation)
    image_processor = PiipInstanceSegmentationImageProcessor(size={"shortest_edge": 32}, pad_size_divisor=16)
    image = Image.open(photo)
    found = predict_instances(model, image_processor, image, threshold=0.1)
    with torch.no_grad():
        outputs = model(**image_processor(image, return_tensors="pt"))
    (expected,) = image_processor.post_process_instance_segmentation(outputs, 0.1, target_sizes=[(60, 80)])
    assert found["segmentation"].equal(expected["segmentation"].long())
    assert found["labels"].tolist() == [segment["label_id"] for segment in expected["segments_info"]]


# Help


@pytest.mark.parametrize("script", [trainer_script, no_trainer_script], ids=["trainer", "no_trainer"])
def test_help_explains_every_option_of_ours(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data_dir", "--large_scale_jitter", "--crop_prob", "--skip_unreadable", "--layer_decay"):
        assert option in text
