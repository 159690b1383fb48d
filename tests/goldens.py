"""Goldens of the official code: cases, weights and inputs made by rule (`fixtures/weight_rule.py`), comparison."""

import gzip
import json
from pathlib import Path

import torch

from modeling_piip.conversion import BASELINE_TYPES

from .fixtures.weight_rule import reference_input, reference_weight


FIXTURES = Path(__file__).parent / "fixtures"
GOLDENS = FIXTURES / "goldens"
CASES = {case["name"]: case for case in json.loads((GOLDENS / "index.json").read_text())["cases"]}
STATE_DICTS = json.loads(gzip.decompress((GOLDENS / "state_dicts.json.gz").read_bytes()))
# Relative to the largest value of an output; rounding of float32 alone is about 1e-6
TOLERANCE = 1e-4


def read_manifest(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def build_official_weights(case: dict) -> dict[str, torch.Tensor]:
    weights = {}
    for name, entry in STATE_DICTS[case["name"]].items():
        if not entry["dtype"].startswith("float"):
            continue
        weights[name] = torch.from_numpy(reference_weight(name, entry["shape"]))
        for text, factor in case.get("weight_multipliers", []):
            if text in name:
                weights[name] *= factor
    return weights


def get_official_config(case: dict) -> dict:
    # the official dictionaries of pyramids name no class in classification; baselines always do
    if case["upstream_class"] in BASELINE_TYPES:
        return case["config"] | {"type": case["upstream_class"]}
    return case["config"]


def get_codebase(case: dict) -> str:
    return case["kind"].removesuffix("-backbone")


def build_input(case: dict) -> torch.Tensor:
    return torch.from_numpy(reference_input(case["input"]["seed"], case["input"]["shape"]))


def assert_matches(output: torch.Tensor, name: str, entry: dict, stored: dict[str, torch.Tensor]):
    assert list(output.shape) == entry["shape"], name
    if entry["stored"] == "full":
        expected = stored[name]
    else:
        output, expected = output.flatten()[stored[f"{name}.index"]], stored[f"{name}.value"]
    error = (output - expected).abs().max().item() / entry["absmax"]
    assert error < TOLERANCE, f"{name}: {error:.1e} of the largest value"
