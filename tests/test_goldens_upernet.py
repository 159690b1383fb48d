"""Our UperNet against the official one: heads on given feature maps, sliding windows, and end to end."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_piip import PiipConfig, PiipForSemanticSegmentation, PiipImageProcessor, PiipModelOutput
from modeling_piip.conversion import convert_config, convert_state_dict, convert_uper_net, rename_key

from .common import tiny_branch
from .fixtures.inputs_rule import feature_map, image
from .goldens import FIXTURES, read_manifest
from .head_goldens import assert_matches_head, build_weight, read_case, read_tensors


HEAD_NAMES = read_manifest(
    FIXTURES / "head_manifests" / "upernet_internvit_h6b_512_512_80k_ade20k_bs16_lr4e-5.json.gz"
)["state_dict"]
# Gradient norms move in the fourth digit with the order of sums
GRADIENT_TOLERANCE = 1e-3


class GivenMaps(nn.Module):
    """Instead of the network below the heads: the same maps for every image."""

    def __init__(self, feature_maps: list[torch.Tensor]):
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: torch.Tensor) -> PiipModelOutput:
        return PiipModelOutput(merged_feature_maps=tuple(self.feature_maps))


class ToyNetwork(nn.Module):
    """Instead of the network below the heads: one convolution, and averages for the coarser levels."""

    def __init__(self, size: int):
        super().__init__()
        self.stem = nn.Conv2d(3, size, kernel_size=4, stride=4)
        for name, parameter in self.stem.named_parameters():
            parameter.data = build_weight(f"backbone.stem.{name}", parameter.shape)

    def forward(self, pixel_values: torch.Tensor) -> PiipModelOutput:
        feature_maps = [self.stem(pixel_values)]
        while len(feature_maps) < 4:
            feature_maps.append(F.avg_pool2d(feature_maps[-1], 2))
        return PiipModelOutput(merged_feature_maps=tuple(feature_maps))


def build_head_weights(model: PiipForSemanticSegmentation) -> dict[str, torch.Tensor]:
    """Under the official names; their layout is ours."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    return {name: build_weight(name, shapes[rename_key(name, model.config)]) for name in HEAD_NAMES}


def build_model(name: str, network: nn.Module) -> PiipForSemanticSegmentation:
    """The heads of a case with their official weights on top of `network`."""
    case = read_case(name)
    branches = [tiny_branch(hidden_size=case["case"]["ch"])]
    model = PiipForSemanticSegmentation(PiipConfig(branches=branches, num_groups=4, **convert_uper_net(case["model"])))
    weights = model.state_dict()
    for official_name, weight in build_head_weights(model).items():
        weights[rename_key(official_name, model.config)].copy_(weight)
    model.piip, model.feature_pyramid = network, nn.Identity()
    return model.eval()


def build_given_maps() -> list[torch.Tensor]:
    case = read_case("upernet_c150")["case"]
    maps = []
    for level, (size, block) in enumerate(zip(case["sizes"], case["block"], strict=True)):
        shape = (case["batch"], case["ch"], *size)
        maps.append(torch.from_numpy(feature_map(case["seed"] + level, shape, block, case["coarse"], case["fine"])))
    return maps


@pytest.fixture
def given_maps():
    return build_given_maps()


@pytest.fixture
def model(given_maps):
    """The model of the case with given maps."""
    return build_model("upernet_c150", GivenMaps(given_maps))


@pytest.fixture
def labels():
    return read_tensors("upernet_c150", "loss")["label"].squeeze(1)


def build_pixel_values(seed: int, size: list[int], **options) -> torch.Tensor:
    return torch.from_numpy(image(seed, (1, 3, *size), **options))


def test_head_has_the_official_number_of_weights(model):
    ours = [name for name in model.state_dict() if name.startswith(("decode_head.", "auxiliary_head."))]
    assert len(HEAD_NAMES) == len(ours) == 82
    assert {rename_key(name, model.config) for name in HEAD_NAMES} == set(ours)


@torch.no_grad()
def test_heads_on_given_maps(model, given_maps):
    head = model.decode_head
    between = {}
    for name in ("top_conv", "fusion_conv"):
        module = getattr(head, name)
        module.register_forward_hook(lambda _, inputs, output, name=name: between.update({name: output}))
    logits = head(tuple(given_maps))
    for k, pooled in enumerate(head.pool(given_maps[-1])):
        assert_matches_head(pooled, "upernet_c150", "decode", f"ppm_{k}")
    assert_matches_head(between["top_conv"], "upernet_c150", "decode", "psp_bottleneck")
    assert_matches_head(between["fusion_conv"], "upernet_c150", "decode", "fused_feature")
    assert_matches_head(logits, "upernet_c150", "decode", "logits")
    assert_matches_head(model.auxiliary_head(given_maps), "upernet_c150", "aux", "logits")


@torch.no_grad()
def test_logits_and_losses(model, labels):
    outputs = model(torch.zeros(2, 3, 128, 160), labels=labels)
    assert_matches_head(outputs.logits, "upernet_c150", "upsampled", "logits")
    assert torch.equal(outputs.logits.argmax(dim=1), read_tensors("upernet_c150", "upsampled")["class_map"].long())
    decode_loss, auxiliary_loss = (
        read_tensors("upernet_c150", "loss")[f"{name}_loss_ce"].item() for name in ("decode", "aux")
    )
    assert outputs.loss.item() == pytest.approx(decode_loss + auxiliary_loss, rel=1e-5)
    assert model.cross_entropy(outputs.logits, labels).item() == pytest.approx(decode_loss, rel=1e-5)


@torch.no_grad()
def test_batch_norm_in_training(model, given_maps, labels):
    model.train()
    for head in (model.decode_head, model.auxiliary_head):
        head.dropout.p = 0
    logits = [head(given_maps) for head in (model.decode_head, model.auxiliary_head)]
    assert_matches_head(logits[0], "upernet_c150", "train_bn", "decode_logits")
    assert_matches_head(logits[1], "upernet_c150", "train_bn", "aux_logits")
    stored = read_tensors("upernet_c150", "train_bn")
    loss = model(torch.zeros(2, 3, 128, 160), labels=labels).loss.item()
    assert loss == pytest.approx((stored["decode_loss_ce"] + stored["aux_loss_ce"]).item(), rel=1e-5)


def test_gradients(model, given_maps, labels):
    for level in given_maps:
        level.requires_grad_()
    loss = model(torch.zeros(2, 3, 128, 160), labels=labels).loss
    loss.backward()
    stored = read_tensors("upernet_c150_grads", "grads")
    names = read_case("upernet_c150_grads")["steps"]["grads"]["notes"]["parameter_names"]
    assert loss.item() == pytest.approx(stored["total_loss"].item(), rel=1e-5)
    assert stored["has_grad"].all()
    for name, expected in zip(names, stored["param_grad_l2"].tolist(), strict=True):
        gradient = model.get_parameter(rename_key(name, model.config)).grad
        assert gradient.double().norm().item() == pytest.approx(expected, rel=GRADIENT_TOLERANCE), name
    for k, level in enumerate(given_maps):
        assert_matches_head(level.grad, "upernet_c150_grads", "grads", f"input_grad_level{k}")


@torch.no_grad()
@pytest.mark.parametrize("windows_per_forward", [1, 4, 100])
def test_sliding_windows(windows_per_forward):
    case = read_case("upernet_slide")["case"]
    model = build_model("upernet_slide", ToyNetwork(case["ch"]))
    model.config.uper_net.windows_per_forward = windows_per_forward
    pixel_values = build_pixel_values(case["seed"], case["image"], block=12)
    outputs = model(pixel_values)
    stored = read_tensors("upernet_slide", "slide")
    assert_matches_head(outputs.logits, "upernet_slide", "slide", "averaged_logits")
    assert_matches_head(outputs.logits.softmax(dim=1), "upernet_slide", "slide", "probabilities")
    assert torch.equal(outputs.logits.argmax(dim=1), stored["class_map"].long())
    (class_map,) = PiipImageProcessor().post_process_semantic_segmentation(outputs, [case["ori_shape"]])
    assert torch.equal(class_map, stored["rescaled_class_map"][0].long())
    for name, window in (("window0", pixel_values[..., :64, :64]), ("last_window", pixel_values[..., 36:, 86:])):
        assert_matches_head(model(window).logits, "upernet_slide", "slide", f"{name}_logits")


@torch.no_grad()
def test_whole_image():
    case = read_case("upernet_slide")["case"]
    model = build_model("upernet_slide", ToyNetwork(case["ch"]))
    model.config.uper_net.inference_mode = "whole"
    outputs = model(build_pixel_values(case["seed"], case["image"], block=12))
    (output,) = PiipImageProcessor().post_process_semantic_segmentation(
        outputs, [case["ori_shape"]], return_segmentation_scores=True
    )
    assert_matches_head(output.segmentation_scores[None], "upernet_slide", "whole", "rescaled_logits")
    assert torch.equal(output.segmentation, read_tensors("upernet_slide", "whole")["rescaled_class_map"][0].long())


def test_end_to_end():
    name = "e2e_upernet_tiny"
    case = read_case(name)
    config, model_class = convert_config(case["model"] | {"backbone": case["backbone"]})
    with torch.device("meta"):
        model = model_class(config)
    weights = {
        official_name.removeprefix("backbone."): build_weight(official_name, shape)
        for official_name, shape in case["state_dict"].items()
    }
    weights |= build_head_weights(model)
    converted, left_out = convert_state_dict(weights, model)
    assert not left_out
    model.load_state_dict(converted, assign=True)
    model.eval()

    crop_size = config.uper_net.crop_size
    with torch.no_grad():
        crop = build_pixel_values(case["case"]["seed"] + 1, [crop_size, crop_size])
        feature_maps = model.feature_pyramid(model.piip(crop).merged_feature_maps)
        for k, level in enumerate(feature_maps):
            assert_matches_head(level, name, "backbone", f"out{k}")
        assert_matches_head(model.decode_head(feature_maps), name, "backbone", "decode_logits")
        assert_matches_head(model.auxiliary_head(feature_maps), name, "backbone", "aux_logits")
        outputs = model(build_pixel_values(case["case"]["seed"], case["case"]["image"]))
    assert_matches_head(outputs.logits, name, "slide", "averaged_logits")
    (output,) = PiipImageProcessor().post_process_semantic_segmentation(
        outputs, [case["case"]["ori_shape"]], return_segmentation_scores=True
    )
    probabilities = output.segmentation_scores.softmax(dim=0)[None]
    assert_matches_head(probabilities, name, "slide", "probabilities_rescaled")
    assert torch.equal(output.segmentation, read_tensors(name, "slide")["class_map_rescaled"][0].long())
