"""Behaviour of `PiipForSemanticSegmentation` beyond Transformers' common tests and the goldens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

from modeling_piip import (
    PiipBackbone,
    PiipConfig,
    PiipForImageClassification,
    PiipForSemanticSegmentation,
    PiipImageProcessor,
    PiipModel,
)
from modeling_piip.modeling_piip_semantic_segmentation import get_window_starts

from .common import build, images, tiny_config


def tiny_segmenter(**uper_net) -> PiipForSemanticSegmentation:
    options = {"hidden_size": 8, "auxiliary_hidden_size": 8, "crop_size": 32, "stride": 21}
    return build(PiipForSemanticSegmentation, tiny_config(uper_net=options | uper_net, interaction_drop_path_rate=0.0))


def random_labels(*shape: int) -> torch.Tensor:
    return torch.randint(3, shape or (2, 32, 32), generator=torch.Generator().manual_seed(0))


def assert_equal_logits(logits: torch.Tensor, expected: torch.Tensor):
    """Up to rounding, relative to the largest value."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# Training


def test_every_parameter_gets_a_gradient():
    model = tiny_segmenter().train()
    model(images(), labels=random_labels()).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_classifiers_start_small_and_predict_every_class_alike():
    torch.manual_seed(0)
    config = tiny_config()
    model = PiipForSemanticSegmentation(config).train()
    weight = model.decode_head.classifier.weight
    # 24 weights: their spread is within four of its standard errors of the true one
    assert weight.std().item() == pytest.approx(config.initializer_range, rel=4 / (2 * weight.numel()) ** 0.5)
    loss = model(images(), labels=random_labels()).loss
    assert loss.item() == pytest.approx(1.4 * np.log(3), abs=0.05)


def test_loss_is_the_official_mean_over_all_pixels():
    model = tiny_segmenter()
    labels = random_labels(2, 32, 32)
    labels[0, :16] = 255
    outputs = model(images(), labels=labels)
    auxiliary_logits = model.segment(images(), [model.auxiliary_head])[0][0]
    expected = sum(
        weight * F.cross_entropy(logits, labels, ignore_index=255) * 0.75
        for weight, logits in ((1.0, outputs.logits), (0.4, auxiliary_logits))
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_logits_are_resized_to_labels_of_another_size():
    model = tiny_segmenter(use_auxiliary_head=False)
    labels = random_labels(2, 50, 40)
    outputs = model(images(), labels=labels)
    logits = F.interpolate(outputs.logits, size=(50, 40), mode="bilinear")
    torch.testing.assert_close(outputs.loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_maps_without_any_class_give_a_finite_loss(mode):
    model = tiny_segmenter(inference_mode=mode).train()
    loss = model(images(), labels=torch.full((2, 32, 32), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())


def test_auxiliary_head_runs_only_for_the_loss():
    model = tiny_segmenter()
    calls = []
    model.auxiliary_head.register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert not calls
    model(images(), labels=random_labels())
    assert calls


def test_auxiliary_head_can_be_left_out():
    model = tiny_segmenter(use_auxiliary_head=False)
    assert not [name for name in model.state_dict() if name.startswith("auxiliary_head")]
    outputs = model(images(), labels=random_labels())
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, random_labels()))


def test_channel_dropout_acts_in_training_only():
    model = tiny_segmenter(dropout=0.5)
    torch.testing.assert_close(model(images()).logits, model(images()).logits, rtol=0, atol=0)
    features = torch.ones(2, 8, 4, 4)
    dropped = model.decode_head.dropout.train()(features)
    assert set(dropped.flatten(2).unique().tolist()) == {0.0, 2.0}
    assert dropped.flatten(2).std(dim=2).eq(0).all()


def test_a_batch_of_one_image_cannot_train_and_the_error_says_what_can():
    model = tiny_segmenter().train()
    with pytest.raises(ValueError, match="batch of one image.*SyncBatchNorm"):
        model(images(1, 3, 32, 32), labels=random_labels(1, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(images(1, 3, 32, 32), labels=random_labels(1, 32, 32))


def test_batch_norms_can_be_synchronized():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_segmenter())
    expected = tiny_segmenter()
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert_equal_logits(model.eval()(images()).logits, expected(images()).logits)


def test_gradient_accumulation_does_not_change_loss_and_gradient(tmp_path):
    data = [{"pixel_values": image, "labels": random_labels(32, 32)} for image in images(8, 3, 32, 32)]

    def train_one_step(batch_size):
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=len(data) // batch_size,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        config = tiny_config(interaction_drop_path_rate=0.0)
        config.uper_net.dropout = 0.0
        model = build(PiipForSemanticSegmentation, config)
        # batch statistics are those of a step, whatever the loss
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True: None
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [trainer.state.log_history[0][key] for key in ("loss", "grad_norm")]

    assert train_one_step(batch_size=2) == pytest.approx(train_one_step(batch_size=8), rel=1e-4)


# Sliding windows


@pytest.mark.parametrize(
    "length, expected",
    [(512, [0]), (300, [0]), (513, [0, 1]), (853, [0, 341]), (854, [0, 341, 342]), (1194, [0, 341, 682])],
)
def test_last_window_ends_at_the_border(length, expected):
    assert get_window_starts(length, crop_size=512, stride=341) == expected


def slide_naively(model, pixel_values: torch.Tensor, crop_size: int, stride: int) -> torch.Tensor:
    """One image and one window at a time, moved back by what it reaches beyond the border."""
    height, width = pixel_values.shape[2:]
    total = torch.zeros(len(pixel_values), 3, height, width)
    count = torch.zeros(1, 1, height, width)
    for image in range(len(pixel_values)):
        for row in range(max(height - crop_size + stride - 1, 0) // stride + 1):
            for column in range(max(width - crop_size + stride - 1, 0) // stride + 1):
                bottom, right = min(row * stride + crop_size, height), min(column * stride + crop_size, width)
                top, left = max(bottom - crop_size, 0), max(right - crop_size, 0)
                window = pixel_values[image : image + 1, :, top:bottom, left:right]
                total[image, :, top:bottom, left:right] += model(window).logits[0]
                count[:, :, top:bottom, left:right] += image == 0
    return total / count


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 75), (20, 60), (60, 20), (16, 20)], ids=str)
@pytest.mark.parametrize("windows_per_forward", [1, 3, 100])
def test_windows_are_averaged(size, windows_per_forward):
    model = tiny_segmenter(inference_mode="slide", windows_per_forward=windows_per_forward)
    logits = model(images(2, 3, *size)).logits
    assert_equal_logits(logits, slide_naively(tiny_segmenter(), images(2, 3, *size), 32, 21))


@torch.no_grad()
def test_windows_bound_the_batch_of_the_network():
    model = tiny_segmenter(inference_mode="slide", windows_per_forward=3)
    batch_sizes = []
    model.piip.register_forward_pre_hook(lambda _, arguments: batch_sizes.append(len(arguments[0])))
    model(images(2, 3, 32, 53))
    assert batch_sizes == [3, 1]


def test_loss_of_windows_is_that_of_their_average():
    model = tiny_segmenter(inference_mode="slide", use_auxiliary_head=False)
    labels = random_labels(2, 40, 60)
    outputs = model(images(2, 3, 40, 60), labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


def test_training_looks_at_the_whole_crop():
    model = tiny_segmenter(inference_mode="slide").train()
    sizes = []
    model.piip.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape)))
    model(images(2, 3, 40, 60), labels=random_labels(2, 40, 60))
    assert sizes == [(2, 3, 40, 60)]


# Ways to run


def test_whole_image_compiles_to_one_graph():
    model = tiny_segmenter()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_equal_logits(compiled(images()).logits, model(images()).logits)


def test_loss_compiles_to_one_graph():
    model = tiny_segmenter()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss = compiled(images(), labels=random_labels()).loss
        torch.testing.assert_close(loss, model(images(), labels=random_labels()).loss)


@torch.no_grad()
def test_exports_with_any_batch_size():
    model = tiny_segmenter()
    shapes = {"pixel_values": {0: torch.export.Dim("batch_size", min=1, max=16)}}
    program = torch.export.export(
        model, (), {"pixel_values": images(2, 3, 32, 32)}, dynamic_shapes=shapes, strict=False
    ).module()
    for batch_size in (1, 3):
        pixel_values = images(batch_size, 3, 32, 32)
        assert_equal_logits(program(pixel_values=pixel_values).logits, model(pixel_values).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_half_precision_stays_near_float32(mode, dtype):
    model = tiny_segmenter(inference_mode=mode)
    pixel_values, labels = images(1, 3, 40, 40), random_labels(1, 40, 40)
    expected = model(pixel_values, labels=labels)
    outputs = model.to(dtype)(pixel_values.to(dtype), labels=labels)
    assert outputs.logits.dtype == dtype and outputs.loss.dtype == torch.float32
    error = (outputs.logits.float() - expected.logits).abs().max() / expected.logits.abs().max()
    assert error < 5 * torch.finfo(dtype).eps
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=5 * torch.finfo(dtype).eps)


def test_gradient_checkpointing_gives_equal_gradients():
    def train_step(model):
        torch.manual_seed(2)
        model.train()(images(), labels=random_labels()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    checkpointed = tiny_segmenter()
    checkpointed.gradient_checkpointing_enable()
    torch.testing.assert_close(train_step(checkpointed), train_step(tiny_segmenter()))


def test_hidden_states_and_attentions_are_those_of_the_network():
    model = tiny_segmenter()
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = model(images(), **options), model.piip(images(), **options)
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
    torch.testing.assert_close(outputs.attentions, expected.attentions)


# Errors


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.full((2, 32, 32), 3), r"class id 3, but the model has 3 classes \(ids 0 to 2; 255 is ignored\)"),
        (torch.full((2, 32, 32), -1), "class id -1"),
        (
            torch.zeros(32, 32, dtype=torch.long),
            r"shape \(2, height, width\).*got torch.int64 of the shape \(32, 32\)",
        ),
        (torch.zeros(1, 32, 32, dtype=torch.long), r"of the shape \(1, 32, 32\)"),
        (torch.zeros(2, 32, 32), "got torch.float32"),
    ],
    ids=["id too large", "negative id", "no batch", "other batch", "floats"],
)
def test_labels_that_are_no_maps_of_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_segmenter()(images(), labels=labels)


def test_another_id_can_be_ignored():
    model = tiny_segmenter(loss_ignore_index=-1)
    assert model(images(), labels=torch.full((2, 32, 32), -1)).loss == 0


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_images_of_one_pixel_are_refused(mode):
    with pytest.raises(ValueError, match="1x1 pixels are too small"):
        tiny_segmenter(inference_mode=mode)(images(1, 3, 1, 1))


def test_auxiliary_head_without_its_level_is_refused():
    with pytest.raises(ValueError, match='needs level "p4".*use_auxiliary_head=False'):
        PiipForSemanticSegmentation(tiny_config(out_features=["p2", "p3", "p5"]))


@pytest.mark.parametrize("levels", [["p3", "p4", "p5"], ["p4", "p5"], ["p4"]], ids=str)
def test_fewer_levels_work(levels):
    model = build(PiipForSemanticSegmentation, tiny_config(out_features=levels))
    assert model(images(), labels=random_labels()).logits.shape == (2, 3, 32, 32)


def test_regular_pyramid_with_levels_of_different_widths_works():
    convnext = {"architecture": "convnext", "image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 20]}
    convnext["stages"] = [1, 2, 2, 2]
    config = tiny_config(branches=[convnext], merge_type="concat", merge_stages=[0, 1, 2])
    assert config.level_sizes == [8, 12, 16, 20]
    model = build(PiipForSemanticSegmentation, config)
    assert model(images(1, 3, 64, 64)).logits.shape == (1, 3, 64, 64)


# Checkpoints and pipelines


@pytest.mark.parametrize("other_class", [PiipModel, PiipBackbone, PiipForImageClassification])
def test_checkpoints_of_other_classes_interchange(other_class, tmp_path):
    build(other_class).save_pretrained(tmp_path / "other")
    segmenter, info = PiipForSemanticSegmentation.from_pretrained(tmp_path / "other", output_loading_info=True)
    shared = ["piip."] if other_class is not PiipBackbone else ["piip.", "feature_pyramid."]
    assert not [name for name in info["missing_keys"] if name.startswith(tuple(shared))]
    segmenter.save_pretrained(tmp_path / "segmenter")
    other = other_class.from_pretrained(tmp_path / "segmenter")
    original = other_class.from_pretrained(tmp_path / "other")
    for name, weight in original.state_dict().items():
        is_shared = name.startswith(tuple(shared)) or other_class is PiipModel
        assert not is_shared or torch.equal(other.state_dict()[name], weight), name


def test_saved_configuration_tells_the_default_head(tmp_path):
    config = tiny_config(uper_net=None)
    assert config.uper_net is None
    with torch.device("meta"):
        PiipForSemanticSegmentation(config).config.save_pretrained(tmp_path)
    assert PiipConfig.from_pretrained(tmp_path).uper_net.hidden_size == 512


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_pipeline_colours_an_image_as_the_configuration_says(mode, tmp_path):
    model = tiny_segmenter(inference_mode=mode)
    model.save_pretrained(tmp_path)
    processor = PiipImageProcessor(size={"shortest_edge": 40}, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    segments = pipeline("image-segmentation", str(tmp_path))(image)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    (class_map,) = processor.post_process_semantic_segmentation(outputs, [(50, 90)])
    assert len(segments) > 1
    for segment in segments:
        expected = class_map.numpy() == model.config.label2id[segment["label"]]
        assert np.array_equal(np.array(segment["mask"]) == 255, expected)
