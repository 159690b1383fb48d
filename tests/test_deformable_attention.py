"""The deformable attention operator and module against a reference that visits one sample after the other."""

import importlib.util
import math
import sys

import pytest
import torch

from modeling_piip import deformable_attention
from modeling_piip.deformable_attention import (
    PiipDeformableAttention,
    attend_around_references,
    can_use_triton,
    get_initial_offset_bias,
    get_reference_points,
    multi_scale_deformable_attention,
)


def read_bilinear(feature_map: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value of a (height, width, channels) map at a place where 0 and 1 are its edges; zero beyond its cells."""
    height, width, channels = feature_map.shape
    column, row = x * width - 0.5, y * height - 0.5
    result = torch.zeros(channels, dtype=feature_map.dtype)
    for j in (math.floor(row), math.floor(row) + 1):
        for i in (math.floor(column), math.floor(column) + 1):
            if 0 <= j < height and 0 <= i < width:
                result += feature_map[j, i] * (1 - abs(row - j)) * (1 - abs(column - i))
    return result


def naive_attention(value, spatial_shapes, locations, weights):
    batch_size, num_queries, num_heads, _, num_points, _ = locations.shape
    output = torch.zeros(batch_size, num_queries, num_heads, value.shape[-1], dtype=value.dtype)
    for b, q, m in torch.cartesian_prod(*map(torch.arange, (batch_size, num_queries, num_heads))).tolist():
        start = 0
        for level, (height, width) in enumerate(spatial_shapes):
            feature_map = value[b, start : start + height * width, m].reshape(height, width, -1)
            start += height * width
            for p in range(num_points):
                x, y = locations[b, q, m, level, p].tolist()
                output[b, q, m] += weights[b, q, m, level, p] * read_bilinear(feature_map, x, y)
    return output.flatten(2)


def random_inputs(spatial_shapes, batch_size=2, num_queries=5, num_heads=3, head_dim=7, num_points=4, dtype=None):
    """Places from -0.3 to 1.3, so that some lie outside, some half outside the map."""
    generator = torch.Generator().manual_seed(0)
    num_values = sum(height * width for height, width in spatial_shapes)
    value = torch.randn(batch_size, num_values, num_heads, head_dim, generator=generator, dtype=dtype)
    samples = (batch_size, num_queries, num_heads, len(spatial_shapes), num_points)
    locations = torch.rand(*samples, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(samples, generator=generator, dtype=dtype)
    return value, spatial_shapes, locations, weights


SHAPES = {
    "one level": [(6, 5)],
    "three levels": [(6, 5), (3, 4), (1, 2)],
    "one cell": [(1, 1)],
    "one row": [(1, 7)],
}


@pytest.mark.parametrize("spatial_shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("head_dim", [1, 7, 8])
def test_every_sample_is_bilinear_with_zeros_outside(spatial_shapes, head_dim):
    inputs = random_inputs(spatial_shapes, head_dim=head_dim, dtype=torch.float64)
    output = multi_scale_deformable_attention(*inputs)
    # both are sums of the same products in float64, in another order
    torch.testing.assert_close(output, naive_attention(*inputs), rtol=0, atol=1e-12)


def test_places_far_outside_read_zero():
    value, shapes, locations, weights = random_inputs([(6, 5)])
    for place in (-1.0, 2.0, 1e6):
        assert multi_scale_deformable_attention(value, shapes, torch.full_like(locations, place), weights).eq(0).all()


def test_gradients_of_values_locations_and_weights_are_exact():
    value, shapes, locations, weights = random_inputs(
        [(3, 4), (2, 2)], num_queries=2, num_heads=2, head_dim=3, num_points=2, dtype=torch.float64
    )
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: multi_scale_deformable_attention(value, shapes, locations, weights), inputs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_half_precision_values_lose_only_their_rounding(dtype, batch_size):
    value, shapes, locations, weights = random_inputs([(40, 50), (20, 25)], batch_size=batch_size, num_queries=200)
    # as it comes out of a convolution: channels first in memory
    half = value.to(dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not half.is_contiguous()
    output = multi_scale_deformable_attention(half, shapes, locations, weights)
    assert output.dtype == dtype
    # everything inside is float32, so all that remains is the rounding of the inputs and of the output
    expected = multi_scale_deformable_attention(half.float(), shapes, locations, weights)
    torch.testing.assert_close(output, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_shapes_that_do_not_fit_are_named():
    value, shapes, locations, weights = random_inputs([(6, 5), (3, 4)])
    with pytest.raises(ValueError, match=r"\[\(6, 5\), \(3, 3\)\] describe 39 cells on 2 levels, but `value` has 42"):
        multi_scale_deformable_attention(value, [(6, 5), (3, 3)], locations, weights)
    with pytest.raises(ValueError, match="42 cells on 1 levels, but .* `sampling_locations` 2 levels"):
        multi_scale_deformable_attention(value, [(6, 7)], locations, weights)
    with pytest.raises(ValueError, match="42 cells on 1 levels, but .* `sampling_offsets` 2 levels"):
        attend_around_references(value, [(6, 7)], locations[:, :, 0, :, 0], locations, weights)


@pytest.mark.parametrize(("images", "levels"), [(2, 2), (1, 1)], ids=["own references", "shared references"])
def test_offsets_and_logits_become_locations_and_weights(images, levels):
    spatial_shapes = [(6, 5), (3, 4)]
    value, _, _, logits = random_inputs(spatial_shapes, dtype=torch.float64)
    offsets = torch.randn(*logits.shape, 2, dtype=torch.float64)
    weights = logits.flatten(3).softmax(dim=-1).view_as(logits)
    boxes = torch.rand(images, 5, levels, 4, dtype=torch.float64)
    for points, shifts in (
        (boxes[..., :2], offsets / torch.tensor([[5, 6], [4, 3]]).unsqueeze(1)),
        (boxes, offsets * boxes[:, :, None, :, None, 2:] / 8),
    ):
        locations = points[:, :, None, :, None, :2] + shifts
        output = attend_around_references(value, spatial_shapes, points, offsets, logits)
        expected = multi_scale_deformable_attention(value, spatial_shapes, locations, weights)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_reference_points_are_the_centres_of_the_cells_row_by_row():
    points = get_reference_points(2, 4, device=torch.device("cpu"))
    expected = [[(i + 0.5) / 4, (j + 0.5) / 2] for j in range(2) for i in range(4)]
    torch.testing.assert_close(points, torch.tensor(expected))


def test_initial_offsets_look_into_every_direction():
    offsets = get_initial_offset_bias(num_heads=4, num_levels=2, num_points=3).view(4, 2, 3, 2)
    directions = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])
    for level in range(2):
        for point in range(3):
            torch.testing.assert_close(offsets[:, level, point], directions * (point + 1.0))


def test_module_reads_where_its_offsets_point():
    """With the identity as projections and one sample, the output is the map moved by the offset."""
    module = PiipDeformableAttention(hidden_size=2, feature_size=2, num_heads=1, num_points=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.value_proj.weight.copy_(torch.eye(2))
        module.output_proj.weight.copy_(torch.eye(2))
        module.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0]))
    features = torch.randn(1, 3 * 4, 2)
    points = get_reference_points(3, 4, device=features.device)[None, :, None]
    output = module(torch.zeros(1, 3 * 4, 2), features, points, [(3, 4)]).view(3, 4, 2)
    expected = torch.zeros(3, 4, 2)
    expected[:, :-1] = features.view(3, 4, 2)[:, 1:]
    torch.testing.assert_close(output, expected)


def test_offsets_of_boxes_are_relative_to_their_size():
    """An offset of `num_points` leads from the centre of a box to its border, whatever the number of cells."""
    module = PiipDeformableAttention(hidden_size=4, feature_size=4, num_heads=1, num_points=2, num_levels=2)
    queries, features = torch.randn(1, 3, 4), torch.randn(1, 6 * 5 + 3 * 2, 4)
    boxes = torch.rand(1, 3, 2, 4)
    with torch.no_grad():
        module.sampling_offsets.weight.zero_()
        module.sampling_offsets.bias.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]]).repeat(2, 1).flatten())
    value = module.value_proj(features).unflatten(-1, (1, 4))
    weights = module.attention_weights(queries).softmax(dim=-1).view(1, 3, 1, 2, 2)
    shifts = torch.stack((boxes[..., 2:] * torch.tensor([0.5, 0]), boxes[..., 2:] * torch.tensor([0, -0.25])), dim=-2)
    locations = (boxes[..., None, :2] + shifts)[:, :, None]
    expected = module.output_proj(multi_scale_deformable_attention(value, [(6, 5), (3, 2)], locations, weights))
    torch.testing.assert_close(module(queries, features, boxes, [(6, 5), (3, 2)]), expected)


def test_masked_features_have_no_value():
    module = PiipDeformableAttention(hidden_size=4, feature_size=4, num_heads=1, num_points=2)
    module.value_proj.bias.data.normal_()
    features, mask = torch.randn(1, 6 * 5, 4), torch.rand(1, 6 * 5) > 0.5
    points = get_reference_points(6, 5, device=features.device)[None, :, None]
    output = module(features, features, points, [(6, 5)], mask)
    value = (module.value_proj(features) * mask.unsqueeze(-1)).unsqueeze(2)
    module.value_proj = torch.nn.Identity()
    torch.testing.assert_close(module(features, value.squeeze(2), points, [(6, 5)]), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_half_precision_stays_near_float32(dtype):
    torch.manual_seed(0)
    spatial_shapes = [(40, 50), (20, 25)]
    module = PiipDeformableAttention(32, 24, num_heads=4, num_points=3, num_levels=2, value_ratio=0.5).eval()
    features = torch.randn(1, 40 * 50 + 20 * 25, 24)
    queries = torch.randn(1, 30 * 30, 32)
    points = get_reference_points(30, 30, device=features.device)[None, :, None]
    with torch.no_grad():
        expected = module(queries, features, points, spatial_shapes)
        output = module.to(dtype)(queries.to(dtype), features.to(dtype), points, spatial_shapes)
    assert output.dtype == dtype
    # features, projected values, offsets and output are rounded by half an eps each; coordinates are not
    bound = 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert (output.float() - expected).abs().max() < bound


def get_warnings(monkeypatch, module):
    """What `module` logs from now on."""
    messages = []
    monkeypatch.setattr(module.logger, "warning", lambda message: messages.append(message))
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels can run")
@pytest.mark.skipif(deformable_attention.attend is None, reason="Triton is not installed")
def test_kernels_that_cannot_run_are_reported_once(monkeypatch):
    messages = get_warnings(monkeypatch, deformable_attention)
    assert not can_use_triton() and not can_use_triton()
    assert len(messages) == 1 and "plain PyTorch" in messages[0] and "Triton cannot start: " in messages[0]


def test_module_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_piip.deformable_attention_triton", None)
    spec = importlib.util.spec_from_file_location("modeling_piip.without_triton", deformable_attention.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    inputs = random_inputs([(6, 5)])
    torch.testing.assert_close(copy.multi_scale_deformable_attention(*inputs), naive_attention(*inputs))
    messages = get_warnings(monkeypatch, copy)
    assert not copy.can_use_triton() and not copy.can_use_triton()
    assert len(messages) == 1 and "deformable_attention_triton" in messages[0]


def test_choice_of_kernels_is_a_constant_of_compiled_graphs():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + can_use_triton(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == can_use_triton()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"`num_heads` \(5\) must divide the width of the values \(16\)"):
        PiipDeformableAttention(32, 32, num_heads=5, num_points=4, value_ratio=0.5)
