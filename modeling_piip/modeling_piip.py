# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Parameter-Inverted Image Pyramid Networks (PIIP): one image at several resolutions, the largest network on the smallest
image, with interactions between neighbouring branches.

Papers: https://arxiv.org/abs/2406.04330 (NeurIPS 2024) and https://arxiv.org/abs/2501.07783 (TPAMI 2025).
Official code: https://github.com/OpenGVLab/PIIP (MIT license), whose numbers these classes reproduce.
"""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_piip import PiipBranchConfig, PiipConfig
from .deformable_attention import PiipDeformableAttention, get_initial_offset_bias, get_reference_points
from .linear import PiipLinear


if TYPE_CHECKING:
    # Never run. A saved model brings along the files that its own file names in relative imports, at any place and
    # depth: these are the models with heads, so that a folder loads as any of them, whichever class wrote it.
    from .modeling_piip_instance_segmentation import PiipForInstanceSegmentation  # noqa: F401
    from .modeling_piip_object_detection import PiipForObjectDetection  # noqa: F401
    from .modeling_piip_semantic_segmentation import PiipForSemanticSegmentation  # noqa: F401


@dataclass
class PiipModelOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, height * width, hidden_size)`):
            The merged map as a sequence, row by row, on the patch grid of the highest-resolution branch.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            Mean of `last_hidden_state` over the grid.
        merged_feature_maps (`tuple(torch.FloatTensor)`):
            The merged maps of `config.merge_stages` and of the last stage as `(batch_size, channels, height, width)`.
        branch_hidden_states (`tuple(torch.FloatTensor)`):
            Patch tokens of every branch after the last interaction, `(batch_size, num_patches_k, hidden_size_k)`, in
            the order of `config.branches`, without class tokens.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
            Patch tokens of every branch after the embeddings and after every interaction, in one flat tuple:
            `hidden_states[s * num_branches + k]` is branch `k` after `s` interactions.
        attentions (`tuple(torch.FloatTensor)`, *optional*, with `output_attentions=True` and eager attention):
            Attention weights `(batch_size, num_heads_k, sequence_length, sequence_length)` of every layer in the order
            of execution. Windowed layers fold the windows into the batch dimension.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    merged_feature_maps: tuple[torch.FloatTensor, ...] | None = None
    branch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def tokens_to_map(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """`(batch_size, height * width, channels)` -> `(batch_size, channels, height, width)`"""
    # channels last in memory, without a copy; the order of the steps gives a batch of one its proper strides too
    return tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)


def resize_map(feature_map: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize in float32."""
    if feature_map.shape[2:] == grid_size:
        return feature_map
    resized = F.interpolate(feature_map.float(), size=grid_size, mode="bilinear", align_corners=False)
    return resized.to(feature_map.dtype)


def check_pixel_mask(pixel_mask: torch.Tensor | None, pixel_values: torch.Tensor) -> torch.Tensor:
    shape = (pixel_values.shape[0], *pixel_values.shape[2:])
    if pixel_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=pixel_values.device)
    if tuple(pixel_mask.shape) != shape:
        raise ValueError(
            f"`pixel_mask` must have the shape {shape} of the images without their channels, got "
            f"{tuple(pixel_mask.shape)}."
        )
    return pixel_mask


def get_image_names(labels: list[dict[str, torch.Tensor]]) -> list[str]:
    """How errors call the images: by `image_id`, or else by their place in the batch."""
    return [
        f"the image with image_id {int(label['image_id'])}" if "image_id" in label else f"image {k} of the batch"
        for k, label in enumerate(labels)
    ]


def check_predictions(predictions: list[torch.Tensor], labels: list[dict[str, torch.Tensor]]):
    """Refuses NaN and infinities before they reach a loss; the tensors have the images in their first dimension."""
    is_finite = torch.stack([values.isfinite().flatten(1).all(dim=1) for values in predictions]).all(dim=0)
    if not is_finite.all():
        names = [name for name, finite in zip(get_image_names(labels), is_finite.tolist()) if not finite]
        raise ValueError(
            f"The predictions for {', '.join(names)} are NaN or infinite. The weights have diverged or overflow in "
            "float16: lower the learning rate, clip gradients (the official training of DINO does, at 0.1), or train "
            "in bfloat16 or float32."
        )


def check_label(name: str, class_labels: torch.Tensor, boxes: torch.Tensor, num_labels: int):
    if class_labels.is_floating_point() or class_labels.ndim != 1 or boxes.numel() != 4 * len(class_labels):
        raise ValueError(
            f"The labels of {name} do not fit: `class_labels` must be integers of the shape (num_objects,) and "
            f"`boxes` of the shape (num_objects, 4), got {class_labels.dtype} of {tuple(class_labels.shape)} and "
            f"{tuple(boxes.shape)}."
        )
    outside = class_labels[(class_labels < 0) | (class_labels >= num_labels)]
    if len(outside) > 0:
        raise ValueError(
            f"The labels of {name} hold the class id {outside[0].item()}, but the model has {num_labels} classes (ids "
            f"0 to {num_labels - 1}). Set `num_labels` or `id2label` to fit the data."
        )
    # augmentations may leave the image by their rounding
    tolerance = 1e-3
    if not ((boxes >= -tolerance) & (boxes <= 1 + tolerance)).all():
        raise ValueError(
            f"The labels of {name} hold boxes outside 0..1: {boxes.tolist()}. Boxes must be (center x, center y, "
            "width, height) relative to the size of the image without its padding."
        )


def window_partition(tokens: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """
    Cuts the grid into square windows after padding it with zeros at the right and bottom:
    `(batch_size, height * width, channels)` -> `(batch_size * num_windows, window_size ** 2, channels)`.
    """
    height, width = grid_size
    pad_height, pad_width = -height % window_size, -width % window_size
    tokens = tokens.unflatten(1, grid_size)
    if pad_height or pad_width:
        tokens = F.pad(tokens, (0, 0, 0, pad_width, 0, pad_height))
    # (batch_size, rows of windows, window_size, columns of windows, window_size, channels)
    windows = tokens.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    return windows.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def window_unpartition(windows: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """Inverse of `window_partition`; drops the padding."""
    height, width = grid_size
    rows, columns = math.ceil(height / window_size), math.ceil(width / window_size)
    windows = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (window_size, window_size))
    tokens = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return tokens[:, :height, :width].flatten(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; returns `(batch_size, num_queries, num_heads, head_dim)` and the weights."""
    attention_weights = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    attention_weights = attention_weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attention_weights = F.dropout(attention_weights, p=dropout, training=module.training)
    return (attention_weights @ value).transpose(1, 2), attention_weights


class PiipDropPath(nn.Module):
    """Drops the residual of whole samples in training (stochastic depth, https://arxiv.org/abs/1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return hidden_states
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        keep = hidden_states.new_full(shape, 1 - self.rate).bernoulli()
        # the rest is rescaled; divided here, the large tensor is touched only once
        return hidden_states * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class PiipRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized = hidden_states.float()
        normalized = normalized * torch.rsqrt(normalized.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(hidden_states.dtype)


class PiipLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of `(batch_size, channels, height, width)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PiipLinear2d(PiipLinear):
    """Linear layer over the channels of `(batch_size, channels, height, width)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_norm(branch: PiipBranchConfig) -> nn.Module:
    """The norm of a branch."""
    norm_class = PiipRMSNorm if branch.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(branch.hidden_size, eps=branch.layer_norm_eps)


class PiipLayerScale(nn.Module):
    """Learned gain per channel on a residual."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class PiipImagePyramid(nn.Module):
    """
    One copy of the image per branch (paper, section 3.1). The first branch sees the input as it is, the others a
    bilinear copy scaled by the ratio of the nominal sizes.
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.scale_factors = [branch.image_size / config.image_size for branch in config.branches]
        smallest = [
            next(side for side in itertools.count(1) if math.floor(side * factor) >= branch.stride)
            for branch, factor in zip(config.branches, self.scale_factors, strict=True)
        ]
        # Side in pixels that leaves one token to every branch
        self.minimum_size = max(smallest)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [self.resize(pixel_values, factor) for factor in self.scale_factors]

    @staticmethod
    def resize(pixel_values: torch.Tensor, factor: float) -> torch.Tensor:
        if factor == 1:
            return pixel_values
        # The sampling grid must follow the given factor, not the ratio of the rounded sizes
        return F.interpolate(pixel_values, scale_factor=factor, mode="bilinear", align_corners=False)


class PiipEmbeddings(nn.Module):
    """Patches and their positions, and the class token."""

    def __init__(self, config: PiipConfig, branch: PiipBranchConfig):
        super().__init__()
        width = branch.layer_widths[0]
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, width, kernel_size=branch.patch_size, stride=branch.patch_size
        )
        self.position_embeddings = None
        if branch.position_embedding_type == "absolute":
            self.position_grid = (branch.position_embedding_grid, branch.position_embedding_grid)
            self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(self.position_grid), width))
        self.norm = nn.LayerNorm(width, eps=branch.layer_norm_eps) if branch.embedding_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if branch.use_cls_token else None

    def interpolate_position_embeddings(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Position table on another grid: bicubic, in float32."""
        if grid_size == self.position_grid:
            return self.position_embeddings
        table = tokens_to_map(self.position_embeddings.float(), self.position_grid)
        table = F.interpolate(table, size=grid_size, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.position_embeddings.dtype)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
        """Returns patch tokens `(batch_size, height * width, hidden_size)`, class token and `(height, width)`."""
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        grid_size = (patches.shape[2], patches.shape[3])
        # Contiguous tokens: residuals keep the layout of what they are added to, and so would every layer
        hidden_states = patches.flatten(2).transpose(1, 2).contiguous()
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.interpolate_position_embeddings(grid_size)
        hidden_states = self.norm(hidden_states)
        cls_token = None
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(pixel_values.shape[0], -1, -1)
        return hidden_states, cls_token, grid_size


class PiipRelativePositionBias(nn.Module):
    """Learned attention bias per head and distance inside a window (BEiT, https://arxiv.org/abs/2106.08254)."""

    def __init__(self, window_size: int, num_heads: int):
        super().__init__()
        self.window_size = window_size
        self.table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def forward(self) -> torch.Tensor:
        """Returns `(1, num_heads, window_size ** 2, window_size ** 2)`, queries before keys."""
        position = torch.arange(self.window_size, device=self.table.device)
        # distance from key to query along one axis, shifted to start at 0
        distance = position[:, None] - position[None, :] + self.window_size - 1
        # (query row, query column, key row, key column)
        index = distance[:, None, :, None] * (2 * self.window_size - 1) + distance[None, :, None, :]
        bias = self.table[index.flatten(2, 3).flatten(0, 1)]
        return bias.permute(2, 0, 1).unsqueeze(0)


class PiipAttention(nn.Module):
    """Self-attention of a ViT layer, global or in windows."""

    def __init__(self, config: PiipConfig, branch: PiipBranchConfig, window_size: int | None):
        super().__init__()
        self.config = config
        self.num_heads = branch.num_attention_heads
        self.scaling = (branch.hidden_size // branch.num_attention_heads) ** -0.5
        self.is_causal = False
        self.window_size = window_size
        self.window_padding = branch.window_padding
        self.qkv = PiipLinear(branch.hidden_size, 3 * branch.hidden_size, bias=branch.qkv_bias is True)
        if branch.qkv_bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(branch.hidden_size))
            self.v_bias = nn.Parameter(torch.zeros(branch.hidden_size))
        else:
            self.q_bias = self.v_bias = None
        self.q_norm = build_norm(branch) if branch.qk_norm else nn.Identity()
        self.k_norm = build_norm(branch) if branch.qk_norm else nn.Identity()
        self.relative_position_bias = None
        if branch.position_embedding_type == "relative":
            self.relative_position_bias = PiipRelativePositionBias(window_size, branch.num_attention_heads)
        self.projection = PiipLinear(branch.hidden_size, branch.hidden_size)

    def project(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Queries, keys and values side by side, cut into windows if there are any."""
        if self.window_size is not None and self.window_padding == "tokens":
            hidden_states = window_partition(hidden_states, grid_size, self.window_size)
        qkv = self.qkv(hidden_states)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if self.window_size is not None and self.window_padding == "qkv":
            qkv = window_partition(qkv, grid_size, self.window_size)
        return qkv

    def forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int], **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project(hidden_states, grid_size).chunk(3, dim=-1)
        # (batch_size, sequence_length, hidden_size) -> (batch_size, num_heads, sequence_length, head_dim)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_norm(query), self.k_norm(key), value)
        )
        implementation, bias = self.config._attn_implementation, None
        if self.relative_position_bias is not None:
            bias = self.relative_position_bias().to(query.dtype)
            # flash and flex kernels take no additive bias
            implementation = "eager" if implementation == "eager" else "sdpa"
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, attention_weights = attention_interface(self, query, key, value, bias, scaling=self.scaling, **kwargs)
        context = context.flatten(2)
        if self.window_size is not None:
            context = window_unpartition(context, grid_size, self.window_size)
        return self.projection(context), attention_weights


class PiipMLP(nn.Module):
    def __init__(self, branch: PiipBranchConfig):
        super().__init__()
        self.fc1 = PiipLinear(branch.hidden_size, branch.intermediate_size)
        self.activation = ACT2FN[branch.hidden_act]
        self.fc2 = PiipLinear(branch.intermediate_size, branch.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class PiipViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer; its options cover the ViTs of the published models."""

    def __init__(self, config: PiipConfig, branch: PiipBranchConfig, index: int):
        super().__init__()
        self.norm1 = build_norm(branch)
        self.attention = PiipAttention(config, branch, branch.window_sizes[index])
        self.norm2 = build_norm(branch)
        self.mlp = PiipMLP(branch)
        init_value = branch.layer_scale_init_value
        self.layer_scale1 = nn.Identity() if init_value is None else PiipLayerScale(branch.hidden_size, init_value)
        self.layer_scale2 = nn.Identity() if init_value is None else PiipLayerScale(branch.hidden_size, init_value)
        self.drop_path = PiipDropPath(branch.drop_path_rates[index])

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int], **kwargs) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), grid_size, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))


class PiipConvNextLayer(GradientCheckpointingLayer):
    """ConvNeXt block (https://arxiv.org/abs/2201.03545) on `(batch_size, channels, height, width)`."""

    def __init__(self, branch: PiipBranchConfig, width: int, drop_path_rate: float):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=branch.layer_norm_eps)
        self.fc1 = PiipLinear(width, 4 * width)
        self.activation = nn.GELU()
        self.fc2 = PiipLinear(4 * width, width)
        init_value = branch.layer_scale_init_value
        self.layer_scale = nn.Identity() if init_value is None else PiipLayerScale(width, init_value)
        self.drop_path = PiipDropPath(drop_path_rate)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        hidden_states = self.depthwise_conv(feature_map).permute(0, 2, 3, 1)
        hidden_states = self.fc2(self.activation(self.fc1(self.norm(hidden_states))))
        hidden_states = self.layer_scale(hidden_states).permute(0, 3, 1, 2)
        return feature_map + self.drop_path(hidden_states)


class PiipConvNextDownsample(GradientCheckpointingLayer):
    """Halves the grid between the stages of a ConvNeXt."""

    def __init__(self, branch: PiipBranchConfig, in_width: int, out_width: int):
        super().__init__()
        self.norm = PiipLayerNorm2d(in_width, eps=branch.layer_norm_eps)
        self.conv = nn.Conv2d(in_width, out_width, kernel_size=2, stride=2)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(feature_map))


class PiipBranch(nn.Module):
    """One network of the pyramid, run stage by stage."""

    def __init__(self, config: PiipConfig, branch: PiipBranchConfig):
        super().__init__()
        self.embeddings = PiipEmbeddings(config, branch)
        self.layers = nn.ModuleList(self.build_layers(config, branch))
        ends = [sum(branch.stages[: stage + 1]) for stage in range(len(branch.stages))]
        self.stage_layers = [range(end - length, end) for end, length in zip(ends, branch.stages, strict=True)]

    @staticmethod
    def build_layers(config: PiipConfig, branch: PiipBranchConfig) -> list[nn.Module]:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        cls_token: torch.Tensor | None,
        grid_size: tuple[int, int],
        stage: int,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
        """Runs the layers of a stage; returns patch tokens, class token and `(height, width)` of the grid."""
        raise NotImplementedError


class PiipViTBranch(PiipBranch):
    """Vision Transformer; the class token stands in front of the patch tokens inside the stages."""

    @staticmethod
    def build_layers(config: PiipConfig, branch: PiipBranchConfig) -> list[nn.Module]:
        return [PiipViTLayer(config, branch, index) for index in range(branch.num_hidden_layers)]

    def forward(self, hidden_states, cls_token, grid_size, stage, **kwargs):
        if cls_token is not None:
            hidden_states = torch.cat((cls_token, hidden_states), dim=1)
        for index in self.stage_layers[stage]:
            hidden_states = self.layers[index](hidden_states, grid_size, **kwargs)
        if cls_token is not None:
            cls_token, hidden_states = hidden_states[:, :1], hidden_states[:, 1:].contiguous()
        return hidden_states, cls_token, grid_size


class PiipConvNextBranch(PiipBranch):
    """ConvNeXt as one list of layers; width and grid change at its downsampling layers."""

    @staticmethod
    def build_layers(config: PiipConfig, branch: PiipBranchConfig) -> list[nn.Module]:
        layers, rates = [], iter(branch.drop_path_rates)
        for k, (depth, width) in enumerate(zip(branch.depths, branch.hidden_sizes, strict=True)):
            if k > 0:
                layers.append(PiipConvNextDownsample(branch, branch.hidden_sizes[k - 1], width))
            layers.extend(PiipConvNextLayer(branch, width, next(rates)) for _ in range(depth))
        return layers

    def forward(self, hidden_states, cls_token, grid_size, stage, **kwargs):
        feature_map = tokens_to_map(hidden_states, grid_size)
        for index in self.stage_layers[stage]:
            feature_map = self.layers[index](feature_map)
        return feature_map.flatten(2).transpose(1, 2), cls_token, (feature_map.shape[2], feature_map.shape[3])


BRANCH_CLASSES = {"vit": PiipViTBranch, "convnext": PiipConvNextBranch}


class PiipCrossAttention(nn.Module):
    """Plain attention of one branch to all tokens of another; the alternative to `PiipDeformableAttention`."""

    def __init__(self, config: PiipConfig, hidden_size: int, feature_size: int):
        super().__init__()
        self.config = config
        self.num_heads = config.interaction_num_heads
        self.scaling = (hidden_size // config.interaction_num_heads) ** -0.5
        self.is_causal = False
        self.query = PiipLinear(hidden_size, hidden_size, bias=False)
        self.key = PiipLinear(feature_size, hidden_size, bias=False)
        self.value = PiipLinear(feature_size, hidden_size, bias=False)
        self.projection = PiipLinear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(hidden_states), self.key(features), self.value(features))
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, _ = attention_interface(self, query, key, value, None, scaling=self.scaling)
        return self.projection(context.flatten(2))


class PiipConvFFN(nn.Module):
    """Feed-forward network with a depthwise convolution on the grid of the branch."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = PiipLinear(hidden_size, intermediate_size)
        self.depthwise_conv = nn.Conv2d(
            intermediate_size, intermediate_size, kernel_size=3, padding=1, groups=intermediate_size
        )
        self.activation = nn.GELU()
        self.fc2 = PiipLinear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        feature_map = self.depthwise_conv(tokens_to_map(self.fc1(hidden_states), grid_size))
        return self.fc2(self.activation(feature_map.flatten(2).transpose(1, 2)))


class PiipInjector(nn.Module):
    """
    Adds what one branch sees to the tokens of another (paper, section 3.3). Both residuals start with a gate of zero,
    so that a new pyramid begins as independent branches.
    """

    def __init__(self, config: PiipConfig, hidden_size: int, feature_size: int):
        super().__init__()
        eps = config.layer_norm_eps
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps) if config.interaction_norm else nn.Identity()
        self.feature_norm = nn.LayerNorm(feature_size, eps=eps) if config.interaction_norm else nn.Identity()
        if config.interaction_attention == "deformable":
            self.attention = PiipDeformableAttention(
                hidden_size,
                feature_size,
                num_heads=config.interaction_num_heads,
                num_points=config.interaction_num_points,
                value_ratio=config.interaction_value_ratio,
            )
        else:
            self.attention = PiipCrossAttention(config, hidden_size, feature_size)
        self.attention_gate = nn.Parameter(torch.zeros(hidden_size))

        intermediate_size = int(hidden_size * config.interaction_ffn_ratio)
        self.ffn = PiipConvFFN(hidden_size, intermediate_size) if intermediate_size else None
        if self.ffn is not None:
            self.ffn_norm = nn.LayerNorm(hidden_size, eps=eps) if config.interaction_norm else nn.Identity()
            self.ffn_gate = nn.Parameter(torch.zeros(hidden_size))
            self.drop_path = PiipDropPath(config.interaction_drop_path_rate)

    def attend(
        self, query: torch.Tensor, features: torch.Tensor, query_grid: tuple[int, int], feature_grid: tuple[int, int]
    ) -> torch.Tensor:
        if isinstance(self.attention, PiipCrossAttention):
            return self.attention(query, features)
        reference_points = get_reference_points(*query_grid, device=query.device)[None, :, None, :]
        return self.attention(query, features, reference_points, [feature_grid])

    def forward(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        query_grid: tuple[int, int],
        feature_grid: tuple[int, int],
    ) -> torch.Tensor:
        attended = self.attend(self.query_norm(hidden_states), self.feature_norm(features), query_grid, feature_grid)
        hidden_states = hidden_states + self.attention_gate * attended
        if self.ffn is None:
            return hidden_states
        return hidden_states + self.ffn_gate * self.drop_path(self.ffn(self.ffn_norm(hidden_states), query_grid))


class PiipInteractionUnit(GradientCheckpointingLayer):
    """
    Two neighbouring branches exchange features in both directions. `fine` is the branch with the higher resolution,
    `coarse` the one with the larger network. Both directions start from the incoming tokens.
    """

    def __init__(self, config: PiipConfig, fine_size: int, coarse_size: int):
        super().__init__()
        if config.interaction_projection:
            self.fine_to_coarse_projection = PiipLinear(fine_size, coarse_size)
            self.coarse_to_fine_projection = PiipLinear(coarse_size, fine_size)
            self.fine_to_coarse = PiipInjector(config, coarse_size, coarse_size)
            self.coarse_to_fine = PiipInjector(config, fine_size, fine_size)
        else:
            self.fine_to_coarse_projection = nn.Identity()
            self.coarse_to_fine_projection = nn.Identity()
            self.fine_to_coarse = PiipInjector(config, coarse_size, fine_size)
            self.coarse_to_fine = PiipInjector(config, fine_size, coarse_size)

    def forward(
        self,
        fine: torch.Tensor,
        coarse: torch.Tensor,
        fine_grid: tuple[int, int],
        coarse_grid: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fine_features = self.fine_to_coarse_projection(fine)
        coarse_features = self.coarse_to_fine_projection(coarse)
        return (
            self.coarse_to_fine(fine, coarse_features, fine_grid, coarse_grid),
            self.fine_to_coarse(coarse, fine_features, coarse_grid, fine_grid),
        )


class PiipInteraction(nn.Module):
    """Interaction units of a stage, one after the other from the highest-resolution pair to the lowest."""

    def __init__(self, config: PiipConfig, stage: int):
        super().__init__()
        sizes = [branch.stage_widths[stage] for branch in config.branches]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.units = nn.ModuleList([PiipInteractionUnit(config, fine, coarse) for fine, coarse in pairs])

    def forward(self, branch_tokens: list[torch.Tensor], grid_sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        branch_tokens = list(branch_tokens)
        for k, unit in enumerate(self.units):
            branch_tokens[k], branch_tokens[k + 1] = unit(
                branch_tokens[k], branch_tokens[k + 1], grid_sizes[k], grid_sizes[k + 1]
            )
        return branch_tokens


def build_merge_layers(
    merge_type: str, in_size: int, out_size: int, num_groups: int, is_last: bool
) -> list[nn.Module]:
    """What brings the map of one branch to the width of the last branch, which itself needs less."""
    if merge_type == "conv":
        return [*build_merge_conv(in_size, out_size, num_groups), *build_merge_conv(out_size, out_size, num_groups)]
    if merge_type == "single_conv":
        layers = build_merge_conv(in_size, out_size, num_groups)
        return layers[1:] if is_last else layers
    if is_last:
        return [nn.GroupNorm(num_groups, out_size)]
    return [nn.GroupNorm(num_groups, in_size), PiipLinear2d(in_size, out_size), nn.GroupNorm(num_groups, out_size)]


def build_merge_conv(in_size: int, out_size: int, num_groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_size, out_size, kernel_size=3, padding=1, bias=False)
    return [conv, nn.GroupNorm(num_groups, out_size), nn.ReLU()]


class PiipMergeBranch(nn.Module):
    """Brings the map of one branch to the merged map, with one learned weight for the whole branch."""

    def __init__(self, config: PiipConfig, stage: int, index: int):
        super().__init__()
        sizes = [branch.stage_widths[stage] for branch in config.branches]
        is_last = index == len(sizes) - 1
        layers = build_merge_layers(config.merge_type, sizes[index], sizes[-1], config.num_groups, is_last)
        self.layers = nn.Sequential(*layers)
        # of shape (1,): sharded training cannot split a parameter without dimensions
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, feature_map: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        return self.scale * resize_map(self.layers(feature_map), grid_size)


class PiipMerge(nn.Module):
    """
    One map out of all branches, on the grid of the highest-resolution branch (paper, section 3.4): the weighted sum of
    the projected branches, or without parameters their concatenation.
    """

    def __init__(self, config: PiipConfig, stage: int):
        super().__init__()
        self.branches = None
        if config.merge_type != "concat":
            num_branches = len(config.branches)
            self.branches = nn.ModuleList([PiipMergeBranch(config, stage, index) for index in range(num_branches)])

    def forward(self, branch_tokens: list[torch.Tensor], grid_sizes: list[tuple[int, int]]) -> torch.Tensor:
        maps = [tokens_to_map(tokens, grid) for tokens, grid in zip(branch_tokens, grid_sizes, strict=True)]
        if self.branches is None:
            return torch.cat([resize_map(feature_map, grid_sizes[0]) for feature_map in maps], dim=1)
        return sum(branch(feature_map, grid_sizes[0]) for branch, feature_map in zip(self.branches, maps, strict=True))


class PiipDownsample(nn.Module):
    """Maximum of 2x2 cells; an axis with a single cell stays as it is."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        kernel_size = [min(2, side) for side in feature_map.shape[2:]]
        return F.max_pool2d(feature_map, kernel_size, stride=2)


class PiipFeaturePyramid(nn.Module):
    """
    Maps of strides 4, 8, 16 and 32 out of the merged maps, for a patch size of 16: "p2" four and "p3" two times as
    fine as its merged map, "p4" the map itself, "p5" half as fine. All levels come from the last merged map (simple
    feature pyramid, https://arxiv.org/abs/2203.16527), or each from its own (regular pyramid). On the grid of a
    ConvNeXt the merged maps have these strides already. Only the levels of `config.out_features` exist.
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        is_convnext = config.branches[0].architecture == "convnext"
        if is_convnext and config.merge_stages is None:
            raise ValueError(
                "The feature pyramid of a PIIP network with a ConvNeXt as its first branch needs `merge_stages`: the "
                "three stages that end with strides 4, 8 and 16."
            )
        # index of the merged map of every level
        self.sources = [k if config.merge_stages else 0 for k in config.out_indices]
        self.levels = nn.ModuleDict()
        for level, source in zip(config.out_features, self.sources, strict=True):
            size = config.merged_sizes[source]
            self.levels[level] = nn.Identity() if is_convnext else self.build_level(config, level, size)

    @staticmethod
    def build_level(config: PiipConfig, level: str, size: int) -> nn.Module:
        if level == "p5":
            return PiipDownsample()
        if level == "p4":
            return nn.Identity()
        if level == "p3":
            return nn.ConvTranspose2d(size, size, kernel_size=2, stride=2)
        if config.pyramid_norm == "layer":
            norm = PiipLayerNorm2d(size, eps=config.layer_norm_eps)
        elif size % config.num_groups == 0:
            norm = nn.GroupNorm(config.num_groups, size)
        else:
            raise ValueError(
                f'`num_groups` ({config.num_groups}) must divide the width {size} of the merged map that level "p2" '
                'is made of. Change it, set `pyramid_norm="layer"`, or choose other `out_features`.'
            )
        return nn.Sequential(
            nn.ConvTranspose2d(size, size, kernel_size=2, stride=2),
            norm,
            nn.GELU(),
            nn.ConvTranspose2d(size, size, kernel_size=2, stride=2),
        )

    def forward(self, merged_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(level(merged_maps[k]) for level, k in zip(self.levels.values(), self.sources, strict=True))


class PiipPreTrainedModel(PreTrainedModel):
    """Weight initialization, and what PIIP models can do in the Transformers library."""

    config: PiipConfig
    config_class = PiipConfig
    base_model_prefix = "piip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # the losses are means over the batch: Trainer must divide them by the gradient accumulation steps itself
    accepts_loss_kwargs = False
    _no_split_modules = [
        "PiipEmbeddings",
        "PiipViTLayer",
        "PiipConvNextLayer",
        "PiipConvNextDownsample",
        "PiipInteractionUnit",
        "PiipMerge",
        "PiipFeaturePyramid",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": PiipAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):  # noqa: C901 - one case per kind of module
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, PiipEmbeddings):
            init.trunc_normal_(module.patch_embeddings.weight, std=std)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)
        elif isinstance(module, PiipAttention) and module.q_bias is not None:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, PiipRelativePositionBias):
            init.zeros_(module.table)
        elif isinstance(module, PiipLayerScale):
            init.constant_(module.weight, module.init_value)
        elif isinstance(module, PiipDeformableAttention):
            init.zeros_(module.sampling_offsets.weight)
            bias = get_initial_offset_bias(module.num_heads, module.num_levels, module.num_points)
            init.copy_(module.sampling_offsets.bias, bias)
            init.zeros_(module.attention_weights.weight)
            init.xavier_uniform_(module.value_proj.weight)
            init.xavier_uniform_(module.output_proj.weight)
        elif isinstance(module, PiipInjector):
            init.zeros_(module.attention_gate)
            if module.ffn is not None:
                init.zeros_(module.ffn_gate)
        elif isinstance(module, PiipMergeBranch):
            init.ones_(module.scale)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # In code outside the library Transformers takes a module without parameters of its own for initialized and
        # skips what `_init_weights` does to the layers inside it. That protects loaded weights from functions that do
        # not know of them; those of `transformers.initialization`, which are used here, do.
        super()._initialize_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in every Transformers model, but a damaged file is reported with the place it came from."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are truncated or damaged ({error}): download or save "
                "them again."
            ) from error

    @classmethod
    def from_pretrained_branches(
        cls, config: PiipConfig, sources: list[str | os.PathLike | None]
    ) -> "PiipPreTrainedModel":
        r"""
        A model whose branches start from pretrained single networks; everything else is new. Position
        tables and patch kernels are resized bicubically. A warning tells what was used and what was left new.

        Args:
            config ([`PiipConfig`]):
                Architecture. A branch must have the width, depth, heads and MLP of its source. Where the source has
                no layer scale, `layer_scale_init_value=1.0` (or `None`) makes the branch begin as the source.
            sources (`list[str | os.PathLike | None]`):
                One per branch, in the order of `config.branches`: the timm name of a plain ViT, BEiT or ConvNeXt, a
                folder or Hub id of a Transformers ViT, DeiT, ViTMAE, Dinov2, Dinov2WithRegisters, Beit or ConvNext, a
                local `.safetensors`, `.pth`, `.pt` or `.bin` file (also of Uni-Perceiver), or `None` to leave the
                branch at its initialization.

        Raises:
            ValueError: If a source is unknown or does not fit its branch; the message names weights and remedy.

        Example:

        ```python
        >>> from modeling_piip import PiipConfig, PiipForImageClassification

        >>> sources = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
        >>> model = PiipForImageClassification.from_pretrained_branches(PiipConfig(num_labels=10), sources)
        ```
        """
        from .branch_weights import load_branches

        model = cls(config)
        load_branches(model, sources)
        return model


class PiipModel(PiipPreTrainedModel):
    r"""
    The bare PIIP network: image pyramid, branches with their interactions, merged map.

    Args:
        config ([`PiipConfig`]):
            Architecture. Weights are initialized from it; load trained ones with `from_pretrained`.
    """

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        self.image_pyramid = PiipImagePyramid(config)
        self.branches = nn.ModuleList(
            [BRANCH_CLASSES[branch.architecture](config, branch) for branch in config.branches]
        )
        num_interactions = config.num_stages if len(config.branches) > 1 else 0
        self.interactions = nn.ModuleList([PiipInteraction(config, stage) for stage in range(num_interactions)])
        self.merges = nn.ModuleList([PiipMerge(config, stage) for stage in config.all_merge_stages])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.branches[0].embeddings.patch_embeddings

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PiipModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images at the resolution of the first branch. Any size works that leaves at least one
                token to every branch.
            output_hidden_states (`bool`, *optional*):
                Whether to return the tokens of every branch after every interaction. Defaults to the config.

        Raises:
            ValueError: If the images have the wrong shape or are too small for a branch.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self.check_pixel_values(pixel_values)

        branch_tokens, cls_tokens, grid_sizes = [], [], []
        for branch, image in zip(self.branches, self.image_pyramid(pixel_values), strict=True):
            tokens, cls_token, grid_size = branch.embeddings(image)
            branch_tokens.append(tokens)
            cls_tokens.append(cls_token)
            grid_sizes.append(grid_size)
        all_hidden_states = list(branch_tokens)

        merged_maps = []
        for stage in range(self.config.num_stages):
            for k, branch in enumerate(self.branches):
                branch_tokens[k], cls_tokens[k], grid_sizes[k] = branch(
                    branch_tokens[k], cls_tokens[k], grid_sizes[k], stage, **kwargs
                )
            if len(self.interactions) > 0:
                branch_tokens = self.interactions[stage](branch_tokens, grid_sizes)
            all_hidden_states.extend(branch_tokens)
            if stage in self.config.all_merge_stages:
                merged_maps.append(self.merges[len(merged_maps)](branch_tokens, grid_sizes))

        last_hidden_state = merged_maps[-1].flatten(2).transpose(1, 2)
        return PiipModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=1),
            merged_feature_maps=tuple(merged_maps),
            branch_hidden_states=tuple(branch_tokens),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def check_pixel_values(self, pixel_values: torch.Tensor):
        shape = tuple(pixel_values.shape)
        num_channels = self.config.num_channels
        if pixel_values.ndim != 4 or shape[1] != num_channels:
            hint = " They seem to have the channels last: permute them." if shape[-1] == num_channels else ""
            raise ValueError(
                f"`pixel_values` must have the shape (batch_size, {num_channels}, height, width), got {shape}.{hint}"
            )
        # exported programs keep the batch size free
        if not torch.compiler.is_compiling() and shape[0] == 0:
            raise ValueError(f"`pixel_values` of shape {shape} are an empty batch: pass at least one image.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be normalized floating point images, got {pixel_values.dtype}: use "
                "`PiipImageProcessor`."
            )
        minimum = self.image_pyramid.minimum_size
        if min(shape[2:]) < minimum:
            raise ValueError(
                f"Images of {shape[2]}x{shape[3]} pixels are too small: a branch would get less than one token. "
                f"Height and width must be at least {minimum}."
            )


class PiipBackbone(BackboneMixin, PiipPreTrainedModel):
    r"""
    PIIP as a backbone for dense prediction, with the feature pyramid of the official detectors and segmenters. It
    serves any model that takes a `backbone_config`.

    Args:
        config ([`PiipConfig`]):
            Architecture; `out_features` or `out_indices` choose the levels.
    """

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        self.piip = PiipModel(config)
        self.feature_pyramid = PiipFeaturePyramid(config)
        sizes = config.merged_sizes
        self.num_features = sizes if config.merge_stages else sizes * len(self.stage_names)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.piip.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images at the resolution of the first branch.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`]: `feature_maps` holds one
            `(batch_size, hidden_size, height_l, width_l)` map per level of `config.out_features`, in their order.
        """
        outputs = self.piip(pixel_values, **kwargs)
        return BackboneOutput(
            feature_maps=self.feature_pyramid(outputs.merged_feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PiipClassificationHead(nn.Module):
    """Norm, pooling and linear classifier on a sequence of tokens."""

    def __init__(self, norm: nn.Module, hidden_size: int, num_labels: int, pooling: str):
        super().__init__()
        self.norm = norm
        self.pooling = pooling
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.pooling == "first":
            return self.linear(self.norm(hidden_states[:, 0]))
        return self.linear(self.norm(hidden_states).mean(dim=1))


class PiipForImageClassification(PiipPreTrainedModel):
    r"""
    PIIP with an image classification head: either one classifier per branch on its first patch token with averaged
    logits, as in the published models, or one classifier on the mean of the merged map.

    Args:
        config ([`PiipConfig`]):
            Architecture; `classification_head` chooses the head and `num_labels` or `id2label` the classes.
    """

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        self.piip = PiipModel(config)
        if config.classification_head == "branches":
            heads = [
                PiipClassificationHead(build_norm(branch), branch.hidden_size, config.num_labels, pooling="first")
                for branch in config.branches
            ]
        else:
            norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            heads = [PiipClassificationHead(norm, config.hidden_size, config.num_labels, pooling="mean")]
        self.classifiers = nn.ModuleList(heads)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images at the resolution of the first branch.
            labels (`torch.Tensor`, *optional*):
                Class ids of shape `(batch_size,)`; with `config.problem_type="single_label_classification"` also class
                probabilities of shape `(batch_size, num_labels)`, as mixup makes them. Other problem types as in
                every Transformers classifier.

        Raises:
            ValueError: If a class id is not in `0 .. num_labels - 1`.
        """
        outputs = self.piip(pixel_values, **kwargs)
        sequences = [outputs.last_hidden_state]
        if self.config.classification_head == "branches":
            sequences = outputs.branch_hidden_states
        logits = [head(sequence) for head, sequence in zip(self.classifiers, sequences, strict=True)]
        logits = sum(logits) / len(logits)
        return ImageClassifierOutput(
            loss=None if labels is None else self.compute_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.is_floating_point():
            if self.config.problem_type == "single_label_classification":
                return F.cross_entropy(logits.float(), labels.float())
        elif self.config.problem_type != "multi_label_classification" and not torch.compiler.is_compiling():
            self.check_labels(labels)
        return self.loss_function(labels, logits, self.config)

    def check_labels(self, labels: torch.Tensor):
        num_labels = self.config.num_labels
        outside = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
        if num_labels > 1 and len(outside) > 0:
            raise ValueError(
                f"`labels` hold the class id {outside[0].item()}, but the model has {num_labels} classes (ids 0 to "
                f"{num_labels - 1}). Set `num_labels` or `id2label` to fit the data."
            )


PiipModel.register_for_auto_class("AutoModel")
PiipBackbone.register_for_auto_class("AutoBackbone")
PiipForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["PiipBackbone", "PiipForImageClassification", "PiipModel", "PiipModelOutput", "PiipPreTrainedModel"]
