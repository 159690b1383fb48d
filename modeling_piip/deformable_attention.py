# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import nn


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
    batch_size, num_values, num_heads, head_dim = value.shape
    num_queries, num_levels = sampling_locations.shape[1], sampling_locations.shape[3]
    lengths = [height * width for height, width in spatial_shapes]
    if sum(lengths) != num_values or len(lengths) != num_levels:
        raise ValueError(
            f"`spatial_shapes` {spatial_shapes} describe {sum(lengths)} cells on {len(lengths)} levels, but `value` "
            f"has {num_values} cells and `sampling_locations` {num_levels} levels."
        )

    dtype = torch.promote_types(value.dtype, torch.float32)
    # (batch_size, num_queries, num_heads, num_levels, num_points, 2)
    # -> (num_levels, batch_size * num_heads, num_points, num_queries, 2): points as rows are the fast layout
    grids = (2 * sampling_locations.to(dtype) - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    weights = attention_weights.to(dtype).permute(3, 0, 2, 4, 1).flatten(1, 2)
    output = value.new_zeros((), dtype=dtype)
    for (height, width), level_value, grid, weight in zip(
        spatial_shapes, value.to(dtype).split(lengths, dim=1), grids, weights, strict=True
    ):
        # (batch_size, height * width, num_heads, head_dim) -> (batch_size * num_heads, head_dim, height, width)
        feature_map = level_value.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, height, width)
        samples = F.grid_sample(feature_map.contiguous(), grid, align_corners=False)
        output = output + (samples * weight.unsqueeze(1)).sum(dim=2)
    # (batch_size * num_heads, head_dim, num_queries) -> (batch_size, num_queries, num_heads * head_dim)
    output = output.reshape(batch_size, num_heads * head_dim, num_queries).transpose(1, 2)
    return output.to(value.dtype)


def get_reference_points(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centres of the cells of a grid as (x, y) in 0..1, row by row: float32 of shape `(height * width, 2)`."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
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
        self.sampling_offsets = nn.Linear(hidden_size, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_size, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(feature_size, value_size)
        self.output_proj = nn.Linear(value_size, hidden_size)

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
        batch_size, num_queries, _ = hidden_states.shape
        sample_shape = (batch_size, num_queries, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(features)
        if feature_mask is not None:
            value = value.masked_fill(~feature_mask.unsqueeze(-1), 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        weights = self.attention_weights(hidden_states).unflatten(-1, (self.num_heads, -1))
        weights = weights.softmax(dim=-1, dtype=torch.float32).view(sample_shape)
        offsets = self.sampling_offsets(hidden_states).float().view(*sample_shape, 2)
        # (batch_size, num_queries, 1, num_levels, 1, 2 or 4)
        reference_points = reference_points[:, :, None, :, None, :]
        if reference_points.shape[-1] == 4:
            # an offset of `num_points` leads from the centre to the border of the box
            offsets = offsets * reference_points[..., 2:] / (2 * self.num_points)
        else:
            # offsets count cells, so they are divided by (width, height) of their level
            cells = reference_points.new_tensor([[width, height] for height, width in spatial_shapes])
            offsets = offsets / cells[:, None, :]
        locations = reference_points[..., :2] + offsets
        return self.output_proj(multi_scale_deformable_attention(value, spatial_shapes, locations, weights))
