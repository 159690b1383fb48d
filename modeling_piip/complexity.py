# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Parameters and multiply-adds (FLOPs in the paper's tables) of PIIP networks: one forward pass on the meta device, where
tensors have shapes and no memory, with a counting rule per kind of module.

- `"actual"`: the multiplications of matrices that our forward executes, for one image: linear layers, convolutions,
  attention (padding of windows and the class token included), and the samples of deformable attention. Not counted are
  additions of biases and residuals, norms, activations, softmax and resizing of images, maps and position tables.
- `"official"`: how the paper's #Param and #FLOPs were made, to compare with published numbers. It counts another
  network than the published detectors and segmenters, and attention by formulas; see `count_official`.
"""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .configuration_piip import PYRAMID_LEVELS, PiipBranchConfig, PiipConfig
from .deformable_attention import PiipDeformableAttention
from .modeling_piip import (
    PiipAttention,
    PiipBackbone,
    PiipBranch,
    PiipClassificationHead,
    PiipCrossAttention,
    PiipFeaturePyramid,
    PiipForImageClassification,
    PiipInteraction,
    PiipMerge,
    PiipPreTrainedModel,
)
from .modeling_piip_object_detection import PiipDinoSelfAttention


# Kind of module, name of the operation, and what counts its multiply-adds: rule(module, inputs, output)
Rules = list[tuple[type[nn.Module], str, Callable]]

# Modules below none of these belong to the head
PART_CLASSES = {PiipInteraction: "interactions", PiipMerge: "merge", PiipFeaturePyramid: "pyramid"}


@dataclass
class PiipComplexity:
    r"""
    Args:
        image_size (`tuple[int, int]`):
            Height and width of the counted input.
        parameters (`dict[str, int]`):
            Parameters per part: `"branch_1"` (highest resolution), `"branch_2"` ..., `"interactions"`, `"merge"`,
            `"pyramid"`, and `"head"` if the model has one.
        operations (`dict[str, dict[str, int]]`):
            Multiply-adds per part and kind of operation.
    """

    image_size: tuple[int, int]
    parameters: dict[str, int]
    operations: dict[str, dict[str, int]]

    @property
    def flops(self) -> dict[str, int]:
        """Multiply-adds per part."""
        return {part: sum(counts.values()) for part, counts in self.operations.items()}

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


# ----------------------------------------------------- walking -----------------------------------------------------


def name_parts(model: nn.Module) -> dict[nn.Module, str]:
    """The part of the network that every module belongs to."""
    parts = dict.fromkeys(model.modules(), "head")
    number = 0
    for root in model.modules():
        part = next((name for part_class, name in PART_CLASSES.items() if isinstance(root, part_class)), None)
        if isinstance(root, PiipBranch):
            number += 1
            part = f"branch_{number}"
        if part is not None:
            parts.update(dict.fromkeys(root.modules(), part))
    return parts


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable and frozen parameters per part."""
    counts = Counter()
    for module, part in name_parts(model).items():
        counts[part] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return counts


class ShapesByFormula(TorchFunctionMode):
    """
    Output shapes of functions that PyTorch takes apart into many small ones on the meta device. It changes no count
    and halves the time.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.layer_norm, F.gelu):
            return torch.empty_like(args[0])
        if function is F.grid_sample:
            feature_map, grid = args
            return feature_map.new_empty(*feature_map.shape[:2], *grid.shape[1:-1])
        return function(*args, **(kwargs or {}))


def count_operations(
    model: nn.Module, num_channels: int, image_size: tuple[int, int], rules: Rules
) -> dict[str, dict[str, int]]:
    """Multiply-adds of one image per part and operation. The model is on the meta device and keeps the hooks."""
    counts = defaultdict(Counter)

    def add_hook(module: nn.Module, part: str, operation: str, rule: Callable):
        def count(module, inputs, output):
            counts[part][operation] += rule(module, inputs, output)

        module.register_forward_hook(count)

    for module, part in name_parts(model).items():
        for kind, operation, rule in rules:
            if isinstance(module, kind):
                add_hook(module, part, operation, rule)
    with torch.no_grad(), ShapesByFormula():
        model.eval()(torch.empty(1, num_channels, *image_size, device="meta"))
    return {part: dict(operations) for part, operations in counts.items()}


def build_on_meta(model_class: type[PiipPreTrainedModel], config: PiipConfig) -> PiipPreTrainedModel:
    with torch.device("meta"):
        # a copy: models write into their configuration
        return model_class(copy.deepcopy(config))


def summarize(
    config: PiipConfig,
    image_size: tuple[int, int],
    parameters: dict[str, int],
    operations: dict[str, dict[str, int]],
) -> PiipComplexity:
    """All parts of a network in the order an image runs through them; the head only if there is one."""
    parts = [f"branch_{k + 1}" for k in range(len(config.branches))] + list(PART_CLASSES.values())
    if parameters.get("head") or operations.get("head"):
        parts.append("head")
    return PiipComplexity(
        image_size=image_size,
        parameters={part: parameters.get(part, 0) for part in parts},
        operations={part: operations.get(part, {}) for part in parts},
    )


# ------------------------------------------------------ rules ------------------------------------------------------


def count_linear(module: nn.Linear, inputs, output) -> int:
    return inputs[0].numel() * module.out_features


def count_convolution(module: nn.Conv2d, inputs, output) -> int:
    return output.numel() * module.weight[0].numel()


def count_transposed_convolution(module: nn.ConvTranspose2d, inputs, output) -> int:
    return inputs[0].numel() * module.weight[0].numel()


def get_padded_length(module: PiipAttention, grid_size: tuple[int, int]) -> int:
    """Number of tokens in all windows, padding included."""
    return math.prod(math.ceil(side / module.window_size) * module.window_size for side in grid_size)


def count_self_attention(module: PiipAttention, inputs, output) -> int:
    """Queries times keys and weights times values."""
    hidden_states, grid_size = inputs
    _, length, width = hidden_states.shape
    if module.window_size is None:
        return 2 * length**2 * width
    return 2 * get_padded_length(module, grid_size) * module.window_size**2 * width


def count_query_attention(module: PiipDinoSelfAttention, inputs, output) -> int:
    _, num_queries, width = inputs[0].shape
    return 2 * num_queries**2 * width


def count_cross_attention(module: PiipCrossAttention, inputs, output) -> int:
    hidden_states, features = inputs
    return 2 * hidden_states.shape[1] * features.shape[1] * hidden_states.shape[2]


def count_sampling(module: PiipDeformableAttention, inputs, output) -> int:
    """Every sample is made of four neighbours and enters a weighted sum: five multiply-adds per channel."""
    num_queries = inputs[0].shape[1]
    return 5 * num_queries * module.num_levels * module.num_points * module.value_proj.out_features


ACTUAL_RULES: Rules = [
    (nn.Linear, "linear", count_linear),
    (nn.Conv2d, "convolution", count_convolution),
    (nn.ConvTranspose2d, "convolution", count_transposed_convolution),
    (PiipAttention, "self_attention", count_self_attention),
    (PiipDinoSelfAttention, "self_attention", count_query_attention),
    (PiipCrossAttention, "cross_attention", count_cross_attention),
    (PiipDeformableAttention, "sampling", count_sampling),
]


def count_official_convolution(module: nn.Conv2d, inputs, output) -> int:
    bias = 0 if module.bias is None else output.numel()
    return count_convolution(module, inputs, output) + bias


def count_official_norm(module: nn.Module, inputs, output) -> int:
    return 2 * output.numel()


def count_official_activation(module: nn.Module, inputs, output) -> int:
    return output.numel()


def count_official_self_attention(module: PiipAttention, inputs, output) -> int:
    """Without class token and padding of windows."""
    hidden_states, grid_size = inputs
    length = math.prod(grid_size)
    num_keys = length if module.window_size is None else module.window_size**2
    return 2 * length * num_keys * hidden_states.shape[2]


def correct_official_beit(module: PiipAttention, inputs, output) -> int:
    """
    The official BEiT projects queries, keys and values by a function, which hooks do not see, and the output inside
    the windows, padding included.
    """
    if module.q_bias is None:
        return 0
    hidden_states, grid_size = inputs
    _, length, width = hidden_states.shape
    padded_length = get_padded_length(module, grid_size)
    return (padded_length - length) * width**2 - 3 * padded_length * width**2


def count_official_sampling(module: PiipDeformableAttention, inputs, output) -> int:
    """Four points on the full width, whatever `num_points` and `value_ratio` are."""
    return 5 * 4 * inputs[0].numel()


def count_rest_of_official_head(module: PiipClassificationHead, inputs, output) -> int:
    """The official norm runs over all tokens before the first is picked; ours counts that one itself."""
    if module.pooling != "first" or not isinstance(module.norm, nn.LayerNorm):
        return 0
    return 2 * inputs[0][:, 1:].numel()


OFFICIAL_RULES: Rules = [
    (nn.Linear, "linear", count_linear),
    (nn.Conv2d, "convolution", count_official_convolution),
    (nn.LayerNorm, "norm", count_official_norm),
    (nn.GroupNorm, "norm", count_official_norm),
    (nn.ReLU, "activation", count_official_activation),
    (PiipAttention, "self_attention", count_official_self_attention),
    (PiipAttention, "linear", correct_official_beit),
    (PiipCrossAttention, "cross_attention", count_cross_attention),
    (PiipDeformableAttention, "sampling", count_official_sampling),
    (PiipClassificationHead, "norm", count_rest_of_official_head),
]


# --------------------------------------------------- conventions ---------------------------------------------------


def count_actual(
    config: PiipConfig,
    image_size: tuple[int, int] | None = None,
    model_class: type[PiipPreTrainedModel] = PiipBackbone,
) -> PiipComplexity:
    r"""
    What our forward executes.

    Args:
        config ([`PiipConfig`]):
            Architecture.
        image_size (`tuple[int, int]`, *optional*):
            Height and width of the input; a square of `config.image_size` by default.
        model_class (`type[PiipPreTrainedModel]`, *optional*, defaults to [`PiipBackbone`]):
            Model to count. Of instance segmentation only the operations of the backbone are counted: those of its head
            depend on what is in the image.
    """
    image_size = image_size or (config.image_size, config.image_size)
    model = build_on_meta(model_class, config)
    executed = model if counts_head(model_class) else build_on_meta(PiipBackbone, config)
    operations = count_operations(executed, config.num_channels, image_size, ACTUAL_RULES)
    return summarize(config, image_size, count_parameters(model), operations)


def counts_head(model_class: type[PiipPreTrainedModel]) -> bool:
    """Whether the operations of the head are the same for all images and so can be counted without one."""
    return model_class.__name__ != "PiipForInstanceSegmentation"


def count_official(config: PiipConfig, image_size: tuple[int, int] | None = None) -> PiipComplexity:
    """
    How the paper's #Param and #FLOPs were made; arguments as in `count_actual`. Two scripts were used, see
    `count_by_classification_script` and `count_by_detection_script`.
    """
    image_size = image_size or (config.image_size, config.image_size)
    count = count_by_classification_script if fits_classification_script(config) else count_by_detection_script
    return count(config, image_size)


def fits_classification_script(config: PiipConfig) -> bool:
    """Whether all branches are of the two classes of ViTs that the official classification code has."""
    return all(
        branch.architecture == "vit" and branch.position_embedding_type == "absolute" and not branch.embedding_norm
        for branch in config.branches
    )


def count_by_classification_script(config: PiipConfig, image_size: tuple[int, int]) -> PiipComplexity:
    """
    The numbers of all networks of ViTs, also of detectors and segmenters: their branches and interactions in the
    network for image classification, without feature pyramid and with 1000 classes.
    """
    config = to_classification_network(config)
    model = build_on_meta(PiipForImageClassification, config)
    operations = count_operations(model, config.num_channels, image_size, OFFICIAL_RULES)
    parameters = add_unused_parameters(config, count_parameters(model))
    for number, branch in enumerate(config.branches, start=1):
        # the script builds position tables for its input: one entry per patch
        sides = [side * branch.image_size // config.image_size // branch.patch_size for side in image_size]
        num_missing = math.prod(sides) - branch.position_embedding_grid**2
        parameters[f"branch_{number}"] += num_missing * branch.hidden_size
    return summarize(config, image_size, parameters, operations)


def to_classification_network(config: PiipConfig) -> PiipConfig:
    config = copy.deepcopy(config)
    if config.architectures != ["PiipForImageClassification"]:
        config.num_labels = 1000
    if config.merge_type in ("conv", "single_conv"):
        config.merge_type, config.classification_head = "linear", "merged"
        config.branches = restore_fourth_branch(config.branches)
    config.branches = [
        replace(branch, window_padding="tokens" if is_intern_vit_class(branch) else "qkv")
        for branch in config.branches
    ]
    return config


def restore_fourth_branch(branches: list[PiipBranchConfig]) -> list[PiipBranchConfig]:
    """
    The official four-branch detectors describe a Tiny branch, but their code builds it as wide as the branch before
    (see `build_fourth_branch` in `conversion.py`). The classification code builds the Tiny branch.
    """
    if len(branches) != 4 or branches[0].hidden_size != branches[1].hidden_size:
        return branches
    return [replace(branches[0], hidden_size=192, num_attention_heads=3), *branches[1:]]


def is_intern_vit_class(branch: PiipBranchConfig) -> bool:
    """Whether the official code builds a ViT with its InternViT class, which also serves AugReg, MAE and DINOv2."""
    return branch.drop_path_schedule == "linear" or branch.layer_scale_init_value is None


def count_by_detection_script(config: PiipConfig, image_size: tuple[int, int]) -> PiipComplexity:
    """
    The numbers of networks with ConvNeXt (and the only way to count BEiT and Uni-Perceiver): the parameters of the
    backbone, and its operations up to the merged maps. The feature pyramid is not executed.
    """
    config = copy.deepcopy(config)
    # the official class builds all levels, asked for or not
    config.set_output_features_output_indices(out_features=list(PYRAMID_LEVELS), out_indices=None)
    backbone = build_on_meta(PiipBackbone, config)
    operations = count_operations(backbone.piip, config.num_channels, image_size, OFFICIAL_RULES)
    for number, branch in enumerate(config.branches, start=1):
        if branch.architecture == "convnext":
            # it has a layer norm of its own, which the hooks of the script do not know
            operations[f"branch_{number}"].pop("norm")
    parameters = count_parameters(backbone)
    return summarize(config, image_size, add_unused_parameters(config, parameters), operations)


def add_unused_parameters(config: PiipConfig, parameters: dict[str, int]) -> dict[str, int]:
    """Parameters that the official code builds and never uses."""
    parameters = Counter(parameters)
    for number, branch in enumerate(config.branches, start=1):
        parameters[f"branch_{number}"] += count_unused_parameters(branch)
    return parameters


def count_unused_parameters(branch: PiipBranchConfig) -> int:
    if branch.architecture == "convnext":
        return 2 * branch.hidden_size  # final layer norm
    if branch.position_embedding_type == "absolute" and branch.embedding_norm:
        return 8 * branch.hidden_size  # Uni-Perceiver: table of video frames, whose first row is in our position table
    if branch.position_embedding_type == "absolute" and is_intern_vit_class(branch):
        return branch.hidden_size  # position of the class token
    return 0
