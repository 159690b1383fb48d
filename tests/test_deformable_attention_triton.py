"""
The kernels of deformable attention against the plain PyTorch path in float64. With a GPU the tests run there; without
one they run in Triton's interpreter, in a process of their own, because Triton reads its switch when it is imported:
`TRITON_INTERPRET=1 pytest tests/test_deformable_attention_triton.py` starts them directly.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from modeling_piip import deformable_attention
from modeling_piip.deformable_attention import PiipDeformableAttention, attend_around_references, get_reference_points


triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from modeling_piip import deformable_attention_triton  # noqa: E402
from modeling_piip.deformable_attention_triton import (  # noqa: E402
    NAMESPACE,
    SIZES,
    attend,
    backward_kernel,
    forward_kernel,
)


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not IS_INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    not (HAS_GPU or IS_INTERPRETED), reason="no GPU: test_kernels_are_correct_in_the_interpreter runs it"
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the interpreter")
def test_kernels_are_correct_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"])
def test_kernels_compile_for_gpus_that_are_not_there(kernel, dtype, monkeypatch, tmp_path):
    """The interpreter accepts things that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"NUM_HEADS": 4, "HEAD_DIM": 6, "NUM_LEVELS": 2, "NUM_POINTS": 3, "HAS_BOXES": True}
    constants |= {"NEEDS_REFERENCES": True, "BLOCK_ROWS": 32, "BLOCK_DIM": 8, "BLOCK_SAMPLES": 8}
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("references", "grad_references", "grad_value"), "*fp32")
    types |= dict.fromkeys(("heights", "widths"), ("fp32", "fp32")) | dict.fromkeys(SIZES, "i32")
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"].startswith(b"\x7fELF")


def random_inputs(
    spatial_shapes,
    batch_size=2,
    num_queries=5,
    num_heads=3,
    head_dim=7,
    num_points=4,
    reference_shape=None,
    dtype=torch.float32,
):
    """Value, offsets, logits, references; about half of the places are outside the map. Also a gradient."""
    generator = torch.Generator().manual_seed(0)
    num_values, num_levels = sum(height * width for height, width in spatial_shapes), len(spatial_shapes)
    samples = (batch_size, num_queries, num_heads, num_levels, num_points)
    value = torch.randn(batch_size, num_values, num_heads, head_dim, generator=generator)
    offsets = 3 * torch.randn(*samples, 2, generator=generator)
    logits = 2 * torch.randn(samples, generator=generator)
    references = 1.4 * torch.rand(reference_shape or (batch_size, num_queries, num_levels, 2), generator=generator)
    grad = torch.randn(batch_size, num_queries, num_heads * head_dim, generator=generator)
    value, offsets, logits, grad = (x.to(DEVICE, dtype) for x in (value, offsets, logits, grad))
    return [value, offsets, logits, references.to(DEVICE) - 0.2], grad


def flatten_sizes(spatial_shapes):
    return [side for shape in spatial_shapes for side in shape]


def attend_in_float64(inputs, spatial_shapes):
    value, offsets, logits, references = (x.cpu().double() for x in inputs)
    return attend_around_references(value, spatial_shapes, references, offsets, logits)


def assert_close(actual, expected, tolerance, name):
    assert actual.shape == expected.shape, name
    error = (actual.cpu().double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: {error:.1e} of the largest value"


def assert_equal_to_plain_path(inputs, grad, spatial_shapes, tolerance):
    inputs = [x.detach().requires_grad_() for x in inputs]
    expected_inputs = [x.detach().requires_grad_() for x in inputs]
    output = attend(*inputs, flatten_sizes(spatial_shapes))
    output.backward(grad)
    expected = attend_in_float64(expected_inputs, spatial_shapes)
    expected.backward(grad.cpu().double())
    assert output.dtype == inputs[0].dtype
    assert_close(output.detach(), expected.detach(), tolerance, "output")
    for name, x, expected in zip(("value", "offsets", "logits", "references"), inputs, expected_inputs):
        assert x.grad.dtype == x.dtype
        assert_close(x.grad, expected.grad.cpu().double(), tolerance, f"gradient of {name}")


PYRAMID = [(6, 5), (3, 4), (1, 2)]
CASES = {
    "one level": ([(6, 5)], {}),
    "one row": ([(1, 7)], {"num_points": 2}),
    "three levels, three points": (PYRAMID, {"num_points": 3}),
    "boxes": (PYRAMID, {"reference_shape": (2, 5, 3, 4)}),
    "one reference for all images and levels": (PYRAMID, {"reference_shape": (1, 5, 1, 2)}),
    "one box for all levels": (PYRAMID, {"reference_shape": (2, 5, 1, 4)}),
    "one channel, one head": ([(6, 5)], {"head_dim": 1, "num_heads": 1}),
    "several programs, 24 channels": ([(30, 41), (15, 20)], {"head_dim": 24, "num_queries": 20}),
    "more channels than a program usually holds": ([(6, 5)], {"head_dim": 1030, "num_heads": 1, "num_queries": 2}),
}


@runs_kernels
@pytest.mark.parametrize(("spatial_shapes", "options"), CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_plain_path(spatial_shapes, options):
    inputs, grad = random_inputs(spatial_shapes, **options)
    # A place is rounded to a few eps of its distance from the corner of the map, some 40 cells
    assert_equal_to_plain_path(inputs, grad, spatial_shapes, 100 * torch.finfo(torch.float32).eps)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_rounding_of_its_results(dtype):
    spatial_shapes = [(40, 50), (20, 25)]
    inputs, grad = random_inputs(spatial_shapes, num_queries=20, head_dim=12, dtype=dtype)
    # the float64 path starts from the same rounded inputs; the gradient of logits starts from the rounded output
    assert_equal_to_plain_path(inputs, grad, spatial_shapes, 2 * torch.finfo(dtype).eps)


@runs_kernels
def test_inputs_need_not_be_contiguous():
    inputs, grad = random_inputs(PYRAMID)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not any(x.is_contiguous() for x in inputs)
    assert_equal_to_plain_path(inputs, grad, PYRAMID, 100 * torch.finfo(torch.float32).eps)


@runs_kernels
@pytest.mark.parametrize("offset", [30.0, -1e4, 1e9, -1e30, float("inf")])
def test_places_far_outside_read_zero(offset):
    (value, offsets, logits, references), grad = random_inputs(PYRAMID)
    value.requires_grad_()
    output = attend(value, torch.full_like(offsets, offset), logits, references, flatten_sizes(PYRAMID))
    output.backward(grad)
    assert output.eq(0).all() and value.grad.eq(0).all()


@runs_kernels
def test_large_logits_do_not_overflow():
    inputs, grad = random_inputs(PYRAMID)
    inputs[2] = 1000 * inputs[2].sign() + inputs[2]
    # a logit of 1000 is exact to 3e-5, and so is its weight
    assert_equal_to_plain_path(inputs, grad, PYRAMID, 2e-4)


@runs_kernels
def test_only_gradients_that_are_needed_are_returned():
    inputs, grad = random_inputs(PYRAMID)
    for x in inputs[:3]:
        x.requires_grad_()
    attend(*inputs, flatten_sizes(PYRAMID)).backward(grad)
    assert inputs[3].grad is None and all(x.grad is not None for x in inputs[:3])


@runs_kernels
def test_operator_is_registered_as_torch_wants_it():
    inputs, _ = random_inputs(PYRAMID, reference_shape=(1, 5, 1, 2))
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(attend, (*inputs, flatten_sizes(PYRAMID)))


@runs_kernels
def test_shapes_that_do_not_fit_are_refused():
    (value, offsets, logits, references), _ = random_inputs([(6, 5)])
    with pytest.raises(ValueError, match=r"`sizes` \[6, 6\] do not fit"):
        attend(value, offsets, logits, references, [6, 6])
    with pytest.raises(ValueError, match=r"`logits` \(2, 5, 3, 1, 3\) .* do not fit"):
        attend(value, offsets, logits[..., :3], references, [6, 5])
    with pytest.raises(ValueError, match=r"`offsets` \(2, 5, 2, 1, 4, 2\), .* do not fit"):
        attend(value, offsets[:, :, :2], logits, references, [6, 5])


@runs_kernels
@pytest.mark.parametrize("name", ["a folder (1), with spaces", NAMESPACE])
def test_copies_of_the_code_do_not_disturb_each_other(name):
    """As when checkpoints bring their code, or the code is loaded again."""
    spec = importlib.util.spec_from_file_location(name, deformable_attention_triton.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    inputs, _ = random_inputs(PYRAMID)
    expected = attend_in_float64(inputs, PYRAMID)
    for operator in (copy.attend, attend):
        assert_close(operator(*inputs, flatten_sizes(PYRAMID)), expected, 1e-5, "output")


# What a network does with the kernels


@pytest.fixture
def use_kernels(monkeypatch):
    """As on a GPU, where the choice is made alone."""
    if DEVICE == "cpu":
        monkeypatch.setattr(deformable_attention, "is_for_triton", lambda value: True)


def build_module():
    torch.manual_seed(0)
    module = PiipDeformableAttention(24, 16, num_heads=2, num_points=3, num_levels=2, value_ratio=0.5)
    module.sampling_offsets.bias.data.normal_()
    queries, features = torch.randn(2, 4 * 4, 24), torch.randn(2, 6 * 5 + 3 * 2, 16)
    points = get_reference_points(4, 4, device=torch.device("cpu"))[None, :, None]
    mask = torch.rand(2, 6 * 5 + 3 * 2) > 0.2
    inputs = [x.to(DEVICE) for x in (queries, features, points)]
    return module.to(DEVICE), (*inputs, [(6, 5), (3, 2)], mask.to(DEVICE))


def count_operators(graph):
    return sum(str(node.target) == f"{NAMESPACE}.attend.default" for node in graph.nodes)


def get_gradients(module, inputs):
    module.zero_grad()
    output = module(*inputs)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in module.parameters())]


@runs_kernels
def test_module_with_kernels_equals_the_plain_one(monkeypatch, use_kernels):
    module, inputs = build_module()
    actual = get_gradients(module, inputs)
    monkeypatch.setattr(deformable_attention, "is_for_triton", lambda value: False)
    for x, expected in zip(actual, get_gradients(module, inputs)):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_compiled_module_is_one_graph_with_the_operator(use_kernels):
    module, inputs = build_module()
    graphs = []

    def keep_graph(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch.compiler.reset()
    torch.compile(module, fullgraph=True, backend=keep_graph)(*inputs)
    assert [count_operators(graph.graph) for graph in graphs] == [1]
    torch.compiler.reset()
    expected = get_gradients(module, inputs)
    actual = get_gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_exported_module_has_the_operator_as_one_node(use_kernels):
    module, inputs = build_module()
    batch_size = torch.export.Dim("batch_size", min=1, max=16)
    shapes = ({0: batch_size}, {0: batch_size}, None, [(None, None)] * 2, {0: batch_size})
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    assert count_operators(program.graph) == 1
    queries, features, points, spatial_shapes, mask = inputs
    three = (queries[[0, 1, 0]], features[[0, 1, 0]], points, spatial_shapes, mask[[0, 1, 0]])
    torch.testing.assert_close(program.module()(*three), module(*three), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_kernels_are_chosen_on_a_gpu(monkeypatch):
    calls = []

    def count_calls(*inputs):
        calls.append(inputs)
        return attend(*inputs)

    monkeypatch.setattr(deformable_attention, "attend", count_calls)
    module, inputs = build_module()
    module(*inputs)
    assert len(calls) == 1
    # neither on the CPU nor in float64
    module.cpu()(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs))
    queries, features, *others = inputs
    module.to(DEVICE).double()(queries.double(), features.double(), *others)
    assert len(calls) == 1


@pytest.mark.gpu
@needs_gpu
def test_inductor_runs_the_kernels_forward_and_backward():
    module, inputs = build_module()
    expected = get_gradients(module, inputs)
    actual = get_gradients(torch.compile(module, fullgraph=True), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
