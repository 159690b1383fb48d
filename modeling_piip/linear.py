# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Linear layers that may run as 1x1 convolutions. On CPUs PyTorch gives float32 matrix products to the BLAS it was built
with, mostly MKL, but convolutions to oneDNN. Where MKL has no good kernels for a processor oneDNN takes half the time;
elsewhere both take the same.
"""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn


LINEAR_BACKENDS = ("auto", "default", "onednn")
# Convolutions bring their weights into another layout at every call. It pays from so many multiply-adds on, if many
# rows share the weights.
_MINIMUM_MULTIPLY_ADDS = 2**22
# Both ways are measured with so many rows, because the cost of the layout is shared by the rows
MEASURED_ROWS = (16, 64, 256, 1024)
# Where both take about the same, the choice must not change from run to run
_MINIMUM_SPEEDUP = 1.1

_backend = "auto"


def set_linear_backend(backend: str):
    r"""
    Chooses how the linear layers of all PIIP models of this process run in float32 on the CPU. Results differ by
    rounding only. Compiled and exported models, other devices and other data types always run the default.

    Args:
        backend (`str`):
            `"default"`: `torch.nn.functional.linear`. `"onednn"`: 1x1 convolutions. `"auto"`, where every process
            begins: the faster one for the number of rows, measured once for 16, 64, 256 and 1024 rows, when the first
            large layer of that many runs (some 0.3 seconds together).

    Raises:
        ValueError: If `backend` is none of these.
    """
    global _backend
    if backend not in LINEAR_BACKENDS:
        raise ValueError(f"Unknown backend of linear layers {backend!r}. Choose one of {', '.join(LINEAR_BACKENDS)}.")
    _backend = backend


def get_linear_backend() -> str:
    """What `set_linear_backend` set."""
    return _backend


def linear_as_convolution(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`torch.nn.functional.linear` as a 1x1 convolution of one channels-last image with one row per token."""
    # (..., in_features) -> (1, in_features, num_tokens, 1)
    image = hidden_states.reshape(1, -1, 1, hidden_states.shape[-1]).permute(0, 3, 1, 2)
    output = F.conv2d(image, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*hidden_states.shape[:-1], weight.shape[0])


@torch.no_grad()
def _measure_speedup(num_rows: int) -> float:
    """Time of the default linear layer by that of the convolution, for the first layer of the MLP of a ViT-B."""
    hidden_states, weight, bias = torch.ones(num_rows, 768), torch.ones(3072, 768), torch.ones(3072)

    def measure(function) -> float:
        start = time.perf_counter()
        function(hidden_states, weight, bias)
        return time.perf_counter() - start

    times = [(measure(F.linear), measure(linear_as_convolution)) for _ in range(5)]
    linear, convolution = map(min, zip(*times))
    return linear / convolution


@functools.cache
def is_onednn_faster(num_rows: int) -> bool:
    """For one of `MEASURED_ROWS`; measured at the first call."""
    # A new thread, because the caller may be inside autocast, an operation counter or a mode of fake tensors
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_measure_speedup, num_rows).result() >= _MINIMUM_SPEEDUP


class PiipLinear(nn.Linear):
    """`torch.nn.Linear` whose matrix product `set_linear_backend` chooses."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.runs_as_convolution(hidden_states):
            return linear_as_convolution(hidden_states, self.weight, self.bias)
        return super().forward(hidden_states)

    def runs_as_convolution(self, hidden_states: torch.Tensor) -> bool:
        if _backend == "default" or torch.compiler.is_compiling() or not self.can_run_as_convolution(hidden_states):
            return False
        if _backend == "onednn":
            return True
        num_rows = hidden_states.numel() // self.in_features
        if num_rows < MEASURED_ROWS[0] or num_rows * self.weight.numel() < _MINIMUM_MULTIPLY_ADDS:
            return False
        return is_onednn_faster(max(rows for rows in MEASURED_ROWS if rows <= num_rows))

    def can_run_as_convolution(self, hidden_states: torch.Tensor) -> bool:
        return (
            hidden_states.device.type == "cpu"
            and hidden_states.dtype == self.weight.dtype == torch.float32
            # quantized and sharded weights are tensors of other classes, which know linear layers only
            and type(self.weight) is nn.Parameter
            and hidden_states.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
        )
