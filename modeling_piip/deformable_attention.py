# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) in plain PyTorch. On GPUs the kernels of
deformable_attention_triton.py replace it where they can run.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .linear import PiipLinear


try:
    from .deformable_attention_triton import attend, find_obstacle
except ImportError as error:
    # Triton is optional, and not made for every platform
    attend, import_error = None, error


logger = logging.get_logger(__name__)


@torch.compiler.assume_constant_result
def can_use_triton() -> bool:
    """Whether the kernels can run on the current GPU. If not, the log says why, once."""
    obstacle = import_error if attend is None else find_obstacle()
    if obstacle is not None:
        logger.warning_once(f"Deformable attention runs in plain PyTorch instead of its faster kernels: {obstacle}.")
    return obstacle is None


def is_for_triton(value: torch.Tensor) -> bool:
    """The kernels have no float64, and add up the gradient of values in any order."""
    return (
        value.is_cuda
        and value.dtype != torch.float64
        and not torch.are_deterministic_algorithms_enabled()
        and can_use_triton()
    )


def check_levels(value: torch.Tensor, spatial_shapes: list[tuple[int, int]], places: torch.Tensor, name: str):
    num_values, num_cells = value.shape[1], sum(height * width for height, width in spatial_shapes)
    if num_cells != num_values or len(spatial_shapes) != places.shape[3]:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} describe {num_cells} cells on {len(spatial_shapes)} levels, but "
            f"`value` has {num_values} cells and `{name}` {places.shape[3]} levels."
        )


# Code from the Hub is loaded once per checkpoint, each time as another module, and every copy has its own operator
@torch.library.custom_op(f"{re.sub('[^a-zA-Z0-9]', '_', __name__)}::grid_sample", mutates_args=())
def opaque_grid_sample(feature_map: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(feature_map, grid, align_corners=False)


@opaque_grid_sample.register_fake
def _(feature_map, grid):
    return feature_map.new_empty(*feature_map.shape[:2], *grid.shape[1:3])


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def grid_sample_backward(ctx, grad_output):
    bilinear, zeros = 0, 0
    return torch.ops.aten.grid_sampler_2d_backward(
        grad_output, *ctx.saved_tensors, bilinear, zeros, False, list(ctx.needs_input_grad)
    )


opaque_grid_sample.register_autograd(grid_sample_backward, setup_context=save_for_backward)


def grid_sample(feature_map: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """
    `F.grid_sample` with zeros outside. The compiler would take it apart; on CPUs what it makes of the parts is some
    30 times slower.
    """
    if grid.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return opaque_grid_sample(feature_map, grid)
    return F.grid_sample(feature_map, grid, align_corners=False)


def sample_levels(
    value: torch.Tensor, spatial_shapes: list[tuple[int, int]], grids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Weighted sum of bilinear samples. `grids` `(batch_size, num_heads, num_levels, num_points, 2, num_queries)` are in
    -1..1 and, as `weights` `(batch_size, num_heads, num_levels, num_points, num_queries)`, contiguous with the queries
    last: `F.grid_sample` is several times faster with points as rows and queries as columns of its output, and reads
    x and y as two planes without a copy.
    """
    batch_size, _, num_heads, head_dim = value.shape
    num_queries = grids.shape[5]
    lengths = [height * width for height, width in spatial_shapes]
    # (batch_size * num_heads, sum(height * width), head_dim): the channels of a head stay side by side in memory
    value_levels = value.to(grids.dtype).transpose(1, 2).flatten(0, 1).split(lengths, dim=1)
    output = grids.new_zeros(())
    for level, ((height, width), level_value) in enumerate(zip(spatial_shapes, value_levels)):
        feature_map = level_value.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        # (batch_size * num_heads, num_points, num_queries, 2)
        grid = grids[:, :, level].flatten(0, 1).transpose(2, 3)
        samples = grid_sample(feature_map, grid)
        weight = weights[:, :, level].flatten(0, 1).unsqueeze(1)
        # point by point, because a product of all samples would be as large as the samples
        for point_samples, point_weight in zip(samples.unbind(dim=2), weight.unbind(dim=2)):
            output = torch.addcmul(output, point_samples, point_weight)
    # (batch_size * num_heads, head_dim, num_queries) -> (batch_size, num_queries, num_heads * head_dim)
    output = output.reshape(batch_size, num_heads * head_dim, num_queries).transpose(1, 2)
    # linear layers are faster on contiguous tokens
    return output.to(value.dtype).contiguous()


def queries_last(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(batch_size, num_queries, ...)` to contiguous `(batch_size, ..., num_queries)`."""
    return tensor.movedim(1, -1).contiguous().to(dtype)


def multi_scale_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    r"""
    Weighted sum of bilinear samples: every query reads `num_points` places on every level.

    Sampling happens in float32 (or float64) whatever the dtype of `value`: coordinates in half precision miss the
    cell, and half-precision `grid_sample` on the CPU is wrong for non-contiguous maps.

    Args:
        value (`torch.Tensor` of shape `(batch_size, sum(height * width), num_heads, head_dim)`):
            Flattened feature maps, one level after the other.
        spatial_shapes (`list[tuple[int, int]]`):
            `(height, width)` of every level.
        sampling_locations (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            Sampled places as (x, y); 0 and 1 are the edges of the map. Outside the map the value is zero.
        attention_weights (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points)`):
            Weight of every sample.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_heads * head_dim)` in the dtype of `value`.

    Raises:
        ValueError: If `spatial_shapes` do not cover `value` or the levels of `sampling_locations`.
    """
    check_levels(value, spatial_shapes, sampling_locations, "sampling_locations")
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = 2 * queries_last(sampling_locations, dtype) - 1
    return sample_levels(value, spatial_shapes, grids, queries_last(attention_weights, dtype))


def attend_around_references(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> torch.Tensor:
    r"""
    `multi_scale_deformable_attention` from what a network predicts: offsets from reference points, and logits.

    Args:
        value (`torch.Tensor` of shape `(batch_size, sum(height * width), num_heads, head_dim)`):
            Flattened feature maps, one level after the other.
        spatial_shapes (`list[tuple[int, int]]`):
            `(height, width)` of every level.
        reference_points (`torch.Tensor` of shape `(batch_size or 1, num_queries, num_levels or 1, 2 or 4)`):
            Centre of each query on each level as (x, y) in 0..1, in float32, or its box as (x, y, width, height).
        sampling_offsets (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points, 2)`):
            Offsets as (x, y) in cells of their level. With boxes, an offset of `num_points` leads from the centre to
            the border of the box.
        attention_logits (`torch.Tensor` of shape `(batch_size, num_queries, num_heads, num_levels, num_points)`):
            Their softmax over levels and points weights the samples.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_heads * head_dim)` in the dtype of `value`.

    Raises:
        ValueError: If `spatial_shapes` do not cover `value` or the levels of `sampling_offsets`.
    """
    check_levels(value, spatial_shapes, sampling_offsets, "sampling_offsets")
    if is_for_triton(value):
        sizes = [side for shape in spatial_shapes for side in shape]
        return attend(value, sampling_offsets, attention_logits, reference_points, sizes)

    dtype = torch.promote_types(value.dtype, torch.float32)
    # (batch_size, num_heads, num_levels, num_points, 2, num_queries)
    offsets = queries_last(sampling_offsets, dtype)
    # (batch_size or 1, 1, num_levels or 1, 1, 2 or 4, num_queries)
    references = queries_last(reference_points, dtype)[:, None, :, None]
    # the map is 2 wide in the coordinates of `F.grid_sample`
    if reference_points.shape[-1] == 4:
        scale = references[..., 2:, :] / offsets.shape[3]
    else:
        scale = references.new_tensor([[2 / width, 2 / height] for height, width in spatial_shapes])[:, None, :, None]
    grids = torch.addcmul(2 * references[..., :2, :] - 1, offsets, scale)
    logits = queries_last(attention_logits, dtype)
    weights = logits.flatten(2, 3).softmax(dim=2).view_as(logits)
    return sample_levels(value, spatial_shapes, grids, weights)


def get_reference_points(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centres of the cells of a grid as (x, y) in 0..1, row by row: float32 of shape `(height * width, 2)`."""
    y = torch.linspace(0.5 / height, 1 - 0.5 / height, height, device=device, dtype=torch.float32)
    x = torch.linspace(0.5 / width, 1 - 0.5 / width, width, device=device, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1)


def get_initial_offset_bias(num_heads: int, num_levels: int, num_points: int) -> torch.Tensor:
    """Start of the sampling offsets: head `m` looks into direction `m`, its points 1, 2, ... cells away."""
    angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    distances = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = directions[:, None, None, :] * distances[None, None, :, None]
    return offsets.expand(-1, num_levels, -1, -1).flatten()


class PiipDeformableAttention(nn.Module):
    r"""
    Attention that reads a few learned places around a reference point instead of the whole map.

    Args:
        hidden_size (`int`):
            Width of queries and output.
        feature_size (`int`):
            Width of the attended features.
        num_heads (`int`):
            Attention heads; must divide the value width `int(hidden_size * value_ratio)`.
        num_points (`int`):
            Samples per query, head and level.
        num_levels (`int`, *optional*, defaults to 1):
            Feature maps that are attended together.
        value_ratio (`float`, *optional*, defaults to 1.0):
            Width of the values relative to `hidden_size`.
    """

    def __init__(
        self,
        hidden_size: int,
        feature_size: int,
        num_heads: int,
        num_points: int,
        num_levels: int = 1,
        value_ratio: float = 1.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        value_size = int(hidden_size * value_ratio)
        if value_size % num_heads != 0:
            raise ValueError(f"`num_heads` ({num_heads}) must divide the width of the values ({value_size}).")
        self.sampling_offsets = PiipLinear(hidden_size, num_heads * num_levels * num_points * 2)
        self.attention_weights = PiipLinear(hidden_size, num_heads * num_levels * num_points)
        self.value_proj = PiipLinear(feature_size, value_size)
        self.output_proj = PiipLinear(value_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: list[tuple[int, int]],
        feature_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_queries, hidden_size)`):
                Queries.
            features (`torch.Tensor` of shape `(batch_size, sum(height * width), feature_size)`):
                Flattened feature maps.
            reference_points (`torch.Tensor` of shape `(batch_size or 1, num_queries, num_levels or 1, 2 or 4)`):
                Centre of each query on each level as (x, y) in 0..1, in float32. With (x, y, width, height) the
                offsets are relative to this box, else they count cells.
            spatial_shapes (`list[tuple[int, int]]`):
                `(height, width)` of every feature map.
            feature_mask (`torch.BoolTensor` of shape `(batch_size, sum(height * width))`, *optional*):
                False where features are padding: their value is zero.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_queries, hidden_size)`.
        """
        value = self.value_proj(features)
        if feature_mask is not None:
            value = value.masked_fill(~feature_mask.unsqueeze(-1), 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        sample_shape = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(hidden_states).unflatten(-1, (*sample_shape, 2))
        logits = self.attention_weights(hidden_states).unflatten(-1, sample_shape)
        return self.output_proj(attend_around_references(value, spatial_shapes, reference_points, offsets, logits))
