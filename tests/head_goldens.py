"""Goldens of the official heads: cases, weights made by rule from the official names, comparison."""

import functools
import json

import torch
from safetensors.torch import load_file

from .fixtures.weight_rule import reference_weight
from .goldens import FIXTURES, TOLERANCE


HEADS = FIXTURES / "heads"


@functools.cache
def read_case(name: str) -> dict:
    return json.loads((HEADS / f"{name}.json").read_text())


@functools.cache
def read_tensors(name: str, step: str) -> dict[str, torch.Tensor]:
    return load_file(HEADS / f"{name}.{step}.safetensors")


def build_weight(official_name: str, shape) -> torch.Tensor:
    if official_name.endswith(".num_batches_tracked"):
        return torch.tensor(0)
    return torch.from_numpy(reference_weight(official_name, shape))


def assert_matches_head(output: torch.Tensor, name: str, step: str, tensor: str):
    """Compares with the tensor of a step of a case, of which large ones are stored at some places only."""
    entry, stored = read_case(name)["steps"][step]["tensors"][tensor], read_tensors(name, step)
    assert list(output.shape) == entry["shape"], tensor
    if entry["mode"] == "sampled":
        output, expected = output.flatten()[stored[f"{tensor}#idx"].long()], stored[f"{tensor}#val"]
        largest = entry["absmax"]
    else:
        expected = stored[tensor]
        largest = expected.abs().max().item()
    error = (output - expected).abs().max().item() / largest
    assert error < TOLERANCE, f"{tensor} of {step}: {error:.1e} of the largest value"
