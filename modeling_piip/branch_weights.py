# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Starting the branches of a PIIP network from pretrained single Vision Transformers: the branches come from public
checkpoints, everything else is new.
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
}
SOURCE_NAMES = {**TIMM_NAMES, **TRANSFORMERS_NAMES}

# Prefixes of heads and wrappers around the ViT
WRAPPERS = re.compile(r"^((module|_orig_mod|backbone|vit|deit|dinov2|dinov2_with_registers)\.)+")
# What follows the layers, and tokens that no branch has
UNUSED = re.compile(
    r"(norm|fc_norm|layernorm|pooler|attn_pool|clip_projector|head|head_dist|\w*classifier|decoder\w*)(\.|$)"
    r"|(embeddings\.)?(dist|distillation|reg|register|mask)_tokens?$"
)
# A source may lack these: new gains are reported, new biases are zero, and a new class token learns its part.
OPTIONAL = re.compile(rf"{CLS_TOKEN}|embeddings\.patch_embeddings\.bias|.*\.(qkv\.bias|layer_scale[12]\.weight)")

TIMM_MODULES = ["vision_transformer", "deit"]
MODEL_TYPES = ["deit", "dinov2", "dinov2_with_registers", "vit", "vit_mae"]
FILE_SUFFIXES = [".bin", ".pt", ".pth", ".safetensors"]
ACCEPTED_SOURCES = (
    "A source is the timm name of a plain ViT ('vit_tiny_patch16_224.augreg_in21k', 'deit_small_patch16_224'), a "
    f"folder or Hub id of a Transformers checkpoint ({', '.join(MODEL_TYPES)}), a local file "
    f"({', '.join(FILE_SUFFIXES)}) or None, which leaves the branch at its initialization."
)


def load_branches(model: PreTrainedModel, sources: list[str | os.PathLike | None]):
    """Loads one pretrained ViT into each branch of a freshly initialized PIIP model, with or without a head."""
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
    weights, unused = rename_weights(source_weights)
    fuse_query_key_value(weights)
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
        return model.state_dict(), getattr(getattr(model.blocks[0], "attn", None), "num_heads", None)
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
        raise ValueError(f"`{config.model_type}` models are no plain ViTs. {ACCEPTED_SOURCES}")
    model, info = AutoModel.from_pretrained(source, output_loading_info=True)
    # what the checkpoint lacks has just been initialized: that is no pretrained weight
    weights = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    return weights, config.num_attention_heads


def rename_weights(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights under our names, and the names of what a branch leaves out."""
    renamed, unused, unknown = {}, [], []
    for key, value in weights.items():
        key = WRAPPERS.sub("", key)
        module, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", key.replace("encoder.layer.", "layers.")).groups("")
        index = re.search(r"\.(\d+)\.", module)
        name = SOURCE_NAMES.get(re.sub(r"\.\d+\.", ".*.", module, count=1))
        if name is not None:
            renamed[name.replace("*", index.group(1) if index else "") + leaf] = value
        elif match := UNUSED.match(key):
            unused.append(match.group().rstrip("."))
        else:
            unknown.append(f"`{key}` has no place in a branch")
    if POSITION_TABLE not in renamed:
        unknown.append("it has no learned table of absolute positions")
    if unknown:
        raise ValueError(f"it is no plain ViT.{list_first(unknown)}\n{ACCEPTED_SOURCES}")
    return renamed, unused


def fuse_query_key_value(weights: dict[str, torch.Tensor]):
    """Replaces separate queries, keys and values by the fused projection, in place."""
    for name in [name for name in weights if ".attention.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[name.replace(".query.", ".qkv.")] = torch.cat([weights.pop(part) for part in parts])


def count_prefix_tokens(weights: dict[str, torch.Tensor]) -> int:
    """Class, distillation and register tokens of a source."""
    pattern = re.compile(r"(cls|dist|distillation|reg|register)_tokens?$")
    return sum(value.shape[1] for name, value in weights.items() if pattern.search(name) and value.ndim == 3)


def resize_embeddings(weights: dict[str, torch.Tensor], branch: PiipBranchConfig, num_prefix_tokens: int) -> list[str]:
    """Fits position table and patch kernel to a branch, in place, and says what changed."""
    changes = []
    table_map = position_table_to_map(weights[POSITION_TABLE], num_prefix_tokens)
    grid = branch.position_embedding_grid
    weights[POSITION_TABLE] = resize_bicubic(table_map, grid).flatten(2).transpose(1, 2)
    if table_map.shape[-1] != grid:
        changes.append(f"position grid {table_map.shape[-1]} -> {grid}")
    kernel = weights.get(PATCH_KERNEL)
    if kernel is not None and kernel.ndim == 4:
        weights[PATCH_KERNEL] = resize_bicubic(kernel, branch.patch_size)
        if kernel.shape[-1] != branch.patch_size:
            changes.append(f"patch size {kernel.shape[-1]} -> {branch.patch_size}")
    return changes


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
        "qkv_bias": "layers.0.attention.qkv.bias" in weights,
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
