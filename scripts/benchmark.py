"""Measure how fast a PIIP network is, beside what a user would take instead, in one process.

    python scripts/benchmark.py --variant piip-tsb-368-192-128-in1k --batch_size 1 8
    python scripts/benchmark.py --variant piip-tsb-1120-896-448-mask-rcnn-coco --dtype float32 bfloat16
    python scripts/benchmark.py --variant piip-tsb-368-192-128-in1k --task training --checkpointing no yes
    python scripts/benchmark.py --variant piip-tsb-368-192-128-in1k --linear default --profile
    python scripts/benchmark.py --variant piip-tsb-1120-896-448-mask-rcnn-coco --ops

All that is compared takes turns, round by round, so that a machine that slows down slows all of it. Times are medians
over the rounds with their quartiles, ratios are medians of the ratios within a round.

    opponents      for image classifiers their largest branch alone at 224 pixels and timm's model of that size as it
                   comes, for other networks the published single ViT of that size. --against takes variants, folders
                   of models, single (the largest branch alone) and timm:NAME, with @SIZE for other image sizes.
    models         classifiers with their head, all others as backbones with their feature pyramid; random weights.
    training       forward, mean square of the outputs as loss, backward, fused AdamW as in Trainer; float16 and
                   bfloat16 by autocast.
    multiply-adds  those that are executed, see scripts/complexity.py; three times as many in training.
    of peak        multiply-adds per second beside those of bare matrix products in the same rounds: the largest linear
                   layers of the network, by the fastest of the libraries at hand. On CPUs these are the BLAS that
                   PyTorch was built with, and oneDNN by 1x1 convolutions.
    memory         growth of the process by one step on CPUs (Linux only), peak of allocated tensors on GPUs.
    --profile      where the time of each network goes, by kind of operator, on average over 3 steps.
    --ops          deformable attention alone, from offsets and logits on, at the shapes of the network, against
                   Transformers' implementation.

A quiet machine measures best. docs/benchmarks.md holds results and says what helps.
"""

import argparse
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from modeling_piip import PiipBackbone, PiipConfig, PiipForImageClassification
from modeling_piip.complexity import build_on_meta, count_actual
from modeling_piip.configuration_piip import find_variant
from modeling_piip.deformable_attention import PiipDeformableAttention, attend_around_references
from modeling_piip.linear import (
    LINEAR_BACKENDS,
    MEASURED_ROWS,
    get_linear_backend,
    is_onednn_faster,
    linear_as_convolution,
    set_linear_backend,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# By the width of the largest branch
SINGLE_BACKBONES = {
    768: "vit-b-1024-mask-rcnn-coco",
    1024: "vit-l-1024-mask-rcnn-coco",
    3200: "internvit-6b-1024-mask-rcnn-coco",
}
TIMM_CLASSIFIERS = {768: "timm:deit_base_patch16_224", 1024: "timm:vit_large_patch16_224"}
# So many shapes stand for all linear layers of a network
NUM_PRODUCTS = 6
# Kinds of operators by their names, the first that fits
OPERATOR_KINDS = {
    "matrix products": r"mm(_|$)|linear|gemm|cutlass|xmma",
    "attention": r"dot_product|flash|fmha",
    "convolutions": r"conv",
    "norms": r"norm",
    "GELU": r"gelu",
    "sampling": r"grid_sampler",
    "optimizer": r"adam",
    "copies": r"copy|cat|clone",
    "other": r"",
}
NUM_PROFILED_STEPS = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, metavar="NAME[@SIZE]", help="a variant or the folder of a model")
    parser.add_argument("--against", nargs="*", metavar="NAME[@SIZE]", help="opponents; none if nothing follows")
    parser.add_argument("--task", nargs="+", choices=["inference", "training"], default=["inference"])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument(
        "--linear",
        nargs="+",
        choices=LINEAR_BACKENDS,
        default=["auto"],
        help="float32 linear layers of ours on CPUs (set_linear_backend)",
    )
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["no", "yes"], default=["no"], help="of gradients, in training of ours"
    )
    parser.add_argument("--profile", action="store_true", help="also show where the time of each network goes")
    parser.add_argument("--ops", action="store_true", help="measure deformable attention instead of networks")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="on CPUs (default: as many as PyTorch takes)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: %(default)s; one more warms up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, with machine and versions")
    parser.add_argument(
        "--markdown",
        metavar="FILE[#NAME]",
        help="the tables; with #NAME they go between <!-- NAME --> and <!-- end of NAME --> of a file that has both",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars of the times per image (needs matplotlib)")
    args = parser.parse_args(argv)
    args.command = sys.argv[1:] if argv is None else argv
    if min(*args.batch_size, args.rounds, args.threads or 1) < 1:
        parser.error("--batch_size, --rounds and --threads must be positive.")
    return args


# ------------------------------------------------------ networks -----------------------------------------------------


@dataclass
class Network:
    name: str
    image_size: int
    build: Callable[[], nn.Module]
    multiply_adds: int
    is_ours: bool = True


def find_networks(args: argparse.Namespace) -> list[Network]:
    """The measured network and its opponents."""
    config = load_config(args.variant)
    opponents = choose_opponents(config) if args.against is None else args.against
    return [build_network(args.variant, config)] + [find_opponent(name, config) for name in opponents]


def load_config(name: str) -> PiipConfig:
    name = split_size(name)[0]
    return PiipConfig.from_pretrained(name if Path(name).exists() else find_variant(name))


def split_size(name: str) -> tuple[str, int | None]:
    name, separator, size = name.partition("@")
    if separator and not (size.isdecimal() and int(size) > 0):
        raise ValueError(f"{name}@{size}: after @ comes the side of the images in pixels.")
    return name, int(size) if size else None


def is_classifier(config: PiipConfig) -> bool:
    return config.architectures == ["PiipForImageClassification"]


def get_model_class(config: PiipConfig) -> type[nn.Module]:
    return PiipForImageClassification if is_classifier(config) else PiipBackbone


def build_network(name: str, config: PiipConfig) -> Network:
    name, size = split_size(name)
    size = size or config.image_size
    model_class = get_model_class(config)
    multiply_adds = count_actual(config, (size, size), model_class).total_flops
    # a copy: models write into their configuration
    return Network(f"{Path(name).name}@{size}", size, lambda: model_class(copy.deepcopy(config)), multiply_adds)


def choose_opponents(config: PiipConfig) -> list[str]:
    width = config.branches[-1].hidden_size
    single, known = (["single@224"], TIMM_CLASSIFIERS) if is_classifier(config) else ([], SINGLE_BACKBONES)
    return single + ([known[width]] if width in known else [])


def find_opponent(name: str, config: PiipConfig) -> Network:
    if name.startswith("timm:"):
        return find_timm(name)
    is_single = split_size(name)[0] == "single"
    return build_network(name, to_single_branch(config) if is_single else load_config(name))


def to_single_branch(config: PiipConfig) -> PiipConfig:
    """The largest branch alone, without anything to merge."""
    branch = replace(config.branches[-1], image_size=config.image_size)
    single = copy.deepcopy(config)
    single.branches, single.merge_type, single.merge_stages = [branch], "concat", None
    return single


def find_timm(name: str) -> Network:
    model_name, size = split_size(name.removeprefix("timm:"))
    options = {} if size is None else {"img_size": size}
    if not timm.is_model(model_name):
        raise ValueError(f"timm has no model {model_name!r}; `timm.list_models` lists all.")
    size = size or timm.get_pretrained_cfg(model_name).input_size[-1]
    build = functools.partial(timm.create_model, model_name, **options)
    with torch.device("meta"):
        model = build().eval()
    # PyTorch does not count fused attention on every device
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return Network(f"timm {model_name}@{size}", size, build, counter.get_total_flops() // 2, is_ours=False)


# ------------------------------------------------------- steps -------------------------------------------------------


@dataclass
class Contestant:
    """A step that is measured again and again; `settings` tell what it is."""

    settings: dict[str, str | int]
    step: Callable[[], object]
    multiply_adds: int = 0
    seconds: list[float] = field(default_factory=list)
    # bytes
    memory: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def list_tensors(outputs: object) -> list[torch.Tensor]:
    """Logits or feature maps of any of the models."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.feature_maps) if "feature_maps" in outputs else [outputs.logits]


@torch.inference_mode()
def run_inference(runner: Callable, images: torch.Tensor, linear: str):
    set_linear_backend(linear)
    runner(images)


def run_training(
    runner: Callable, images: torch.Tensor, linear: str, optimizer: torch.optim.Optimizer, dtype: torch.dtype
):
    set_linear_backend(linear)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        outputs = runner(images)
    sum(output.float().square().mean() for output in list_tensors(outputs)).backward()
    optimizer.step()
    # memory grows by activations and gradients alike in every step
    optimizer.zero_grad()


def build_contestants(args: argparse.Namespace, networks: list[Network]) -> list[Contestant]:
    contestants = []
    for network, task, dtype in itertools.product(networks, args.task, args.dtype):
        checkpointing = args.checkpointing if network.is_ours and task == "training" else ["no"]
        for choice in checkpointing:
            contestants += build_steps(args, network, task, dtype, choice)
    return contestants


def build_steps(
    args: argparse.Namespace, network: Network, task: str, dtype: str, checkpointing: str
) -> list[Contestant]:
    """All that is measured with one model and its weights."""
    with torch.device(args.device):
        model = network.build().train(task == "training")
    if checkpointing == "yes":
        model.gradient_checkpointing_enable()
    if task == "training":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        step, factor = functools.partial(run_training, optimizer=optimizer, dtype=DTYPES[dtype]), 3
    else:
        model.to(DTYPES[dtype])
        step, factor = run_inference, 1

    contestants = []
    backends = args.linear if network.is_ours else ["default"]
    for batch_size, mode, linear in itertools.product(args.batch_size, args.mode, backends):
        runner = torch.compile(model) if mode == "compiled" else model
        images = torch.randn(batch_size, 3, network.image_size, network.image_size, device=args.device)
        if task == "inference":
            images = images.to(DTYPES[dtype])
        settings = {
            "network": network.name,
            "task": task,
            "batch size": batch_size,
            "dtype": dtype,
            "mode": mode,
            "linear": linear,
            "checkpointing": checkpointing,
        }
        settings["matrix library"] = name_matrix_library(settings, args.device)
        contestants.append(
            Contestant(
                settings,
                functools.partial(step, runner, images, linear),
                factor * batch_size * network.multiply_adds,
            )
        )
    return contestants


def build_products(args: argparse.Namespace, config: PiipConfig, size: int) -> list[Contestant]:
    """Bare matrix products in the shapes of the largest linear layers, one contestant per library."""
    contestants = []
    for batch_size, dtype in itertools.product(args.batch_size, args.dtype):
        shapes = find_linear_shapes(config, size, batch_size).most_common(NUM_PRODUCTS)
        operands = [
            [
                torch.randn(*shape, device=args.device, dtype=DTYPES[dtype])
                for shape in ((rows, inputs), (outputs, inputs))
            ]
            for (rows, inputs, outputs), _ in shapes
        ]
        libraries = {name_library(args.device, dtype): F.linear}
        if args.device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
            libraries["oneDNN, 1x1 convolution"] = linear_as_convolution
        for library, product in libraries.items():
            settings = {"products": library, "batch size": batch_size, "dtype": dtype}
            multiply_adds = sum(math.prod(shape) for shape, _ in shapes)
            contestants.append(Contestant(settings, functools.partial(multiply, product, operands), multiply_adds))
    return contestants


def find_linear_shapes(config: PiipConfig, size: int, batch_size: int) -> Counter:
    """Multiply-adds by shape (rows, inputs, outputs) of all linear layers."""
    shapes = Counter()

    def add(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor):
        rows = batch_size * inputs[0].numel() // module.in_features
        shapes[rows, module.in_features, module.out_features] += rows * module.weight.numel()

    model = build_on_meta(get_model_class(config), config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.empty(1, config.num_channels, size, size, device="meta"))
    return shapes


@torch.inference_mode()
def multiply(product: Callable, operands: list[list[torch.Tensor]]):
    for hidden_states, weight in operands:
        product(hidden_states, weight, None)


# ------------------------------------------------ deformable attention -----------------------------------------------


def build_operators(args: argparse.Namespace, config: PiipConfig, size: int) -> list[Contestant]:
    """Deformable attention and Transformers' own, with and without backward, at all shapes of the network."""
    contestants = []
    shapes = find_attention_shapes(config, size)
    if not shapes:
        raise ValueError(f"{args.variant} has no deformable attention: --ops takes a network of several branches.")
    for batch_size, dtype, shape in itertools.product(args.batch_size, args.dtype, shapes):
        for task, implementation in itertools.product(("forward", "forward and backward"), ("ours", "Transformers")):
            num_queries, spatial_shapes, num_heads, head_dim, num_points = shape
            settings = {
                "task": task,
                "batch size": batch_size,
                "dtype": dtype,
                "queries": num_queries,
                "maps": " ".join(f"{height}x{width}" for height, width in spatial_shapes),
                "heads": f"{num_heads}x{head_dim}",
                "points": num_points,
                "implementation": implementation,
            }
            step = build_operator_step(args, batch_size, dtype, shape, task, implementation)
            contestants.append(Contestant(settings, step))
    return contestants


def find_attention_shapes(config: PiipConfig, size: int) -> list[tuple]:
    """(queries, sizes of the maps, heads, width of a head, points) of all deformable attention in a network."""
    shapes = {}

    def add(module: PiipDeformableAttention, inputs: tuple, output: torch.Tensor):
        hidden_states, _, _, spatial_shapes = inputs[:4]
        head_dim = module.value_proj.out_features // module.num_heads
        shapes[hidden_states.shape[1], tuple(spatial_shapes), module.num_heads, head_dim, module.num_points] = True

    model = build_on_meta(get_model_class(config), config).eval()
    for module in model.modules():
        if isinstance(module, PiipDeformableAttention):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.empty(1, config.num_channels, size, size, device="meta"))
    return list(shapes)


def build_operator_step(
    args: argparse.Namespace, batch_size: int, dtype: str, shape: tuple, task: str, implementation: str
) -> Callable[[], object]:
    num_queries, spatial_shapes, num_heads, head_dim, num_points = shape
    num_levels = len(spatial_shapes)
    num_values = sum(height * width for height, width in spatial_shapes)
    options = {"device": args.device, "dtype": DTYPES[dtype]}
    value = torch.randn(batch_size, num_values, num_heads, head_dim, **options)
    logits = torch.randn(batch_size, num_queries, num_heads, num_levels, num_points, **options)
    offsets = torch.randn(*logits.shape, 2, **options)
    reference_points = torch.rand(1, num_queries, num_levels, 2, device=args.device)
    attend = attend_around_references if implementation == "ours" else attend_transformers
    attend = functools.partial(attend, spatial_shapes=list(spatial_shapes), reference_points=reference_points)
    tensors = {"value": value, "sampling_offsets": offsets, "attention_logits": logits}
    if task == "forward":
        return functools.partial(run_forward, attend, tensors)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return functools.partial(run_backward, attend, tensors)


def attend_transformers(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> torch.Tensor:
    """What its models compute after their projections, with centres of the queries as reference points."""
    weights = attention_logits.flatten(3).softmax(dim=-1).view_as(attention_logits)
    sizes = sampling_offsets.new_tensor([[width, height] for height, width in spatial_shapes])
    locations = reference_points[:, :, None, :, None] + sampling_offsets / sizes[:, None]
    # it takes one type for all; tensors of shapes and starts are for its CUDA kernel
    attend = MultiScaleDeformableAttention()
    return attend(value, None, spatial_shapes, None, locations.to(value.dtype), weights, im2col_step=64)


@torch.inference_mode()
def run_forward(attend: Callable, tensors: dict[str, torch.Tensor]):
    attend(**tensors)


def run_backward(attend: Callable, tensors: dict[str, torch.Tensor]):
    output = attend(**tensors)
    torch.autograd.grad(output, list(tensors.values()), torch.ones_like(output))


# ----------------------------------------------------- measuring -----------------------------------------------------


def measure(contestants: list[Contestant], rounds: int, device: torch.device):
    """Times of all contestants in turn, after a round that nobody counts; then their memory."""
    for number in tqdm(range(rounds + 1), desc="rounds", disable=None):
        for contestant in contestants:
            seconds = measure_time(contestant.step, device)
            if number > 0:
                contestant.seconds.append(seconds)
    for contestant in contestants:
        contestant.memory = measure_memory(contestant.step, device)


def measure_time(step: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_memory(step: Callable[[], object], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    # give back what the allocator keeps, and forget the peak so far
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_process_memory("VmRSS")
    step()
    return read_process_memory("VmHWM") - before


def read_process_memory(name: str) -> int:
    kilobytes = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    return 1024 * int(kilobytes)


def profile_step(step: Callable[[], object], device: torch.device) -> dict:
    """Seconds of one step by kind of operator, and how many operators it starts."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(NUM_PROFILED_STEPS):
            step()
        synchronize(device)
    seconds, calls = dict.fromkeys(OPERATOR_KINDS, 0.0), 0
    for event in profiler.key_averages():
        kind = next(kind for kind, pattern in OPERATOR_KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[kind] += microseconds / 1e6 / NUM_PROFILED_STEPS
        calls += event.count if event.key.startswith("aten::") else 0
    return {"seconds": seconds, "operators": calls // NUM_PROFILED_STEPS}


def name_library(device: str, dtype: str) -> str:
    """What multiplies matrices in `torch.nn.functional.linear`."""
    if device != "cpu":
        return "cuBLAS" if device.startswith("cuda") else device
    if dtype != "float32" and torch.backends.mkldnn.is_available():
        return "oneDNN"
    match = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"{match.group(1)} (default BLAS)" if match else "default BLAS"


def name_matrix_library(settings: dict, device: str) -> str:
    """What multiplies the matrices of a network, as far as it is known."""
    if settings["mode"] == "compiled":
        return "the compiler's choice"
    default, linear = name_library(device, settings["dtype"]), settings["linear"]
    if device != "cpu" or settings["dtype"] != "float32" or linear == "default":
        return default
    convolution = "oneDNN, 1x1 convolution"
    if linear == "onednn":
        return convolution
    rows = [str(rows) for rows in MEASURED_ROWS if is_onednn_faster(rows)]
    return f"{convolution} near {', '.join(rows)} rows, else {default}" if rows else default


def describe_machine(device: torch.device) -> dict[str, str | int]:
    libraries = re.findall(r"(?:Math Kernel Library Version|MKL-DNN v|OpenBLAS )\s*\S+", torch.__config__.show())
    machine = {
        "processor": find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "libraries": ", ".join(libraries),
        "allocator": describe_allocator(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
    }
    if device.type == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "TF32": str(torch.backends.cuda.matmul.allow_tf32),
        }
    return machine


def find_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match.group(1) if match else platform.processor() or platform.machine()


def describe_allocator() -> str:
    """The settings in the environment that make large allocations cheaper."""
    names = [name for name in os.environ if name == "LD_PRELOAD" or name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    return " ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "default"


# ------------------------------------------------------ reports ------------------------------------------------------


def summarize(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def compare(ours: Contestant, other: Contestant) -> dict:
    return {
        "measured": ours.settings,
        "beside": other.settings,
        "time": summarize([a / b for a, b in zip(ours.seconds, other.seconds, strict=True)]),
        "multiply_adds": ours.multiply_adds / other.multiply_adds if other.multiply_adds else None,
        "memory": ours.memory / other.memory if ours.memory and other.memory else None,
    }


def find_comparisons(contestants: list[Contestant]) -> list[dict]:
    """
    Every step of the first network beside the opponents of the same settings, beside its own fastest step in float32,
    and beside itself without checkpointing.
    """
    first = contestants[0].settings["network"]
    comparisons = []
    for ours in (contestant for contestant in contestants if contestant.settings["network"] == first):
        rivals = [other for other in contestants if is_rival(ours.settings, other.settings)]
        float32 = [
            other for other in contestants if is_same(ours, other, "network", "task", "batch size", "checkpointing")
        ]
        float32 = [other for other in float32 if other.settings["dtype"] == "float32"]
        if ours.settings["dtype"] != "float32" and float32:
            rivals.append(min(float32, key=lambda other: other.median))
        if ours.settings["checkpointing"] == "yes":
            keys = ("network", "task", "batch size", "dtype", "mode", "linear")
            rivals += [other for other in contestants if is_same(ours, other, *keys) and other is not ours]
        comparisons += [compare(ours, other) for other in rivals]
    return comparisons


def is_same(ours: Contestant, other: Contestant, *keys: str) -> bool:
    return all(ours.settings[key] == other.settings[key] for key in keys)


def is_rival(ours: dict, other: dict) -> bool:
    """Whether another network is measured in the same way; timm's linear layers are always the default ones."""
    keys = ["task", "batch size", "dtype", "mode"]
    if not other["network"].startswith("timm"):
        keys += ["linear", "checkpointing"]
    return ours["network"] != other["network"] and all(ours[key] == other[key] for key in keys)


def to_row(contestant: Contestant, peaks: list[Contestant]) -> dict:
    """A contestant as plain data."""
    row = {**contestant.settings, "seconds": summarize(contestant.seconds), "rounds": contestant.seconds}
    if contestant.multiply_adds:
        row["multiply_adds"] = contestant.multiply_adds
        row["multiply_adds_per_second"] = contestant.multiply_adds / contestant.median
    if "network" in contestant.settings:
        rates = [
            peak.multiply_adds / peak.median for peak in peaks if is_same(contestant, peak, "batch size", "dtype")
        ]
        row["images_per_second"] = contestant.settings["batch size"] / contestant.median
        row["of_peak"] = row["multiply_adds_per_second"] / max(rates)
    if contestant.memory is not None:
        row["memory"] = contestant.memory
    return row


def format_interval(values: dict[str, float], factor: float = 1) -> str:
    median, low, high = (factor * values[name] for name in ("median", "low", "high"))
    digits = max(0, 2 - math.floor(math.log10(max(median, 1e-9))))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def format_table(rows: list[dict[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[str(cell) for cell in row.values()] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def drop_constant(rows: list[dict], names: list[str]) -> tuple[list[dict], str]:
    """Columns of `names` that are the same in all rows, as text instead of columns."""
    constant = {name: rows[0][name] for name in names if len({row[name] for row in rows}) == 1}
    text = ", ".join(f"{name} {value}" for name, value in constant.items())
    return [{name: value for name, value in row.items() if name not in constant} for row in rows], text


def format_networks(report: dict) -> list[str]:
    names = ["task", "batch size", "dtype", "mode", "linear", "matrix library", "checkpointing"]
    rows = [
        {
            "network": row["network"],
            **{name: row[name] for name in names},
            "ms per step": format_interval(row["seconds"], 1000),
            "images/s": f"{row['images_per_second']:.3g}",
            "multiply-adds": f"{row['multiply_adds'] / 1e9:.4g} G",
            "per second": f"{row['multiply_adds_per_second'] / 1e9:.3g} G",
            "of peak": f"{row['of_peak']:.0%}",
            "memory": f"{row['memory'] / 2**20:.0f} MiB" if "memory" in row else "-",
        }
        for row in report["networks"]
    ]
    rows, constant = drop_constant(rows, names)
    lines = [f"All rows: {constant}.", ""] if constant else []
    lines += format_table(rows)
    products = [
        {
            "matrix products": row["products"],
            "batch size": row["batch size"],
            "dtype": row["dtype"],
            "multiply-adds per second": f"{row['multiply_adds_per_second'] / 1e9:.3g} G",
        }
        for row in report["products"]
    ]
    lines += ["", *format_table(products)]
    if "profile" in report["networks"][0]:
        lines += ["", *format_profile(report)]
    if report["comparisons"]:
        rows = [format_comparison(comparison) for comparison in report["comparisons"]]
        rows, constant = drop_constant(rows, ["task", "batch size", "dtype", "mode", "linear", "checkpointing"])
        lines += ["", f"{report['networks'][0]['network']} ({constant}) beside others:", "", *format_table(rows)]
    return lines


def format_profile(report: dict) -> list[str]:
    names = ["task", "batch size", "dtype", "mode", "linear", "checkpointing"]
    rows = [
        {
            "network": row["network"],
            **{name: row[name] for name in names},
            **{f"{kind}, ms": f"{1000 * seconds:.3g}" for kind, seconds in row["profile"]["seconds"].items()},
            "operators": row["profile"]["operators"],
        }
        for row in report["networks"]
    ]
    rows, constant = drop_constant(rows, names)
    return [f"Where the time goes ({constant}):", "", *format_table(rows)]


def format_comparison(comparison: dict) -> dict[str, str]:
    ours, other = comparison["measured"], comparison["beside"]
    different = [name for name in ("dtype", "mode", "linear", "checkpointing") if ours[name] != other[name]]
    beside = [other["network"]] if other["network"] != ours["network"] else []
    beside += [f"{name} {other[name]}" for name in different]
    return {
        **{name: ours[name] for name in ("task", "batch size", "dtype", "mode", "linear", "checkpointing")},
        "beside": ", ".join(beside),
        "ratio of times": format_interval(comparison["time"]),
        "of multiply-adds": f"{comparison['multiply_adds']:.2f}",
        "of memory": f"{comparison['memory']:.2f}" if comparison["memory"] else "-",
    }


def format_operators(report: dict) -> list[str]:
    rows = []
    # built in pairs
    pairs = zip(report["operators"][::2], report["operators"][1::2], report["comparisons"])
    for ours, other, comparison in pairs:
        settings = {name: value for name, value in comparison["measured"].items() if name != "implementation"}
        rows.append(
            {
                **settings,
                "ms": format_interval(ours["seconds"], 1000),
                "ms of Transformers": format_interval(other["seconds"], 1000),
                "ratio": format_interval(comparison["time"]),
            }
        )
    return format_table(rows)


def format_report(report: dict) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    tables = format_operators(report) if report["ops"] else format_networks(report)
    lines = [f"`{report['command']}`", "", f"Machine: {machine}.", "", *tables]
    return "\n".join(lines) + "\n"


def write_markdown(target: str, text: str):
    """Writes or replaces a file, or the part of it that belongs to this measurement."""
    file, _, name = target.partition("#")
    if name:
        text = replace_section(file, name, text)
    write(Path(file), text)


def replace_section(file: str, name: str, text: str) -> str:
    page = Path(file).read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{file} must hold {start} and {end} once each, around the place of the tables.")
    before, after = page.split(start)[0], page.split(end)[1]
    return f"{before}{start}\n{text}{end}{after}"


def write(path: Path, text: str):
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw(report: dict, path: Path):
    """Times per image with their quartiles: bars side by side for what is compared, one group for all its settings."""
    # only for pictures
    import matplotlib.pyplot as plt

    rows = report["operators"] if report["ops"] else report["networks"]
    settings = ("task", "batch size", "dtype", "mode", "checkpointing", "queries", "maps", "heads", "points")
    groups = name_rows(rows, settings)
    contestants = name_rows(rows, ("network", "linear", "implementation"))
    # in the order of the rows, each once
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    height = 0.8 / len(set(contestants))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.35 * len(rows)), layout="constrained")
    for number, name in enumerate(dict.fromkeys(contestants)):
        chosen = [k for k, contestant in enumerate(contestants) if contestant == name]
        times = [get_milliseconds_per_image(rows[k]) for k in chosen]
        low, median, high = ([time[key] for time in times] for key in ("low", "median", "high"))
        errors = [[b - a for a, b in zip(low, median)], [b - a for a, b in zip(median, high)]]
        axes.barh([places[groups[k]] + number * height for k in chosen], median, height, xerr=errors, label=name)
    middle = 0.4 - height / 2
    axes.set_yticks([place + middle for place in places.values()], places)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per image")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def name_rows(rows: list[dict], names: tuple[str, ...]) -> list[str]:
    """What tells the rows apart, as text; of a single kind of rows, all there is."""
    names = [name for name in names if name in rows[0]]
    different = [name for name in names if len({row[name] for row in rows}) > 1] or names
    return [
        ", ".join(str(row[name]) if isinstance(row[name], str) else f"{name} {row[name]}" for name in different)
        for row in rows
    ]


def get_milliseconds_per_image(row: dict) -> dict[str, float]:
    return {name: 1000 * seconds / row["batch size"] for name, seconds in row["seconds"].items()}


# -------------------------------------------------------- main -------------------------------------------------------


def check_outputs(args: argparse.Namespace):
    """Errors that would otherwise come after the measurement."""
    if args.markdown and "#" in args.markdown:
        file, _, name = args.markdown.partition("#")
        replace_section(file, name, "")
    if args.plot:
        import matplotlib  # noqa: F401


def run(args: argparse.Namespace) -> dict:
    """Measures; returns the report as plain data."""
    device = torch.device(args.device)
    config = load_config(args.variant)
    size = split_size(args.variant)[1] or config.image_size
    report = {"command": shlex.join(["python", "scripts/benchmark.py", *args.command]), "ops": args.ops}
    report["machine"] = describe_machine(device)
    if args.ops:
        contestants = build_operators(args, config, size)
        measure(contestants, args.rounds, device)
        report["operators"] = [to_row(contestant, []) for contestant in contestants]
        report["comparisons"] = compare_operators(contestants)
        return report
    contestants = build_contestants(args, find_networks(args))
    products = build_products(args, config, size)
    measure(contestants + products, args.rounds, device)
    report["networks"] = [to_row(contestant, products) for contestant in contestants]
    if args.profile:
        for row, contestant in zip(report["networks"], contestants, strict=True):
            row["profile"] = profile_step(contestant.step, device)
    report["products"] = [to_row(contestant, []) for contestant in products]
    report["comparisons"] = find_comparisons(contestants)
    return report


def compare_operators(contestants: list[Contestant]) -> list[dict]:
    # built in pairs
    return [compare(ours, other) for ours, other in zip(contestants[::2], contestants[1::2])]


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    linear_backend = get_linear_backend()
    try:
        check_outputs(args)
        report = run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        set_linear_backend(linear_backend)
    text = format_report(report)
    print(text)
    if args.json:
        write(args.json, json.dumps(report, indent=2) + "\n")
    if args.markdown:
        write_markdown(args.markdown, text)
    if args.plot:
        draw(report, args.plot)
    return report


if __name__ == "__main__":
    main()
