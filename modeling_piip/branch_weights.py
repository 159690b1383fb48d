# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Starting the branches of a PIIP network from pretrained single networks (Vision Transformers, BEiT, Uni-Perceiver,
ConvNeXt): the branches come from public checkpoints, everything else is new.
"""

import argparse
import difflib
import math
import os
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from .configuration_piip import PiipBranchConfig


# Only sources that are timm names need it.
try:
    import timm
except ImportError:
    timm = None

logger = logging.get_logger(__name__)

PATCH_KERNEL = "embeddings.patch_embeddings.weight"
POSITION_TABLE = "embeddings.position_embeddings"
CLS_TOKEN = "embeddings.cls_token"
VIDEO_TABLE = "embeddings.temporal_embeddings"
BIAS_TABLE = ".attention.relative_position_bias.table"

# Names without ".weight" and ".bias"; "*" is the index of the layer. timm's names are also those of the official DeiT,
# DeiT III (gamma_1, gamma_2), MAE and DINOv2 files and of the AugReg and InternViT-6B files of the official PIIP code.
TIMM_NAMES = {
    "cls_token": CLS_TOKEN,
    "pos_embed": POSITION_TABLE,
    "patch_embed.proj": "embeddings.patch_embeddings",
    "blocks.*.norm1": "layers.*.norm1",
    "blocks.*.attn.qkv": "layers.*.attention.qkv",
    "blocks.*.attn.q_norm": "layers.*.attention.q_norm",
    "blocks.*.attn.k_norm": "layers.*.attention.k_norm",
    "blocks.*.attn.proj": "layers.*.attention.projection",
    "blocks.*.ls1.gamma": "layers.*.layer_scale1.weight",
    "blocks.*.gamma_1": "layers.*.layer_scale1.weight",
    "blocks.*.norm2": "layers.*.norm2",
    "blocks.*.mlp.fc1": "layers.*.mlp.fc1",
    "blocks.*.mlp.fc2": "layers.*.mlp.fc2",
    "blocks.*.ls2.gamma": "layers.*.layer_scale2.weight",
    "blocks.*.gamma_2": "layers.*.layer_scale2.weight",
    "blocks.*.attn.q_bias": "layers.*.attention.q_bias",
    "blocks.*.attn.v_bias": "layers.*.attention.v_bias",
    "blocks.*.attn.relative_position_bias_table": "layers.*.attention.relative_position_bias.table",
}
# ViT, DeiT, ViTMAE (layernorm_before ...) and DINOv2 (norm1 ...), in the spelling of the classes and in that of the
# files. Separate queries, keys and values are fused afterwards.
TRANSFORMERS_NAMES = {
    CLS_TOKEN: CLS_TOKEN,
    POSITION_TABLE: POSITION_TABLE,
    "embeddings.patch_embeddings.projection": "embeddings.patch_embeddings",
    "layers.*.layernorm_before": "layers.*.norm1",
    "layers.*.norm1": "layers.*.norm1",
    "layers.*.attention.q_proj": "layers.*.attention.query",
    "layers.*.attention.k_proj": "layers.*.attention.key",
    "layers.*.attention.v_proj": "layers.*.attention.value",
    "layers.*.attention.o_proj": "layers.*.attention.projection",
    "layers.*.attention.attention.query": "layers.*.attention.query",
    "layers.*.attention.attention.key": "layers.*.attention.key",
    "layers.*.attention.attention.value": "layers.*.attention.value",
    "layers.*.attention.output.dense": "layers.*.attention.projection",
    "layers.*.layer_scale1.lambda1": "layers.*.layer_scale1.weight",
    "layers.*.layernorm_after": "layers.*.norm2",
    "layers.*.norm2": "layers.*.norm2",
    "layers.*.intermediate.dense": "layers.*.mlp.fc1",
    "layers.*.mlp.fc1": "layers.*.mlp.fc1",
    "layers.*.output.dense": "layers.*.mlp.fc2",
    "layers.*.mlp.fc2": "layers.*.mlp.fc2",
    "layers.*.layer_scale2.lambda1": "layers.*.layer_scale2.weight",
    "layers.*.lambda_1": "layers.*.layer_scale1.weight",
    "layers.*.lambda_2": "layers.*.layer_scale2.weight",
    "layers.*.relative_position_bias.relative_position_bias_table": "layers.*.attention.relative_position_bias.table",
    "layers.*.attention.attention.relative_position_bias.relative_position_bias_table": (
        "layers.*.attention.relative_position_bias.table"
    ),
}
# The files that the official PIIP code starts from
UNI_PERCEIVER_NAMES = {
    "visual_embed.patch_embed.proj": "embeddings.patch_embeddings",
    "visual_embed.patch_embed.spatial_pos_embed.weight": POSITION_TABLE,
    "visual_embed.patch_embed.temporal_pos_embed.weight": VIDEO_TABLE,
    "visual_embed.embeddings_norm": "embeddings.norm",
    "layers.*.self_attn.in_proj": "layers.*.attention.qkv",
    "layers.*.self_attn.out_proj": "layers.*.attention.projection",
    "layers.*.linear1": "layers.*.mlp.fc1",
    "layers.*.linear2": "layers.*.mlp.fc2",
    "layers.*.gamma_1": "layers.*.layer_scale1.weight",
    "layers.*.gamma_2": "layers.*.layer_scale2.weight",
}
SOURCE_NAMES = {**TIMM_NAMES, **TRANSFORMERS_NAMES, **UNI_PERCEIVER_NAMES}
# timm and Transformers; the stages become one list of layers, see `flatten_convnext_stages`
CONVNEXT_NAMES = {
    "stem.0": "embeddings.patch_embeddings",
    "stem.1": "embeddings.norm",
    "embeddings.patch_embeddings": "embeddings.patch_embeddings",
    "embeddings.layernorm": "embeddings.norm",
    "layers.*.0": "layers.*.norm",
    "layers.*.1": "layers.*.conv",
    "layers.*.conv_dw": "layers.*.depthwise_conv",
    "layers.*.norm": "layers.*.norm",
    "layers.*.mlp.fc1": "layers.*.fc1",
    "layers.*.mlp.fc2": "layers.*.fc2",
    "layers.*.gamma": "layers.*.layer_scale.weight",
    "layers.*.dwconv": "layers.*.depthwise_conv",
    "layers.*.layernorm": "layers.*.norm",
    "layers.*.pwconv1": "layers.*.fc1",
    "layers.*.pwconv2": "layers.*.fc2",
    "layers.*.layer_scale_parameter": "layers.*.layer_scale.weight",
}

# Prefixes of heads and wrappers around the ViT
WRAPPERS = re.compile(r"^((module|_orig_mod|backbone|beit|convnext|deit|dinov2|dinov2_with_registers|vit)\.)+")
# What follows the layers, and tokens that no branch has
UNUSED = re.compile(
    r"(norm|fc_norm|layernorm|pooler|attn_pool|clip_projector|head|head_dist|\w*classifier|decoder\w*)(\.|$)"
    r"|(embeddings\.)?(dist|distillation|reg|register|mask)_tokens?$"
    r"|.*relative_position_index$"
)
# A source may lack these: new gains are reported, new biases are zero, and a new class token learns its part.
OPTIONAL = re.compile(rf"{CLS_TOKEN}|embeddings\.patch_embeddings\.bias|.*\.(qkv\.bias|layer_scale[12]?\.weight)")

TIMM_MODULES = ["vision_transformer", "deit", "beit", "convnext"]
MODEL_TYPES = ["beit", "convnext", "deit", "dinov2", "dinov2_with_registers", "vit", "vit_mae"]
FILE_SUFFIXES = [".bin", ".pt", ".pth", ".safetensors"]
ACCEPTED_SOURCES = (
    "A source is the timm name of a plain ViT, BEiT or ConvNeXt ('vit_tiny_patch16_224.augreg_in21k'), a "
    f"folder or Hub id of a Transformers checkpoint ({', '.join(MODEL_TYPES)}), a local file "
    f"({', '.join(FILE_SUFFIXES)}) or None, which leaves the branch at its initialization."
)


def load_branches(model: PreTrainedModel, sources: list[str | os.PathLike | None]):
    """Loads one pretrained network into each branch of a freshly initialized PIIP model, with or without a head."""
    branches = model.config.branches
    if isinstance(sources, (str, os.PathLike)) or len(sources) != len(branches):
        raise ValueError(
            f"`sources` must be a list with one entry per branch ({len(branches)}), in the order of "
            f"`config.branches`, got {sources!r}. {ACCEPTED_SOURCES}"
        )
    report = [f"{type(model).__name__} starts from pretrained branches:"]
    for index, (source, branch) in enumerate(zip(sources, branches, strict=True)):
        try:
            summary = load_branch(model.base_model.branches[index], branch, source)
        except ValueError as error:
            raise ValueError(f"Branch {index} cannot start from {source!r}: {error}") from error
        report.append(f"  branch {index} (image size {branch.image_size}): {summary}")
    report.append(f"  new, to be trained: {', '.join(new_modules(model))}")
    logger.warning("\n".join(report))


def load_branch(module: nn.Module, branch: PiipBranchConfig, source: str | os.PathLike | None) -> str:
    """Loads one source into one branch and says what happened."""
    if source is None:
        return "no source, left at its initialization"
    source_weights, num_heads = read_source(os.fspath(source))
    weights, unused = rename_weights(source_weights, branch)
    fuse_query_key_value(weights)
    add_video_row(weights)
    if not branch.use_cls_token and weights.pop(CLS_TOKEN, None) is not None:
        unused.append("cls_token")
    resized = resize_embeddings(weights, branch, count_prefix_tokens(source_weights))
    missing = check_fit(weights, num_heads, module, branch)
    module.load_state_dict(weights, strict=False)
    parts = [
        f"{len(weights)} weights of {source}",
        *resized,
        f"left new: {enumerate_names(missing)}",
        f"not used: {enumerate_names(unused)}",
    ]
    return "; ".join(parts)


def read_source(source: str) -> tuple[dict[str, torch.Tensor], int | None]:
    """The state dict of a source and its number of attention heads if the source tells it."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path), None
    if path.is_dir():
        return read_transformers_checkpoint(str(path))
    name = source.removeprefix("hf-hub:").removeprefix("timm/")
    if is_timm_vit(name):
        model = timm.create_model(name, pretrained=True, num_classes=0)
        blocks = getattr(model, "blocks", [None])
        return model.state_dict(), getattr(getattr(blocks[0], "attn", None), "num_heads", None)
    if name == source and "/" in source and path.suffix not in FILE_SUFFIXES:
        return read_transformers_checkpoint(source)
    raise ValueError(f"there is no such source. {suggest_names(name)}{ACCEPTED_SOURCES}")


def is_timm_vit(name: str) -> bool:
    if timm is None or not timm.models.is_model_in_modules(name, TIMM_MODULES):
        return False
    return "." not in name or name in timm.list_pretrained()


def suggest_names(name: str) -> str:
    if timm is None:
        return "timm is not installed, so its names are not known: `pip install timm`. "
    names = timm.list_models() + timm.list_pretrained()
    names = [other for other in names if timm.models.is_model_in_modules(other, TIMM_MODULES)]
    close = difflib.get_close_matches(name, names, n=5)
    return f"Close names in timm: {', '.join(close)}. " if close else ""


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict, also one that a training script wrapped together with other things."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # training scripts like to save their command line beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"the file cannot be read: {error}") from error
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"the file holds no state dict but a {type(content).__name__}.")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def read_transformers_checkpoint(source: str) -> tuple[dict[str, torch.Tensor], int]:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"it is not a Transformers checkpoint: {error}\n{ACCEPTED_SOURCES}") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"`{config.model_type}` models fit no branch. {ACCEPTED_SOURCES}")
    model, info = AutoModel.from_pretrained(source, output_loading_info=True)
    # what the checkpoint lacks has just been initialized: that is no pretrained weight
    weights = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    return weights, getattr(config, "num_attention_heads", None)


def rename_weights(
    weights: dict[str, torch.Tensor], branch: PiipBranchConfig
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights under our names, and the names of what a branch leaves out."""
    is_convnext = branch.architecture == "convnext"
    names = CONVNEXT_NAMES if is_convnext else SOURCE_NAMES
    renamed, unused, unknown = {}, [], []
    for key, value in weights.items():
        key = WRAPPERS.sub("", key)
        flat = flatten_convnext_stages(key, branch.depths) if is_convnext else key.replace("encoder.layer.", "layers.")
        module, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", flat).groups("")
        index = re.search(r"(?<=layers\.)\d+|(?<=blocks\.)\d+", module)
        pattern = re.sub(r"(layers|blocks)\.\d+", r"\1.*", module, count=1)
        # tables of positions are embeddings in some sources: their ".weight" is not a leaf here
        name = names.get(pattern) or names.get(pattern + leaf)
        if name is not None:
            leaf = "" if pattern + leaf in names else leaf
            renamed[name.replace("*", index.group() if index else "") + leaf] = value
        elif match := UNUSED.match(key):
            unused.append(match.group().rstrip("."))
        else:
            unknown.append(f"`{key}` has no place in a branch")
    if branch.position_embedding_type == "absolute" and POSITION_TABLE not in renamed:
        unknown.append("it has no learned table of absolute positions")
    if unknown:
        raise ValueError(f"it is no network for this branch.{list_first(unknown)}\n{ACCEPTED_SOURCES}")
    return renamed, unused


def flatten_convnext_stages(key: str, depths: list[int]) -> str:
    """Blocks of all stages in one list, each downsampling layer in front of its stage, as in `PiipConvNextBranch`."""
    pattern = r"(?:encoder\.)?stages\.(\d+)\.(?:(downsample|downsampling_layer)|(?:blocks|layers)\.(\d+))\."

    def flatten(match: re.Match) -> str:
        stage = int(match[1])
        first = sum(depths[:stage]) + max(stage - 1, 0)
        return f"layers.{first if match[2] else first + (stage > 0) + int(match[3])}."

    return re.sub(pattern, flatten, key)


def fuse_query_key_value(weights: dict[str, torch.Tensor]):
    """Replaces separate queries, keys and values by the fused projection, in place."""
    for name in [name for name in weights if ".attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[name.replace(".query.", ".qkv.")] = torch.cat([weights.pop(part) for part in parts])
        elif name.endswith(".bias") and parts[2] in weights:
            # BEiT has no bias for keys
            weights[name.replace("query.bias", "q_bias")] = weights.pop(name)
            weights[name.replace("query.bias", "v_bias")] = weights.pop(parts[2])


def add_video_row(weights: dict[str, torch.Tensor]):
    """Uni-Perceiver adds the first row of a table for video frames to every patch of an image; in place."""
    table = weights.get(POSITION_TABLE)
    if table is not None and table.ndim == 2:
        weights[POSITION_TABLE] = (table + weights.pop(VIDEO_TABLE)[0]).unsqueeze(0)


def count_prefix_tokens(weights: dict[str, torch.Tensor]) -> int:
    """Class, distillation and register tokens of a source."""
    pattern = re.compile(r"(cls|dist|distillation|reg|register)_tokens?$")
    return sum(value.shape[1] for name, value in weights.items() if pattern.search(name) and value.ndim == 3)


def resize_embeddings(weights: dict[str, torch.Tensor], branch: PiipBranchConfig, num_prefix_tokens: int) -> list[str]:
    """Fits position table and patch kernel to a branch, in place, and says what changed."""
    changes = []
    if branch.position_embedding_type == "absolute":
        table_map = position_table_to_map(weights[POSITION_TABLE], num_prefix_tokens)
        grid = branch.position_embedding_grid
        weights[POSITION_TABLE] = resize_bicubic(table_map, grid).flatten(2).transpose(1, 2)
        if table_map.shape[-1] != grid:
            changes.append(f"position grid {table_map.shape[-1]} -> {grid}")
    if branch.position_embedding_type == "relative":
        changes += resize_bias_tables(weights, branch)
    kernel = weights.get(PATCH_KERNEL)
    if kernel is not None and kernel.ndim == 4:
        weights[PATCH_KERNEL] = resize_bicubic(kernel, branch.patch_size)
        if kernel.shape[-1] != branch.patch_size:
            changes.append(f"patch size {kernel.shape[-1]} -> {branch.patch_size}")
    return changes


def resize_bias_tables(weights: dict[str, torch.Tensor], branch: PiipBranchConfig) -> list[str]:
    """Fits the relative position biases to the windows of a branch, in place; entries of a class token are dropped."""
    changes = []
    for index, window_size in enumerate(branch.window_sizes):
        table = weights.get(f"layers.{index}{BIAS_TABLE}")
        if table is None:
            continue
        side, new_side = math.isqrt(len(table)), 2 * window_size - 1
        table_map = table[: side**2].transpose(0, 1).unflatten(1, (side, side)).unsqueeze(0)
        weights[f"layers.{index}{BIAS_TABLE}"] = resize_bicubic(table_map, new_side)[0].flatten(1).transpose(0, 1)
        if side != new_side:
            changes.append(f"window {(side + 1) // 2} -> {window_size}")
    return list(dict.fromkeys(changes))


def position_table_to_map(table: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """The entries of the patches as `(1, hidden_size, grid, grid)`; those of class and other tokens are dropped."""
    num_entries = table.shape[1] if table.ndim == 3 else 0
    grid = math.isqrt(num_entries)
    num_dropped = num_entries - grid**2
    # networks without a class token may still have its entry
    if grid == 0 or num_dropped > max(num_prefix_tokens, 1):
        raise ValueError(
            f"its position table of the shape {tuple(table.shape)} is no square grid of patches (and "
            f"{num_prefix_tokens} other tokens). Choose a source that was pretrained on square images."
        )
    return table[:, num_dropped:].transpose(1, 2).unflatten(2, (grid, grid))


def resize_bicubic(feature_map: torch.Tensor, size: int) -> torch.Tensor:
    if feature_map.shape[2:] == (size, size):
        return feature_map
    resized = F.interpolate(feature_map.float(), size=(size, size), mode="bicubic", align_corners=False)
    return resized.to(feature_map.dtype)


def check_fit(
    weights: dict[str, torch.Tensor], num_heads: int | None, module: nn.Module, branch: PiipBranchConfig
) -> list[str]:
    """Refuses whatever would make the branch another network than its source; returns what the source lacks."""
    expected = {name: value.shape for name, value in module.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    problems = []
    if num_heads not in (None, branch.num_attention_heads):
        problems.append(f"it has {num_heads} attention heads, the branch {branch.num_attention_heads}")
    problems += [
        f"`{name}` has the shape {tuple(value.shape)} in the source and {tuple(expected[name])} in the branch"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name]
    ]
    problems += [f"`{name}` has no place in this branch" for name in weights if name not in expected]
    problems += [f"`{name}` is missing in the source" for name in missing if not OPTIONAL.fullmatch(name)]
    if problems:
        remedy = suggest_options(weights, num_heads, branch)
        raise ValueError(f"the weights do not fit.{list_first(problems)}\n{remedy}")
    return missing


def suggest_options(weights: dict[str, torch.Tensor], num_heads: int | None, branch: PiipBranchConfig) -> str:
    """The options of a branch that would fit a source."""
    width = weights.get("layers.0.norm1.weight")
    mlp = weights.get("layers.0.mlp.fc1.weight")
    if width is None or mlp is None:
        return ACCEPTED_SOURCES
    width = len(width)
    options = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        "num_attention_heads": num_heads or branch.num_attention_heads,
        "mlp_ratio": len(mlp) / width,
        "qkv_bias": "qv" if "layers.0.attention.q_bias" in weights else "layers.0.attention.qkv.bias" in weights,
        "qk_norm": "layers.0.attention.q_norm.weight" in weights,
        "norm_type": "layernorm" if "layers.0.norm1.bias" in weights else "rmsnorm",
    }
    if "layers.0.layer_scale1.weight" in weights and branch.layer_scale_init_value is None:
        options["layer_scale_init_value"] = 1.0
    changes = [f"{name}={value!r}" for name, value in options.items() if getattr(branch, name) != value]
    if not changes:
        return f"Choose another source. {ACCEPTED_SOURCES}"
    return f"Set {', '.join(changes)} in the configuration of this branch, or choose another source."


def list_first(problems: list[str], limit: int = 8) -> str:
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "".join(f"\n  {line}" for line in problems[:limit] + more)


def enumerate_names(names: list[str]) -> str:
    """Names without layer numbers, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"layers\.\d+\.", "", name) for name in names)) or "nothing"


def new_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the branches that have weights."""
    children = dict(model.named_children()) | dict(model.base_model.named_children())
    names = [name for name, module in children.items() if any(True for _ in module.parameters())]
    return [name for name in names if name not in ("branches", model.base_model_prefix)]
