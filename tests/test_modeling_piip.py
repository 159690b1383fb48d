"""Behaviour of the models beyond Transformers' common tests (`conformance`) and the goldens (`test_goldens.py`)."""

import re
import shutil
from functools import partial

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_piip import PiipBackbone, PiipForImageClassification, PiipModel

from .common import build, images, tiny_branch, tiny_cls_config, tiny_config


MODELS = {
    "model": partial(build, PiipModel),
    "backbone": partial(build, PiipBackbone),
    "merged head": partial(build, PiipForImageClassification),
    "branch heads": lambda: build(PiipForImageClassification, tiny_cls_config()),
    "cross attention": lambda: build(PiipBackbone, tiny_config(interaction_attention="cross")),
}
every_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)


def main_outputs(outputs) -> tuple[torch.Tensor, ...]:
    """The feature maps of a backbone; the first output of every other model."""
    return outputs["feature_maps"] if "feature_maps" in outputs else (outputs[0],)


def random_loss(outputs) -> torch.Tensor:
    """Different for every value of the outputs, so that no norm can cancel its gradient."""
    generator = torch.Generator().manual_seed(1)
    return sum((output * torch.randn(output.shape, generator=generator)).mean() for output in main_outputs(outputs))


# Error of half-precision outputs, relative to the largest value, in units of the dtype's eps. Over these models and
# eight seeds it is at most 2.3: roundings of single operations average out. Wrong maps are hundreds of units away.
HALF_PRECISION_BOUND = 5


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output.float() - expected).abs().max() / expected.abs().max()).item()


def assert_equal_outputs(outputs, expected, **tolerances):
    torch.testing.assert_close(main_outputs(outputs), main_outputs(expected), **tolerances)


# Training


@every_model
def test_every_parameter_gets_a_gradient(make_model):
    model = make_model()
    random_loss(model(images())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@every_model
def test_gradient_checkpointing_gives_equal_gradients(make_model):
    def train_step(model):
        calls = []
        for name, module in model.named_modules():
            if name.endswith((".norm1", ".query_norm")):  # the first things that layers and interactions compute
                module.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)
        random_loss(model.train()(images())).backward()
        return len(calls), {name: parameter.grad for name, parameter in model.named_parameters()}

    checkpointed = make_model()
    checkpointed.gradient_checkpointing_enable()
    num_calls, expected = train_step(make_model())
    num_calls_checkpointed, gradients = train_step(checkpointed)
    assert num_calls_checkpointed == 2 * num_calls
    torch.testing.assert_close(gradients, expected)


def test_new_interactions_leave_the_branches_alone():
    torch.manual_seed(0)
    model = PiipModel(tiny_config()).eval()
    tokens = model(images()).branch_hidden_states
    model.interactions = nn.ModuleList()
    torch.testing.assert_close(model(images()).branch_hidden_states, tokens, rtol=0, atol=0)


def test_new_deformable_attention_looks_around_evenly():
    attention = PiipModel(tiny_config()).interactions[0].units[0].coarse_to_fine.attention
    assert attention.sampling_offsets.weight.eq(0).all() and attention.attention_weights.weight.eq(0).all()
    assert attention.sampling_offsets.bias.abs().max() == attention.num_points


def test_drop_path_acts_in_training_only():
    model = build(PiipModel, tiny_config(interaction_drop_path_rate=0.5))
    torch.testing.assert_close(model(images())[0], model(images())[0], rtol=0, atol=0)
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(images())[0], model(images())[0])


def test_gradient_accumulation_does_not_change_loss_and_gradient(tmp_path):
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(8, 3, 32, 32))]

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
        model = build(PiipForImageClassification, tiny_config(interaction_drop_path_rate=0.0))
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [trainer.state.log_history[0][key] for key in ("loss", "grad_norm")]

    assert train_one_step(batch_size=2) == pytest.approx(train_one_step(batch_size=8), rel=1e-4)


# Ways to run


@pytest.mark.parametrize("name", ["backbone", "branch heads"])
def test_compiles_to_one_graph(name):
    # "aot_eager" traces the graphs that inductor compiles, without the minute of C++ compilation
    model = MODELS[name]()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_outputs(compiled(images()), model(images()))


@pytest.mark.parametrize("name", ["backbone", "branch heads"])
def test_exports_with_any_batch_size(name):
    model = MODELS[name]()
    shapes = {"pixel_values": {0: torch.export.Dim("batch_size")}}
    program = torch.export.export(model, (), {"pixel_values": images()}, dynamic_shapes=shapes).module()
    for batch_size in (1, 3, 5):
        pixel_values = images(batch_size, 3, 32, 32)
        assert_equal_outputs(program(pixel_values=pixel_values), model(pixel_values))


@every_model
def test_eager_attention_agrees(make_model):
    assert_attention_agrees(make_model(), "eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, which needs a C++ compiler")
def test_flex_attention_agrees():
    assert_attention_agrees(build(PiipBackbone), "flex_attention")


def assert_attention_agrees(model, implementation: str):
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(images())
        model.set_attn_implementation(implementation)
        assert_equal_outputs(model(images()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_model
def test_half_precision_stays_near_float32(make_model, dtype):
    model = make_model()
    pixel_values = images(1, 3, 32, 32)
    with torch.no_grad():
        expected = main_outputs(model(pixel_values))
        outputs = main_outputs(model.to(dtype)(pixel_values.to(dtype)))
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert relative_error(output, reference) < HALF_PRECISION_BOUND * torch.finfo(dtype).eps


def test_autocast_stays_near_float32():
    model = build(PiipForImageClassification, tiny_cls_config())
    with torch.no_grad():
        expected = model(images()).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images()).logits
    assert relative_error(logits, expected) < HALF_PRECISION_BOUND * torch.finfo(torch.bfloat16).eps


@every_model
def test_images_of_a_batch_do_not_mix(make_model):
    model = make_model()
    pixel_values = images(3, 3, 32, 32)
    together = main_outputs(model(pixel_values))
    for i in range(3):
        alone = main_outputs(model(pixel_values[i : i + 1]))
        torch.testing.assert_close(alone, tuple(output[i : i + 1] for output in together))


# Sizes


@pytest.mark.parametrize("size", [(32, 32), (32, 56), (60, 24), (37, 29), (35, 64), (8, 8), (8, 40), (11, 9)], ids=str)
def test_any_size_works(size):
    height, width = size
    model = build(PiipBackbone)
    with torch.no_grad():
        outputs = model.piip(images(1, 3, height, width))
        feature_maps = model(images(1, 3, height, width)).feature_maps
    rows, columns = height // 4, width // 4
    assert outputs.last_hidden_state.shape == (1, rows * columns, 32)
    assert [tuple(feature_map.shape[2:]) for feature_map in feature_maps] == [
        (rows * 4, columns * 4),
        (rows * 2, columns * 2),
        (rows, columns),
        (max(rows // 2, 1), max(columns // 2, 1)),
    ]
    assert all(feature_map.isfinite().all() for feature_map in feature_maps)


@pytest.mark.parametrize("sizes", [[32], [32, 16], [92, 48, 32], [112, 90, 45, 22]], ids=str)
def test_smallest_size_leaves_one_patch_and_one_pixel_less_is_refused(sizes):
    branches = [tiny_branch(image_size=size) for size in sizes]
    model = build(PiipModel, tiny_config(branches=branches))
    side = model.image_pyramid.minimum_size
    outputs = model(images(1, 3, side, side))
    assert outputs.last_hidden_state.isfinite().all()
    assert min(tokens.shape[1] for tokens in outputs.branch_hidden_states) == 1
    message = f"{side - 1}x{side} pixels are too small.*Height and width must be at least {side}"
    with pytest.raises(ValueError, match=message):
        model(images(1, 3, side - 1, side))


# Outputs


def test_hidden_states_are_those_of_every_branch_before_and_after_every_interaction():
    model = build(PiipModel)
    outputs = model(images(), output_hidden_states=True)
    assert [tuple(tokens.shape) for tokens in outputs.hidden_states] == [(2, 64, 16), (2, 16, 32)] * 3
    torch.testing.assert_close(outputs.hidden_states[-2:], outputs.branch_hidden_states)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))
    assert outputs.merged_feature_maps[-1].shape == (2, 32, 8, 8)
    torch.testing.assert_close(outputs.merged_feature_maps[-1].flatten(2).mT, outputs.last_hidden_state)


def test_attentions_are_those_of_every_layer_in_order():
    model = build(PiipModel, tiny_cls_config())
    model.set_attn_implementation("eager")
    attentions = model(images(), output_attentions=True).attentions
    # with the class token: 65 tokens of the first, 17 of the second branch
    assert [tuple(a.shape) for a in attentions] == [(2, 2, 65, 65), (2, 2, 17, 17)] * 2
    for attention in attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))


def test_backbone_builds_and_returns_only_the_levels_that_are_asked_for():
    everything = build(PiipBackbone)
    some = PiipBackbone(tiny_config(out_features=["p3", "p5"])).eval()
    keys = some.load_state_dict(everything.state_dict(), strict=False)
    assert not keys.missing_keys
    assert {key.split(".")[2] for key in keys.unexpected_keys} == {"p2"}
    expected = everything(images()).feature_maps
    torch.testing.assert_close(some(images()).feature_maps, (expected[1], expected[3]))


# Errors


@pytest.mark.parametrize(
    "pixel_values, message",
    [
        (images(1, 4, 32, 32), r"shape \(batch_size, 3, height, width\), got \(1, 4, 32, 32\)\.$"),
        (images(1, 32, 32, 3), r"got \(1, 32, 32, 3\)\. They seem to have the channels last: permute them"),
        (images(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), r"shape \(0, 3, 32, 32\) are an empty batch: pass at least one image"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point images, got torch.uint8: use `PiipImageProc"),
    ],
    ids=["four channels", "channels last", "no batch", "empty batch", "integers"],
)
@every_model
def test_pixels_that_are_no_batch_of_normalized_images_are_refused(make_model, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        make_model()(pixel_values)


@pytest.mark.parametrize("label", [3, -1, 255])
def test_label_out_of_range_is_refused(label):
    model = build(PiipForImageClassification)
    message = rf"class id {label}, but the model has 3 classes \(ids 0 to 2\)\. Set `num_labels`"
    with pytest.raises(ValueError, match=message):
        model(images(), labels=torch.tensor([0, label]))


def test_label_of_minus_100_is_ignored():
    model = build(PiipForImageClassification)
    loss = model(images(), labels=torch.tensor([1, -100])).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(images()).logits[:1], torch.tensor([1])))


def test_loss_of_mixed_labels_is_that_of_timm():
    model = build(PiipForImageClassification, tiny_config(problem_type="single_label_classification"))
    labels = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.1, 0.8]])
    outputs = model(images(), labels=labels)
    torch.testing.assert_close(outputs.loss, SoftTargetCrossEntropy()(outputs.logits, labels))


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    build(PiipForImageClassification).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "within the header", "100 bytes missing"])
def test_truncated_checkpoint_is_refused(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(OSError, match=re.escape(f"The weights of {checkpoint} are truncated or damaged")):
        PiipForImageClassification.from_pretrained(checkpoint)


def test_checkpoint_of_another_variant_is_refused_with_the_shapes(checkpoint, caplog):
    branches = [tiny_branch(image_size=32, hidden_size=16, window_size=[3, None]), tiny_branch(hidden_size=64)]
    with pytest.raises(RuntimeError, match="mismatch"):
        PiipForImageClassification.from_pretrained(checkpoint, config=tiny_config(branches=branches))
    for name, saved, wanted in (
        ("piip.branches.1.embeddings.position_embeddings", "[1, 16, 32]", "[1, 16, 64]"),
        ("classifiers.0.linear.weight", "[3, 32]", "[3, 64]"),
    ):
        assert re.search(f"{re.escape(name)} .*{re.escape(saved)}.*{re.escape(wanted)}", caplog.text)


def test_classifier_for_other_classes_starts_new(checkpoint):
    old = build(PiipForImageClassification)
    new, info = PiipForImageClassification.from_pretrained(
        checkpoint, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert new(images()).logits.shape == (2, 7)
    mismatched = {"classifiers.0.linear.weight", "classifiers.0.linear.bias"}
    assert {key for key, *_ in info["mismatched_keys"]} == mismatched
    for key, weight in new.state_dict().items():
        assert key in mismatched or torch.equal(weight, old.state_dict()[key])


# Inside other models


def assert_every_branch_learns(model: nn.Module):
    gradients = {name: p.grad for name, p in model.named_parameters() if "piip.branches" in name}
    for k in range(2):
        assert any(f"piip.branches.{k}." in name for name in gradients)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    embeddings = [gradient for name, gradient in gradients.items() if "patch_embeddings.weight" in name]
    assert len(embeddings) == 2 and all(gradient.abs().sum() > 0 for gradient in embeddings)


def test_upernet_trains_with_our_backbone():
    config = UperNetConfig(
        backbone_config=tiny_config(), hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=3
    )
    model = UperNetForSemanticSegmentation(config).train()
    labels = torch.randint(3, (2, 32, 32))
    outputs = model(images(), labels=labels)
    assert outputs.logits.shape == (2, 3, 32, 32)
    outputs.loss.backward()
    assert_every_branch_learns(model)


def test_deformable_detr_trains_with_our_backbone():
    config = DeformableDetrConfig(
        backbone_config=tiny_config(out_features=["p3", "p4", "p5"]),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_feature_levels=4,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )
    model = DeformableDetrForObjectDetection(config).train()
    labels = [{"class_labels": torch.tensor([i]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])} for i in range(2)]
    outputs = model(images(), labels=labels)
    assert outputs.logits.shape == (2, 5, 3)
    outputs.loss.backward()
    assert_every_branch_learns(model)


def test_mask2former_trains_with_our_backbone():
    config = Mask2FormerConfig(
        backbone_config=tiny_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=32,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    model = Mask2FormerForUniversalSegmentation(config).train()
    mask = torch.zeros(1, 32, 32)
    mask[:, 4:20, 8:24] = 1
    outputs = model(images(), mask_labels=[mask, mask], class_labels=[torch.tensor([1]), torch.tensor([2])])
    assert outputs.class_queries_logits.shape == (2, 5, 4) and outputs.masks_queries_logits.shape == (2, 5, 32, 32)
    outputs.loss.backward()
    assert_every_branch_learns(model)
