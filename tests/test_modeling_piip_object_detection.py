"""Behaviour of `PiipForObjectDetection` beyond Transformers' common tests and the goldens."""

import math
import socket

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from PIL import Image
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments, pipeline

from modeling_piip import PiipBackbone, PiipForObjectDetection, PiipImageProcessor, PiipModel
from modeling_piip import modeling_piip_object_detection as detection
from modeling_piip.configuration_piip import PiipDinoConfig

from .common import build, images, tiny_config


LEVELS = ["p3", "p4", "p5"]


def tiny_detector(**options) -> PiipForObjectDetection:
    """Without stochastic depth, so that training differs from evaluation in the denoising only."""
    return build(PiipForObjectDetection, tiny_detector_config(**options))


def tiny_detector_config(**options):
    config = tiny_config(out_features=LEVELS, interaction_drop_path_rate=0.0)
    for name, value in options.items():
        setattr(config.dino, name, value)
    return config


def random_labels(*counts: int) -> list[dict[str, torch.Tensor]]:
    """One entry per image with that many objects."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for count in counts:
        sizes = torch.rand(count, 2, generator=generator) * 0.4 + 0.1
        centers = sizes / 2 + torch.rand(count, 2, generator=generator) * (1 - sizes)
        class_labels = torch.randint(3, (count,), generator=generator)
        labels.append({"class_labels": class_labels, "boxes": torch.cat((centers, sizes), dim=1)})
    return labels


def get_gradients(model: PiipForObjectDetection, labels: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model.train()(images(len(labels), 3, 32, 32), labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Training


def test_every_parameter_gets_a_gradient():
    gradients = get_gradients(tiny_detector(), random_labels(2, 3))
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)], ids=["whole batch", "one image"])
def test_images_without_objects_train(counts):
    gradients = get_gradients(tiny_detector(), random_labels(*counts))
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]


def test_without_any_object_only_the_classes_have_a_loss():
    outputs = tiny_detector().train()(images(), labels=random_labels(0, 0))
    for name, loss in outputs.loss_dict.items():
        assert (loss.item() > 0) == (name.startswith("loss_class") and "denoising" not in name), name


def test_loss_is_the_sum_of_its_terms():
    outputs = tiny_detector().train()(images(), labels=random_labels(2, 1))
    layers = ["", "_0", "_encoder", "_denoising", "_denoising_0"]
    assert set(outputs.loss_dict) == {f"loss_{kind}{layer}" for kind in ("class", "bbox", "giou") for layer in layers}
    assert outputs.loss.item() == pytest.approx(sum(loss.item() for loss in outputs.loss_dict.values()))
    assert outputs.loss.dtype == torch.float32


def test_denoising_does_not_change_predictions_and_their_losses():
    model, labels = tiny_detector(), random_labels(2, 3)
    expected, outputs = model(images(), labels=labels), model.train()(images(), labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes)
    for name, loss in expected.loss_dict.items():
        torch.testing.assert_close(outputs.loss_dict[name], loss)
    assert outputs.loss > expected.loss


def test_denoising_can_be_switched_off():
    model, labels = tiny_detector(num_denoising_queries=0), random_labels(2, 3)
    assert model.denoising is None
    torch.testing.assert_close(model.train()(images(), labels=labels).loss, model.eval()(images(), labels=labels).loss)


def test_predictions_of_the_objects_themselves_cost_nothing():
    objects = detection.PiipDinoObjects.from_labels(random_labels(2, 0, 3), torch.device("cpu"))
    options = PiipDinoConfig()
    queries = torch.tensor([4, 1, 2, 0, 5])
    images_of = torch.tensor([0, 0, 2, 2, 2])
    logits, boxes = torch.full((3, 6, 3), -20.0), torch.full((3, 6, 4), 0.9)
    logits[images_of, queries, objects.class_labels] = 20.0
    boxes[images_of, queries] = objects.boxes
    matches = detection.match_objects(logits, boxes, objects, options)
    # within an image matches are listed by query
    found = sorted(zip(matches.images.tolist(), matches.queries.tolist(), matches.objects.tolist()))
    assert found == sorted(zip(images_of.tolist(), queries.tolist(), range(5)))
    losses = detection.compute_losses(logits, boxes, objects, matches, torch.tensor(5.0), options)
    assert all(loss.item() == pytest.approx(0, abs=1e-6) for loss in losses.values())


def test_more_objects_than_queries_are_matched_as_far_as_they_go():
    model = tiny_detector()
    outputs = model.train()(images(1, 3, 32, 32), labels=random_labels(15))
    assert outputs.loss.isfinite()


def test_new_head_starts_at_its_references_with_rare_classes():
    torch.manual_seed(0)
    model = PiipForObjectDetection(tiny_detector_config()).eval()
    outputs = model(images())
    assert outputs.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.005)
    torch.testing.assert_close(outputs.pred_boxes, outputs.encoder_pred_boxes, rtol=0, atol=2e-3)
    assert model.query_selection.contents.weight.std().item() == pytest.approx(1, abs=0.2)


def test_noise_stays_within_its_limits():
    labels = random_labels(3, 5)
    model = tiny_detector(num_denoising_queries=2000)
    objects = detection.PiipDinoObjects.from_labels(labels, torch.device("cpu"))
    noise = model.denoising.draw_noise(objects)
    indices = torch.arange(8).repeat(len(noise.shifts) // 8)
    is_negative = torch.arange(2).repeat_interleave(8).repeat(len(indices) // 16) == 1
    class_labels, boxes = model.denoising.add_noise(objects, indices, is_negative, noise)
    # a class is drawn anew for a quarter of the rows, and then is another one in two of three cases
    changed = (class_labels != objects.class_labels[indices]).float().mean().item()
    assert changed == pytest.approx(0.25 * 2 / 3, abs=0.03)
    corners, originals = detection.center_to_corners(boxes), detection.center_to_corners(objects.boxes[indices])
    shifts = (corners - originals).abs() / objects.boxes[indices][:, 2:].repeat(1, 2) * 2
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert 0.9 < shifts[~is_negative].max() <= 1 + 1e-4
    assert 1.9 < shifts[is_negative].max() <= 2 + 1e-4


def test_trainer_trains_and_gathers_only_predictions(tmp_path):
    data = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images(4, 3, 32, 32), random_labels(1, 2, 0, 3), strict=True)
    ]

    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": [example["labels"] for example in examples]}

    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=60,
        learning_rate=1e-3,
        max_grad_norm=0.1,
        logging_steps=20,
        eval_do_concat_batches=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = PiipForObjectDetection(tiny_detector_config())
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    predictions = trainer.predict(data)
    for logits, boxes in predictions.predictions:
        assert logits.shape == (2, 12, 3) and boxes.shape == (2, 12, 4)


def measure_loss_of_one_image(rank: int, port: int, expected: float):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loss = tiny_detector()(images()[rank : rank + 1], labels=random_labels(1, 4)[rank : rank + 1]).loss.detach()
    torch.distributed.all_reduce(loss)
    torch.distributed.destroy_process_group()
    assert loss.item() / 2 == pytest.approx(expected, rel=1e-4)


def test_losses_of_two_processes_average_to_that_of_their_images_together():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    expected = tiny_detector()(images(), labels=random_labels(1, 4)).loss.item()
    torch.multiprocessing.spawn(measure_loss_of_one_image, (port, expected), nprocs=2)


# Ways to run


@torch.no_grad()
def test_full_mask_is_no_mask():
    model = tiny_detector()
    outputs = model(images(), pixel_mask=torch.ones(2, 32, 32, dtype=torch.long))
    torch.testing.assert_close(outputs.logits, model(images()).logits)


@torch.no_grad()
def test_what_is_in_the_padding_of_the_maps_does_not_matter():
    """The network below sees the padding; the head must not."""
    model, maps = tiny_detector(), []
    model.feature_pyramid.register_forward_hook(lambda *arguments: maps.append(arguments[2]))
    pixel_mask = torch.ones(2, 32, 32)
    pixel_mask[0, :, 16:] = 0
    expected = model(images(), pixel_mask=pixel_mask)
    # the group norms of the neck see the whole map, so that is changed where they are done
    mask = pixel_mask.bool()

    def change(module, inputs, outputs):
        for k, level in enumerate(outputs):
            is_padding = ~torch.nn.functional.interpolate(mask[:, None].float(), size=level.shape[2:]).bool()
            outputs[k] = level.masked_fill(is_padding, 5.0)
        return outputs

    model.neck.register_forward_hook(change)
    outputs = model(images(), pixel_mask=pixel_mask)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes)


@torch.no_grad()
def test_compiles_to_one_graph():
    model = tiny_detector()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"pixel_values": images(), "pixel_mask": torch.ones(2, 32, 32)}
    outputs, expected = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes)


@torch.no_grad()
def test_exports_with_any_batch_size():
    model = tiny_detector()
    batch_size = torch.export.Dim("batch_size", min=1, max=16)
    inputs = {"pixel_values": images(2, 3, 32, 32), "pixel_mask": torch.ones(2, 32, 32)}
    shapes = {"pixel_values": {0: batch_size}, "pixel_mask": {0: batch_size}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for size in (1, 3):
        inputs = {"pixel_values": images(size, 3, 32, 32), "pixel_mask": torch.ones(size, 32, 32)}
        outputs, expected = program(**inputs), model(**inputs)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    # all cells are selected, and queries with the same content: the order of nearly equal scores does not matter
    model = tiny_detector(num_queries=16**2 + 8**2 + 4**2 + 2**2)
    model.query_selection.contents.weight[:] = model.query_selection.contents.weight[0].clone()
    pixel_values = images(1, 3, 32, 32)
    expected = model(pixel_values)
    outputs = model.to(dtype)(pixel_values.to(dtype))
    assert outputs.logits.dtype == dtype and outputs.pred_boxes.dtype == torch.float32
    predictions, expected_predictions = (
        torch.cat((output.pred_boxes[0], output.logits[0].float().sigmoid()), dim=-1) for output in (outputs, expected)
    )
    distances = (predictions[:, None] - expected_predictions).abs().amax(dim=-1).amin(dim=0)
    # refinement amplifies the rounding for a few of them
    assert distances.mean() < 2 * torch.finfo(dtype).eps and distances.max() < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    model, labels = tiny_detector(), random_labels(2, 3)
    expected = model(images(), labels=labels)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model.train()(images(), labels=labels)
    assert {loss.dtype for loss in outputs.loss_dict.values()} == {torch.float32}
    assert outputs.pred_boxes.dtype == torch.float32
    for name, loss in expected.loss_dict.items():
        assert outputs.loss_dict[name].item() == pytest.approx(loss.item(), rel=0.3)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_half_precision_weights_train():
    model = tiny_detector().to(torch.bfloat16).train()
    outputs = model(images().bfloat16(), labels=random_labels(2, 3))
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_gives_equal_gradients():
    checkpointed = tiny_detector()
    checkpointed.gradient_checkpointing_enable()
    labels = random_labels(2, 3)
    torch.testing.assert_close(get_gradients(checkpointed, labels), get_gradients(tiny_detector(), labels))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation):
    model, other, labels = tiny_detector().train(), tiny_detector().train(), random_labels(2, 3)
    model.set_attn_implementation(implementation)
    losses = []
    for detector in (model, other):
        torch.manual_seed(1)
        losses.append(detector(images(), labels=labels).loss)
    torch.testing.assert_close(*losses)


def test_hidden_states_and_attentions_are_those_of_the_network():
    model = tiny_detector()
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = model(images(), **options), model.piip(images(), **options)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
    torch.testing.assert_close(outputs.attentions, expected.attentions)


@torch.no_grad()
@pytest.mark.parametrize("levels", [["p4"], ["p4", "p5"], ["p2", "p3", "p4", "p5"]], ids=str)
def test_other_levels_work(levels):
    outputs = build(PiipForObjectDetection, tiny_config(out_features=levels))(images())
    assert outputs.logits.shape == (2, 12, 3) and outputs.pred_boxes.shape == (2, 12, 4)


# Errors


def change_label(**changes) -> list[dict[str, torch.Tensor]]:
    labels = random_labels(1, 2)
    labels[1] = labels[1] | changes
    return labels


@pytest.mark.parametrize(
    "labels, message",
    [
        (random_labels(1), "list of 2 dictionaries"),
        ([{"boxes": torch.zeros(0, 4)}] * 2, "each with `class_labels` and `boxes`"),
        (change_label(class_labels=torch.tensor([1, 3])), "image 1 of the batch hold the class id 3.*ids 0 to 2"),
        (change_label(class_labels=torch.tensor([-1, 0])), "class id -1"),
        (
            change_label(class_labels=torch.tensor([1, 3]), image_id=torch.tensor([77])),
            "image with image_id 77 hold the class id 3",
        ),
        (change_label(boxes=torch.tensor([[10.0, 20.0, 5.0, 5.0]] * 2)), "image 1 of the batch hold boxes outside"),
        (change_label(boxes=torch.full((2, 4), torch.nan)), "boxes outside 0..1"),
        (change_label(boxes=torch.zeros(3, 4)), r"of the shape \(num_objects, 4\)"),
        (change_label(class_labels=torch.zeros(2)), "must be integers"),
    ],
    ids=["one missing", "no classes", "id too large", "negative id", "named", "pixels", "nan", "counts", "floats"],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector().train()(images(), labels=labels)


def test_predictions_that_are_not_finite_name_the_image():
    model, pixel_values = tiny_detector(), images()
    pixel_values[1, 0, 0, 0] = torch.nan
    model(pixel_values)
    with pytest.raises(ValueError, match="predictions for image 1 of the batch are NaN or infinite"):
        model(pixel_values, labels=random_labels(1, 2))
    labels = [label | {"image_id": torch.tensor([40 + k])} for k, label in enumerate(random_labels(1, 0))]
    with pytest.raises(ValueError, match="predictions for the image with image_id 41 are NaN"):
        model(pixel_values, labels=labels)


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must have the shape \(2, 32, 32\).*got \(2, 16, 16\)"):
        tiny_detector()(images(), pixel_mask=torch.ones(2, 16, 16))


def test_images_with_fewer_cells_than_queries_are_refused():
    with pytest.raises(ValueError, match="have 340 cells, fewer than the 900 queries"):
        tiny_detector(num_queries=900)(images())


def test_loss_without_scipy_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(detection, "linear_sum_assignment", None)
    model = tiny_detector()
    model(images())
    with pytest.raises(ImportError, match="pip install scipy"):
        model(images(), labels=random_labels(1, 2))


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match=r"`num_groups` \(4\) must divide the `hidden_size` \(18\)"):
        PiipForObjectDetection(tiny_detector_config(hidden_size=18))


# Checkpoints, processor and pipeline


def test_checkpoints_of_network_backbone_and_detector_interchange(tmp_path):
    detector = tiny_detector()
    detector.save_pretrained(tmp_path / "detector")
    network = PiipModel.from_pretrained(tmp_path / "detector")
    torch.testing.assert_close(network.state_dict(), detector.piip.state_dict())
    backbone = PiipBackbone.from_pretrained(tmp_path / "detector")
    torch.testing.assert_close(backbone.feature_pyramid.state_dict(), detector.feature_pyramid.state_dict())
    backbone.save_pretrained(tmp_path / "backbone")
    again = PiipForObjectDetection.from_pretrained(tmp_path / "backbone")
    torch.testing.assert_close(again.piip.state_dict(), detector.piip.state_dict())
    torch.testing.assert_close(again.feature_pyramid.state_dict(), detector.feature_pyramid.state_dict())


def tiny_processor() -> PiipImageProcessor:
    size = {"shortest_edge": 32, "longest_edge": 48}
    return PiipImageProcessor(size=size, do_center_crop=False, do_pad=True, pad_size_divisor=16)


def test_labels_of_the_processor_train_the_model():
    annotations = [
        {"image_id": 1, "annotations": [{"bbox": [10, 5, 20, 15], "category_id": 2}]},
        {"image_id": 2, "annotations": []},
    ]
    pictures = [np.zeros((40, 60, 3), dtype=np.uint8), np.zeros((60, 40, 3), dtype=np.uint8)]
    inputs = tiny_processor()(pictures, annotations=annotations, return_tensors="pt")
    assert inputs["pixel_mask"].shape == (2, 48, 48)
    assert tiny_detector().train()(**inputs).loss.isfinite()


def test_pipeline_gives_the_detections_of_the_model(tmp_path):
    model, processor = tiny_detector(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is PiipForObjectDetection
    pixels = np.random.default_rng(0).integers(0, 255, (45, 60, 3), dtype=np.uint8)
    detect = pipeline("object-detection", str(tmp_path))
    found = detect(Image.fromarray(pixels), threshold=0.3)
    with torch.no_grad():
        outputs = model(**processor(pixels, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[(45, 60)])
    assert len(found) == len(expected["scores"]) > 0
    for item, score, label, box in zip(found, *(expected[key] for key in ("scores", "labels", "boxes")), strict=True):
        assert item["score"] == pytest.approx(score.item(), rel=1e-4)
        assert item["label"] == model.config.id2label[label.item()]
        corners = [item["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")]
        assert all(abs(ours - math.floor(theirs)) <= 1 for ours, theirs in zip(corners, box.tolist(), strict=True))
