"""Behaviour of Mask R-CNN beyond Transformers' common tests (`conformance`) and the goldens."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

from modeling_piip import (
    PiipForInstanceSegmentation,
    PiipInstanceSegmentationImageProcessor,
    PiipMaskRCNNConfig,
)
from modeling_piip.modeling_piip_instance_segmentation import BACKGROUND, IGNORED, match_boxes, sample_matches

from .common import build, images, tiny_config


SIZE = 64
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
NOTHING = {
    "class_labels": torch.zeros(0, dtype=torch.long),
    "boxes": torch.zeros(0, 4),
    "masks": torch.zeros(0, SIZE, SIZE, dtype=torch.bool),
}


def head_options(**options) -> PiipMaskRCNNConfig:
    defaults = {"hidden_size": 8, "box_hidden_size": 16, "mask_num_convs": 2, "max_detections": 10}
    return PiipMaskRCNNConfig(**(defaults | options))


def build_model(**options) -> PiipForInstanceSegmentation:
    config = tiny_config(mask_rcnn=head_options(**options), interaction_drop_path_rate=0.0)
    return build(PiipForInstanceSegmentation, config)


def pixels(batch_size: int = 2) -> torch.Tensor:
    return images(batch_size, 3, SIZE, SIZE)


def label(*corners: tuple[int, int, int, int], **options) -> dict[str, torch.Tensor]:
    """Rectangles (x1, y1, x2, y2) in pixels, of the classes 0, 1, 2."""
    boxes = torch.tensor(corners).float()
    masks = torch.zeros(len(corners), SIZE, SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    boxes = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), dim=1) / SIZE
    return {"class_labels": torch.arange(len(corners)), "boxes": boxes, "masks": masks} | options


def labels() -> list[dict[str, torch.Tensor]]:
    return [label((4, 8, 40, 36), (30, 30, 60, 62)), label((0, 0, 20, 50))]


# Training


@pytest.mark.parametrize("with_masks", [True, False])
def test_every_parameter_gets_a_gradient(with_masks):
    model = build_model(with_masks=with_masks).train()
    outputs = model(pixels(), labels=labels())
    assert set(outputs.loss_dict) == (LOSSES if with_masks else LOSSES - {"loss_mask"})
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    assert outputs.scores is None
    outputs.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("image_labels", [[NOTHING, NOTHING], [NOTHING, labels()[0]]], ids=["all", "one image"])
def test_images_without_objects(image_labels):
    model = build_model().train()
    outputs = model(pixels(), labels=image_labels)
    assert all(loss.isfinite() for loss in outputs.loss_dict.values())
    outputs.loss.backward()
    # distributed training waits for the gradients of all parameters
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if image_labels[1] is NOTHING:
        assert outputs.loss_dict["loss_mask"] == outputs.loss_dict["loss_box_reg"] == 0


def test_crowds_and_boxes_without_area_are_left_out():
    model = build_model().train()

    def compute_losses(image_labels):
        torch.manual_seed(0)
        return model(pixels(1), labels=[image_labels]).loss_dict

    more = label((4, 8, 40, 36), (30, 30, 60, 62), (10, 10, 10, 30), iscrowd=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(compute_losses(more), compute_losses(label((4, 8, 40, 36))))


def test_sampling_follows_the_seed():
    model = build_model(rpn_batch_size_per_image=16, box_batch_size_per_image=16).train()

    def compute_loss(seed):
        torch.manual_seed(seed)
        return model(pixels(), labels=labels()).loss.item()

    assert compute_loss(0) == compute_loss(0) != compute_loss(1)


def test_samples_keep_number_and_share():
    matches = torch.tensor([BACKGROUND] * 50 + [IGNORED] * 20 + list(range(30)))
    positives, negatives = sample_matches(matches, 40, 0.25)
    assert len(positives) == 10 and (matches[positives] >= 0).all() and positives.equal(positives.unique())
    assert len(negatives) == 30 and (matches[negatives] == BACKGROUND).all()
    positives, negatives = sample_matches(matches, 100, 0.5)
    assert len(positives) == 30 and len(negatives) == 50


def test_every_object_is_matched():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [20, 0, 30, 10.0]])
    objects = torch.tensor([[0, 0, 10, 10], [20, 0, 30, 25], [80, 80, 90, 90.0]])
    # the second object is overlapped by 0.4 only, the third one not at all
    assert match_boxes(boxes, objects, 0.9, 0.3).tolist() == [0, IGNORED, BACKGROUND, 1]
    assert match_boxes(boxes, objects[:0], 0.9, 0.3).tolist() == [BACKGROUND] * 4
    assert match_boxes(boxes[:0], objects, 0.9, 0.3).tolist() == []


def test_training_overfits_one_image():
    torch.manual_seed(0)
    model = PiipForInstanceSegmentation(tiny_config(mask_rcnn=head_options(hidden_size=16, box_hidden_size=64)))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    first = None
    for _ in range(40):
        loss = model(pixels(1), labels=labels()[:1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.5 * first


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_half_precision_training_step(mode):
    model = build_model().train()
    torch.manual_seed(0)
    expected = model(pixels(), labels=labels()).loss
    model = model.to(torch.bfloat16) if mode == "bfloat16" else model
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        outputs = model(pixels(), labels=labels())
    assert all(loss.dtype == torch.float32 for loss in outputs.loss_dict.values())
    torch.testing.assert_close(outputs.loss, expected, rtol=0.1, atol=0)
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_new_heads_start_as_the_official_ones():
    torch.manual_seed(0)
    model = PiipForInstanceSegmentation(tiny_config(mask_rcnn=PiipMaskRCNNConfig()))
    box_head = model.roi_head.box_head
    for layer, std in (
        (model.rpn_head.conv, 0.01),
        (model.rpn_head.objectness, 0.01),
        (box_head.classifier, 0.01),
        (box_head.deltas, 0.001),
        # Xavier: uniform, with the variance 2 / (inputs + outputs)
        (box_head.fc2, (2 / 2048) ** 0.5),
        (model.neck.layer_blocks[0][0], (2 / (2 * 256 * 9)) ** 0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert not layer.bias.any()


# Predictions


def test_predictions_have_fixed_shapes_and_are_padded():
    outputs = build_model()(pixels(3))
    assert outputs.loss is None
    assert outputs.scores.shape == outputs.class_ids.shape == (3, 10)
    assert outputs.pred_boxes.shape == (3, 10, 4) and outputs.pred_masks.shape == (3, 10, 28, 28)
    model = build_model(box_score_thresh=1.0)
    outputs = model(pixels())
    assert outputs.pred_boxes.shape == (2, 10, 4) and outputs.pred_masks.shape == (2, 10, 28, 28)
    assert not outputs.scores.any() and (outputs.class_ids == -1).all()


def test_without_masks_there_are_boxes_only():
    model = build_model(with_masks=False)
    outputs = model(pixels(), labels=[{k: v for k, v in label.items() if k != "masks"} for label in labels()])
    assert outputs.pred_masks is None and outputs.pred_boxes.shape == (2, 10, 4)
    assert not any("mask" in name for name in model.state_dict())


def test_labels_do_not_change_predictions():
    model = build_model()
    outputs, expected = model(pixels(), labels=labels()), model(pixels())
    assert outputs.loss == model(pixels(), labels=labels()).loss
    for name in ("scores", "class_ids", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=0)


def test_boxes_stay_inside_the_image_and_relative_to_it():
    pixel_mask = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    pixel_mask[:, :40, :24] = 1
    boxes = build_model(box_score_thresh=0.0)(pixels(1), pixel_mask).pred_boxes[0]
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert corners.max() > 0.9


def test_padding_of_labels_is_relative_to_the_image_without_it():
    model = build_model()
    pixel_mask = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    pixel_mask[:, :32, :16] = 1
    image_sizes = torch.tensor([[16.0, 32, 16, 32]])
    (objects,) = model.get_objects([label((16, 16, 48, 48))], image_sizes, (SIZE, SIZE))
    assert objects.boxes.tolist() == [[4, 8, 12, 24]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: label.pop("masks"), "with_masks=False"),
        (lambda label: label.pop("boxes"), "one per image, each with"),
        (lambda label: label.update(masks=label["masks"][:, :32]), "must have the shape [(]2, 64, 64[)]"),
        (lambda label: label.update(boxes=label["boxes"][:1]), "do not fit"),
        (lambda label: label.update(boxes=label["boxes"] * SIZE), "outside 0..1"),
        (lambda label: label.update(class_labels=label["class_labels"] + 2), "class id 3, but the model has 3"),
    ],
)
def test_labels_that_cannot_be_used_are_named(change, message):
    broken = label((4, 8, 40, 36), (30, 30, 60, 62))
    change(broken)
    with pytest.raises(ValueError, match=message):
        build_model()(pixels(), labels=[label((0, 0, 20, 50)), broken])


def test_predictions_that_are_not_finite_name_the_image():
    broken = pixels()
    broken[1, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="predictions for image 1 of the batch are NaN or infinite"):
        build_model()(broken, labels=labels())


def test_missing_labels_of_an_image_are_named():
    with pytest.raises(ValueError, match="list of 2 dictionaries"):
        build_model()(pixels(), labels=labels()[:1])


def test_all_levels_are_needed():
    with pytest.raises(ValueError, match="out_features"):
        PiipForInstanceSegmentation(tiny_config(out_features=["p3", "p4", "p5"]))


# Trainer, export, pipeline


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"pixel_values": pixels(1)[0] + index, "labels": labels()[index % 2]}


def collate(examples: list[dict]) -> dict:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": [example["labels"] for example in examples],
    }


def test_trainer_trains_and_gathers_predictions(tmp_path):
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
    )
    trainer = Trainer(build_model(), arguments, data_collator=collate, train_dataset=Scenes(), eval_dataset=Scenes())
    trainer.train()
    predictions = trainer.predict(Scenes())
    assert np.isfinite(predictions.metrics["test_loss"])
    scores, class_ids, boxes, masks = predictions.predictions[0]
    assert scores.shape == class_ids.shape == (4, 10)
    assert boxes.shape == (4, 10, 4) and masks.shape == (4, 10, 28, 28)


class FeatureMaps(nn.Module):
    def __init__(self, model: PiipForInstanceSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model.get_feature_maps(pixel_values)


@torch.no_grad()
def test_feature_maps_compile_and_export():
    module = FeatureMaps(build_model())
    expected = module(pixels(3))
    assert [level.shape[2:] for level in expected] == [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels(3)), expected)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(module, (pixels(2),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(pixels(3)), expected)
    assert not PiipForInstanceSegmentation._can_compile_fullgraph


def test_pipeline_gives_masks_of_instances(tmp_path):
    build_model().save_pretrained(tmp_path)
    size = {"shortest_edge": SIZE, "longest_edge": SIZE}
    PiipInstanceSegmentationImageProcessor(size=size, pad_size_divisor=16).save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", str(tmp_path), trust_remote_code=True)
    assert type(segment.image_processor).__name__ == "PiipInstanceSegmentationImageProcessor"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    instances = segment(picture, threshold=0.05, overlap_mask_area_threshold=0)
    assert instances
    for instance in instances:
        assert instance["mask"].size == (120, 90) and np.asarray(instance["mask"]).any()
        assert instance["label"].startswith("LABEL_") and 0.05 < instance["score"] <= 1
    with pytest.raises(ValueError, match="Subtask semantic is not supported for model .*PiipForInstanceSegmentation"):
        segment(picture, subtask="semantic")
