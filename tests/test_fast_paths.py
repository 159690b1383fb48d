"""What makes the networks fast must not change what they compute: every fast path against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from modeling_piip import PiipBackbone, PiipForImageClassification, deformable_attention, linear, modeling_piip
from modeling_piip.linear import PiipLinear, get_linear_backend, set_linear_backend

from .common import build, images, tiny_branch, tiny_cls_config, tiny_config


MODELS = {
    "classifier with class tokens": (PiipForImageClassification, tiny_cls_config()),
    "classifier on the merged map": (PiipForImageClassification, tiny_cls_config(merge_type="linear")),
    "backbone": (PiipBackbone, tiny_config()),
    "backbone with cross attention": (PiipBackbone, tiny_config(interaction_attention="cross")),
    "single branch": (PiipBackbone, tiny_config(branches=[tiny_branch(window_size=3)], merge_type="concat")),
}


@pytest.fixture(autouse=True)
def restore_backend():
    backend = get_linear_backend()
    yield
    set_linear_backend(backend)
    linear.is_onednn_faster.cache_clear()


@pytest.fixture
def num_convolutions(monkeypatch) -> list:
    """Grows by one with every linear layer that runs as a convolution."""
    calls = []

    def count(*arguments):
        calls.append(arguments)
        return F.linear(*arguments)

    monkeypatch.setattr(linear, "linear_as_convolution", count)
    return calls


def compute(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of all parameters and of the images."""
    pixel_values = pixel_values.clone().requires_grad_()
    outputs = model(pixel_values)
    outputs = outputs.feature_maps if "feature_maps" in outputs else [outputs.logits]
    results = {f"output {k}": output for k, output in enumerate(outputs)}
    model.zero_grad()
    sum(output.square().sum() for output in outputs).backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    results |= {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    return {name: value.detach() for name, value in results.items()} | {"gradient of images": pixel_values.grad}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Outputs within 2e-6 of the largest value, gradients, which are sums over many tokens, within 1e-5."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 2e-6 if name.startswith("output") else 1e-5
        difference = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


# --------------------------------------------------- linear layers ---------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_by_convolutions(name, monkeypatch):
    model = build(*MODELS[name])
    set_linear_backend("default")
    expected = compute(model, images())
    set_linear_backend("onednn")
    calls, convolution = [], linear.linear_as_convolution
    monkeypatch.setattr(linear, "linear_as_convolution", lambda *args: calls.append(args) or convolution(*args))
    assert_same(compute(model, images()), expected)
    assert len(calls) >= 8


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (2, 5, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_by_convolution_has_the_same_outputs_and_gradients(shape, bias):
    torch.manual_seed(0)
    layer = PiipLinear(7, 6, bias=bias)
    # neither contiguous nor dense
    hidden_states = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].requires_grad_()
    weighting, results = torch.randn(*shape[:-1], 6), {}
    for backend in ("default", "onednn"):
        set_linear_backend(backend)
        output = layer(hidden_states)
        gradients = torch.autograd.grad((output * weighting).sum(), [hidden_states, *layer.parameters()])
        results[backend] = [output, *gradients]
    for actual, expected in zip(results["onednn"], results["default"]):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("change", ["load_state_dict", "optimizer step"])
def test_changed_weights_are_used_at_once(change):
    model, other = build(*MODELS["backbone"]), build(*MODELS["backbone"])
    set_linear_backend("onednn")
    before = model(images()).feature_maps[0]
    if change == "load_state_dict":
        model.load_state_dict({name: weight * 0.9 for name, weight in other.state_dict().items()})
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        compute(model, images())
        optimizer.step()
    fast = compute(model, images())
    set_linear_backend("default")
    assert_same(fast, compute(model, images()))
    assert not torch.allclose(fast["output 0"], before, rtol=1e-3)


def test_automatic_choice_follows_the_measurement_for_the_number_of_rows(num_convolutions, monkeypatch):
    measurements = []
    speedups = {16: 1.0, 64: 1.05, 256: 2.0, 1024: 1.0}
    monkeypatch.setattr(linear, "_measure_speedup", lambda rows: measurements.append(rows) or speedups[rows])
    layer = PiipLinear(512, 512)
    set_linear_backend("auto")
    choices = {}
    with torch.no_grad():
        for rows in (16, 63, 64, 255, 256, 300, 1023, 1024, 5000):
            count = len(num_convolutions)
            layer(torch.ones(1, rows, 512))
            choices[rows] = len(num_convolutions) > count
    assert [rows for rows, is_convolution in choices.items() if is_convolution] == [256, 300, 1023]
    # once each
    assert measurements == [16, 64, 256, 1024]


@pytest.mark.parametrize("rows", [0, 1, 15])
def test_automatic_choice_leaves_few_rows_to_the_default(rows, num_convolutions, monkeypatch):
    monkeypatch.setattr(linear, "_measure_speedup", lambda rows: 2.0)
    set_linear_backend("auto")
    assert PiipLinear(2048, 2048)(torch.ones(rows, 2048)).shape == (rows, 2048)
    assert not num_convolutions


def test_measurement_is_no_part_of_what_the_caller_counts_or_records():
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        linear.is_onednn_faster(64)
    assert counter.get_total_flops() == 0
    state = torch.get_rng_state()
    linear.is_onednn_faster.cache_clear()
    linear.is_onednn_faster(64)
    assert torch.equal(torch.get_rng_state(), state)


class OtherTensor(torch.Tensor):
    """As the weights of quantized or sharded layers: a class that need not know of convolutions."""


def test_what_convolutions_cannot_do_stays_with_the_default(num_convolutions):
    set_linear_backend("onednn")
    layer, tokens = PiipLinear(8, 8), torch.ones(2, 4, 8)
    layer(tokens)
    assert len(num_convolutions) == 1

    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        PiipLinear(8, 8, dtype=dtype)(tokens.to(dtype))
    PiipLinear(8, 8, device="meta")(tokens.to("meta"))
    layer(tokens[:0])
    torch.func.functional_call(layer, {"weight": torch.ones(8, 8).as_subclass(OtherTensor)}, tokens)
    torch.export.export(layer, (tokens,))
    torch.compile(layer, backend="eager", fullgraph=True)(tokens)
    assert len(num_convolutions) == 1


def test_layers_are_linear_layers_for_whoever_replaces_or_saves_them():
    model = build(*MODELS["backbone"])
    layer = model.piip.branches[0].layers[0].mlp.fc1
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'mkl'.*auto, default, onednn"):
        set_linear_backend("mkl")


# ------------------------------------------------------ sampling -----------------------------------------------------


def attend(feature_map: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    references = torch.linspace(0, 1, 2 * offsets.shape[1]).reshape(1, -1, 1, 2)
    return deformable_attention.attend_around_references(feature_map, [(5, 4)], references, offsets, logits)


def get_attention_inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 20, 3, 6), (2, 7, 3, 1, 4, 2), (2, 7, 3, 1, 4)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def get_operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def tells_export_from_compilation() -> bool:
    """PyTorch 2.9 does not: sampling then stays in the form that can be exported."""
    return not torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(())).item()


def test_compiled_sampling_is_one_operator_with_the_same_outputs_and_gradients():
    inputs, operators = get_attention_inputs(), set()

    def record(module: torch.fx.GraphModule, _):
        operators.update(get_operators(module.graph))
        return make_boxed_func(module.forward)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    results = []
    for function in (attend, compiled):
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
    is_one_operator = "modeling_piip_deformable_attention.grid_sample.default" in operators
    assert is_one_operator == tells_export_from_compilation()


def test_sampling_operator_fits_its_description():
    feature_map, grid = torch.randn(2, 3, 5, 4, requires_grad=True), torch.rand(2, 6, 7, 2, requires_grad=True)
    channels_last = feature_map.detach().to(memory_format=torch.channels_last).requires_grad_()
    for inputs in ((feature_map, grid), (channels_last, grid)):
        torch.library.opcheck(deformable_attention.opaque_grid_sample, inputs)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_sampling_needs_no_operator_of_ours(strict):
    class Attention(nn.Module):
        def forward(self, *inputs):
            return attend(*inputs)

    program = torch.export.export(Attention(), tuple(get_attention_inputs()), strict=strict)
    assert all(name.startswith(("aten.", "<built-in", "_operator")) for name in get_operators(program.graph))


# --------------------------------------------------- channels last ---------------------------------------------------


def copy_tokens_to_map(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """The plain form of `tokens_to_map`: a contiguous map, whose layout all that comes after keeps."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid_size).contiguous()


@pytest.mark.parametrize("name", ["classifier on the merged map", "backbone"])
def test_channels_last_maps_compute_the_same(name, monkeypatch):
    model = build(*MODELS[name])
    fast = compute(model, images())
    monkeypatch.setattr(modeling_piip, "tokens_to_map", copy_tokens_to_map)
    assert_same(fast, compute(model, images()))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_maps_stay_channels_last_from_the_tokens_to_the_outputs(batch_size):
    model = build(*MODELS["backbone"])
    layouts = {}

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
            # PyTorch looks at the strides of all axes, also those of length 1, and else falls back silently
            layouts[name] = [tensor.stride() == channels_last_strides(tensor) for tensor in (inputs[0], output)]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and not name.endswith("patch_embeddings"):
            module.register_forward_hook(look(name))
    with torch.no_grad():
        feature_maps = model(images(batch_size, 3, 32, 32)).feature_maps
    assert len(layouts) == 4 + 4 + 3
    assert {name for name, layout in layouts.items() if layout != [True, True]} == set()
    assert all(feature_map.is_contiguous(memory_format=torch.channels_last) for feature_map in feature_maps)


def channels_last_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").to(memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("model_class, config", MODELS.values(), ids=list(MODELS))
def test_tokens_are_contiguous_in_all_layers(model_class, config):
    model = build(model_class, config)
    with torch.no_grad():
        outputs = getattr(model, "piip", model)(images(), output_hidden_states=True)
    hidden_states = outputs.hidden_states
    assert [tokens.is_contiguous() for tokens in hidden_states] == [True] * len(hidden_states)
