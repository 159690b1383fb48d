"""
Our numbers against those of the official code, for weights and inputs made by rule (`fixtures/weight_rule.py`).

The weights exist under the official names only, so every case also runs the conversion of configuration and weights.
"""

import gzip
import json
import zlib

import pytest
import torch
from safetensors.torch import load_file

from modeling_piip.conversion import convert_config, convert_state_dict, infer_codebase, is_never_used, rename_key
from modeling_piip.deformable_attention import multi_scale_deformable_attention

from .fixtures.weight_rule import reference_input
from .goldens import (
    CASES,
    GOLDENS,
    STATE_DICTS,
    TOLERANCE,
    assert_matches,
    build_input,
    build_official_weights,
    get_codebase,
    get_official_config,
)


NETWORKS = [name for name, case in CASES.items() if "config" in case]
OPERATORS = [name for name, case in CASES.items() if case["kind"] == "op"]
# The official code itself moves by 6e-4 against float64
GRADIENT_TOLERANCE = 1e-3


def build_model(case: dict) -> torch.nn.Module:
    weights = build_official_weights(case)
    config, model_class = convert_config(get_official_config(case), get_codebase(case), weights)
    with torch.device("meta"):
        model = model_class(config)
    converted, _ = convert_state_dict(weights, model)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def get_output(outputs, name: str, num_branches: int) -> torch.Tensor:
    if name == "logits":
        return outputs.logits
    if name.startswith("map"):
        return outputs.feature_maps[int(name.removeprefix("map"))]
    interaction, branch = name.removesuffix("_tokens").split(".branch")
    stage = int(interaction.removeprefix("interaction")) + 1
    return outputs.hidden_states[stage * num_branches + num_branches - int(branch)]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_equal_the_official_ones(name):
    case = CASES[name]
    model = build_model(case)
    with torch.no_grad():
        outputs = model(build_input(case), output_hidden_states=True)
    stored = load_file(GOLDENS / case["file"])
    for output_name, entry in case["outputs"].items():
        output = get_output(outputs, output_name, len(model.config.branches))
        assert_matches(output, output_name, entry, stored)


def measure_gradient(gradient: torch.Tensor, name: str) -> list[float]:
    """Norm, and inner product with a vector made from the name; for scalars the gradient itself."""
    if gradient.ndim == 0:
        return [abs(gradient.item()), gradient.item()]
    direction = torch.from_numpy(reference_input(zlib.crc32(name.encode()), gradient.shape)).double()
    gradient = gradient.double()
    return [gradient.norm().item(), (gradient * direction).sum().item()]


def get_gradient(official_name: str, shape: list[int], model: torch.nn.Module) -> torch.Tensor | None:
    """Gradient of an official parameter in its layout, from ours; `None` for parameters that are never used."""
    if is_never_used(official_name, model.config):
        return None
    is_video_table = official_name.endswith("temporal_pos_embed.weight")
    name = rename_key(official_name.replace("temporal", "spatial"), model.config)
    gradient = model.get_parameter(name).grad
    if is_video_table:
        # its first row was added to every entry of the position table
        return torch.nn.functional.pad(gradient.sum(dim=1), (0, 0, 0, shape[0] - 1))
    if len(shape) == 3 and shape[1] == gradient.shape[1] + 1:
        return torch.nn.functional.pad(gradient, (0, 0, 1, 0))
    return gradient.reshape(shape)


@pytest.mark.parametrize("name", [name for name in NETWORKS if CASES[name].get("gradients_file")])
def test_gradients_equal_the_official_ones(name):
    case = CASES[name]
    model = build_model(case)
    pixel_values = build_input(case).requires_grad_()
    outputs = model(pixel_values)
    outputs = [outputs.logits] if "logits" in outputs else outputs.feature_maps
    loss = 0
    for k, output in enumerate(outputs):
        direction = torch.from_numpy(reference_input(case["input"]["seed"] + 1000 + k, output.shape))
        loss = loss + (output * direction).sum() / output.numel() ** 0.5
    loss.backward()

    stored = json.loads(gzip.decompress((GOLDENS / case["gradients_file"]).read_bytes()))
    assert loss.item() == pytest.approx(stored["loss"], rel=TOLERANCE, abs=TOLERANCE)
    for official_name, expected in stored["per_parameter"].items():
        if official_name == "input":
            gradient = pixel_values.grad
        else:
            gradient = get_gradient(official_name, STATE_DICTS[name][official_name]["shape"], model)
        if expected is None or gradient is None:
            assert expected is None and gradient is None, official_name
            continue
        # an inner product can be small by chance: its error is measured against the norm of the gradient
        measured = measure_gradient(gradient, official_name)
        assert measured == pytest.approx(expected, rel=0, abs=GRADIENT_TOLERANCE * expected[0] + 1e-7), official_name


@pytest.mark.parametrize("name", OPERATORS)
def test_deformable_attention_equals_the_official_operator(name):
    stored = load_file(GOLDENS / CASES[name]["file"])
    inputs = [stored[k].requires_grad_() for k in ("value", "sampling_locations", "attention_weights")]
    spatial_shapes = [tuple(shape) for shape in stored["spatial_shapes"].tolist()]
    output = multi_scale_deformable_attention(inputs[0], spatial_shapes, *inputs[1:])
    output.backward(stored["grad_output"])
    computed = {"output": output.detach(), "grad_value": inputs[0].grad}
    computed |= {"grad_sampling_locations": inputs[1].grad, "grad_attention_weights": inputs[2].grad}
    for k, tensor in computed.items():
        error = (tensor - stored[k]).abs().max() / stored[k].abs().max()
        assert error < TOLERANCE, f"{k}: {error:.1e} of the largest value"


@pytest.mark.parametrize("name", [name for name in NETWORKS if "baseline" not in name])
def test_code_base_is_inferred(name):
    assert infer_codebase(get_official_config(CASES[name])) == get_codebase(CASES[name])
