# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Official PIIP configurations and checkpoints (https://github.com/OpenGVLab/PIIP) to ours.

This is the only place that knows the official names. The official code numbers the branches from the largest network
to the smallest, ours from the highest resolution to the lowest: official branch `b` of `n` is our branch `n - b`.
"""

import argparse
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from .configuration_piip import PiipBranchConfig, PiipConfig, find_variant
from .files import check_output_dir, new_folder
from .image_processing_piip import PiipImageProcessor
from .modeling_piip import PiipBackbone, PiipForImageClassification, PiipPreTrainedModel


logger = logging.get_logger(__name__)

CODEBASES = ("classification", "detection", "segmentation")
OFFICIAL_REPOSITORY = "OpenGVLab/PIIP"
BASELINE_TYPES = ("vit_models", "InternViT6B")

# What the official constructors assume where a configuration is silent
INTERACTION_DEFAULTS = {
    "n_points": 4,
    "deform_num_heads": 6,
    "with_cffn": False,
    "cffn_ratio": 0.25,
    "deform_ratio": 1.0,
    "interact_attn_type": "normal",
    "interaction_drop_path_rate": 0.3,
    "interaction_proj": True,
    "norm_layer": None,
}
VIT_DEFAULTS = {
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "init_scale": 1e-4,
    "drop_path_rate": 0.0,
    "use_flash_attn": False,
    "window_attn": False,
    "window_size": -1,
    "Mlp_block": None,
}
INTERN_VIT_DEFAULTS = {
    "embed_dim": 3200,
    "depth": 48,
    "num_heads": 25,
    "mlp_ratio": 4,
    "qkv_bias": False,
    "drop_path_rate": 0.0,
    "window_attn": False,
    "window_size": 14,
    "mlp_type": "regular",
}
INTERN_VIT_CLASSIFICATION_DEFAULTS = {
    "patch_size": 16,
    "init_values": None,
    "qk_normalization": False,
    "norm_layer_type": "ln",
}
INTERN_VIT_DENSE_DEFAULTS = {
    "patch_size": 14,
    "init_values": 0.1,
    "qk_normalization": True,
    "norm_layer_type": "RMSNorm",
}

# Official branch keys to ours, applied in this order
BRANCH_RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.proj\.", ".attention.projection."),
    (r"\.attn\.", ".attention."),
    (r"\.gamma_(\d)$", r".layer_scale\1.weight"),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.weight"),
)
INJECTOR_RENAMES = (
    (r"^ca_gamma$", "attention_gate"),
    (r"^cffn_gamma$", "ffn_gate"),
    (r"^feat_norm\.", "feature_norm."),
    (r"^attn\.proj\.", "attention.projection."),
    (r"^attn\.wq\.", "attention.query."),
    (r"^attn\.wk\.", "attention.key."),
    (r"^attn\.wv\.", "attention.value."),
    (r"^attn\.", "attention."),
    (r"^ffn\.dwconv\.dwconv\.", "ffn.depthwise_conv."),
)
MODEL_CLASSES = {model_class.__name__: model_class for model_class in (PiipBackbone, PiipForImageClassification)}
# Modules of official checkpoints outside the backbone, and what they belong to
HEAD_PREFIXES = {
    "neck.": "the neck of the detector",
    "rpn_head.": "Mask R-CNN",
    "roi_head.": "Mask R-CNN",
    "bbox_head.": "DINO",
    "decode_head.": "UperNet",
    "auxiliary_head.": "UperNet",
}


class ConversionError(ValueError):
    """An official configuration or checkpoint does not fit; nothing was written."""


# ------------------------------------------------- configuration -------------------------------------------------


def infer_codebase(backbone: dict) -> str:
    """Which of the three official code bases a backbone dictionary comes from."""
    branches = get_official_branches(backbone)
    names = {name for branch in branches for name in branch}
    if "real_size" in names:
        return "segmentation" if "img_size" in names else "detection"
    if backbone.get("type") in BASELINE_TYPES and backbone.get("with_fpn"):
        return "segmentation" if "img_size" in backbone else "detection"
    if "img_size" in names and backbone.get("type") not in BASELINE_TYPES:
        return "classification"
    raise ConversionError(
        "Cannot tell which official code base the configuration comes from. Say it: one of "
        + ", ".join(CODEBASES)
        + "."
    )


def get_official_branches(backbone: dict) -> list[dict]:
    """The branch dictionaries in official order; a single-branch baseline is its own branch."""
    branches = [backbone[f"branch{b}"] for b in range(1, 5) if backbone.get(f"branch{b}")]
    return branches or [backbone]


def uses_intern_vit(branch: dict, codebase: str) -> bool:
    """Whether the official code builds a branch with its InternViT class rather than its DeiT class."""
    if branch.get("type") in BASELINE_TYPES:
        return branch["type"] == "InternViT6B"
    if codebase == "classification":
        model_type = branch.get("model_type", "deit")
        if model_type not in ("deit", "augreg"):
            raise ConversionError(f"Unknown `model_type` {model_type!r} of a branch: expected 'deit' or 'augreg'.")
        return model_type == "augreg"
    pretrained = branch.get("pretrained")
    if not isinstance(pretrained, str):
        raise ConversionError(
            "The official code chooses the network of a branch by the text of its `pretrained` entry, for example "
            f"'deit' or 'intern_vit'; got {pretrained!r}."
        )
    if "deit" in pretrained:
        return False
    for family in ("beit", "perceiver", "convnext"):
        if family in pretrained:
            raise ConversionError(
                f"Branches of the family '{family}' are not supported yet (`pretrained` {pretrained!r})."
            )
    return True


def convert_window_sizes(attributes: dict) -> list[int | None]:
    depth = attributes["depth"]
    flags, sizes = (
        value if isinstance(value, list) else [value] * depth
        for value in (attributes["window_attn"] or False, attributes["window_size"] or -1)
    )
    return [size if flag else None for flag, size in zip(flags, sizes, strict=True)]


def convert_stages(interaction_indexes: list[list[int]], depth: int) -> list[int]:
    """Inclusive ranges of official block indices to numbers of layers."""
    covered = [index for first, last in interaction_indexes for index in range(first, last + 1)]
    if covered != list(range(depth)):
        raise ConversionError(
            f"`interaction_indexes` {interaction_indexes} of a branch do not run through its {depth} blocks in order."
        )
    return [last - first + 1 for first, last in interaction_indexes]


def convert_branch(branch: dict, codebase: str) -> PiipBranchConfig:
    """A branch (or a single-branch baseline) of an official configuration."""
    is_intern_vit = uses_intern_vit(branch, codebase)
    if is_intern_vit:
        dense = codebase != "classification"
        defaults = INTERN_VIT_DEFAULTS | (INTERN_VIT_DENSE_DEFAULTS if dense else INTERN_VIT_CLASSIFICATION_DEFAULTS)
        attributes = defaults | branch
        options = {
            "qk_norm": attributes["qk_normalization"],
            "norm_type": "rmsnorm" if attributes["norm_layer_type"] == "RMSNorm" else "layernorm",
            "layer_scale_init_value": attributes["init_values"] or None,
            "hidden_act": "gelu_pytorch_tanh" if attributes["mlp_type"] == "fused_mlp" else "gelu",
            "drop_path_schedule": "linear" if dense else "constant",
        }
    else:
        attributes = VIT_DEFAULTS | branch
        options = {
            "layer_scale_init_value": attributes["init_scale"],
            "hidden_act": "gelu_pytorch_tanh" if attributes["Mlp_block"] == "fused_mlp" else "gelu",
            "window_padding": "tokens" if attributes["use_flash_attn"] else "qkv",
        }
    pretrain_size = attributes.get("pretrain_img_size", 224)
    image_size = attributes.get("real_size", attributes.get("img_size", pretrain_size))
    table_size = pretrain_size if codebase == "detection" else attributes.get("img_size", 224)
    if "interaction_indexes" in attributes:
        options["stages"] = convert_stages(attributes["interaction_indexes"], attributes["depth"])
    return PiipBranchConfig(
        image_size=image_size,
        patch_size=attributes["patch_size"],
        hidden_size=attributes["embed_dim"],
        num_hidden_layers=attributes["depth"],
        num_attention_heads=attributes["num_heads"],
        mlp_ratio=attributes["mlp_ratio"],
        qkv_bias=attributes["qkv_bias"],
        position_embedding_grid=table_size // attributes["patch_size"],
        window_size=convert_window_sizes(attributes),
        use_cls_token=attributes.get("use_cls_token", codebase == "classification"),
        drop_path_rate=attributes["drop_path_rate"],
        **options,
    )


def build_fourth_branch(branches: list[dict], width: int | None) -> dict:
    """
    The official detection code builds its fourth branch from the settings of the third; only `real_size` and
    `interaction_indexes` are its own. A checkpoint may come from a repaired version: then its `width` tells.
    """
    third, fourth = branches[2], branches[3]
    if width is not None and width != third["embed_dim"] and width == fourth["embed_dim"]:
        logger.info("The fourth branch of the checkpoint is %d wide: built from the settings of `branch4`.", width)
        return fourth
    logger.info("The fourth branch is built from the settings of `branch3`, as the official detection code does.")
    return third | {name: fourth[name] for name in ("real_size", "interaction_indexes")}


def convert_interactions(backbone: dict) -> dict:
    attributes = INTERACTION_DEFAULTS | backbone
    attention = {"deform": "deformable", "normal": "cross"}.get(attributes["interact_attn_type"])
    if attention is None:
        raise ConversionError(
            f"Unknown `interact_attn_type` {attributes['interact_attn_type']!r}: expected 'deform' or 'normal'."
        )
    return {
        "interaction_attention": attention,
        "interaction_num_heads": attributes["deform_num_heads"],
        "interaction_num_points": attributes["n_points"],
        "interaction_value_ratio": attributes["deform_ratio"],
        "interaction_projection": attributes["interaction_proj"],
        "interaction_norm": attributes["norm_layer"] != "none",
        "interaction_ffn_ratio": attributes["cffn_ratio"] if attributes["with_cffn"] else 0,
        "interaction_drop_path_rate": attributes["interaction_drop_path_rate"],
    }


def convert_config(
    official: dict, codebase: str | None = None, state_dict: dict | None = None
) -> tuple[PiipConfig, type[PiipPreTrainedModel]]:
    """
    Our configuration and model class for an official one.

    Args:
        official (`dict`):
            The official `model` dictionary or its `backbone` entry.
        codebase (`str`, *optional*):
            `"classification"`, `"detection"` or `"segmentation"`; inferred when omitted and unambiguous.
        state_dict (`dict`, *optional*):
            The official weights. Needed only where the configuration alone does not tell: the width of the fourth
            branch of detectors.

    Raises:
        ConversionError: If the configuration is not understood.
    """
    backbone = official.get("backbone", official)
    if codebase is None:
        codebase = infer_codebase(backbone)
    if backbone.get("with_simple_fpn", True) is False:
        raise ConversionError("Regular pyramids (`with_simple_fpn=False`) are not supported yet.")
    branches = get_official_branches(backbone)
    if codebase == "detection" and len(branches) == 4:
        weight = (state_dict or {}).get("branch4.patch_embed.proj.weight")
        branches = branches[:3] + [build_fourth_branch(branches, None if weight is None else weight.shape[0])]
    options = {"branches": [convert_branch(branch, codebase) for branch in reversed(branches)]}

    if backbone.get("type") in BASELINE_TYPES:
        if codebase == "classification" or not backbone.get("with_fpn"):
            raise ConversionError("Single-branch baselines are supported as dense backbones (`with_fpn=True`).")
        return PiipConfig(**options, merge_type="concat", pyramid_norm="layer"), PiipBackbone

    options |= convert_interactions(backbone)
    if codebase != "classification":
        levels = ["p3", "p4", "p5"] if backbone.get("is_dino") else ["p2", "p3", "p4", "p5"]
        return PiipConfig(**options, merge_type="conv", out_features=levels), PiipBackbone
    if backbone.get("separate_head"):
        options |= {"merge_type": "concat", "num_labels": branches[0].get("num_classes", 1000)}
    else:
        options |= {"merge_type": "linear", "num_labels": backbone.get("num_classes", 1000)}
    return PiipConfig(**options), PiipForImageClassification


# ---------------------------------------------------- weights ----------------------------------------------------


def load_official_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads the weights of an official `.pth` or DeepSpeed `mp_rank_00_model_states.pt` file, unwraps them and drops the
    prefixes of wrappers. Only tensors and plain data are unpickled.
    """
    # The training state beside the weights holds the command line and NumPy scalars, pickled by old NumPy versions
    scalar = np.float64(0).__reduce__()[0]
    harmless = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, scalar, (scalar, "numpy.core.multiarray.scalar")]
    with torch.serialization.safe_globals(harmless):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return unwrap_state_dict(checkpoint)


def unwrap_state_dict(checkpoint: dict) -> dict[str, torch.Tensor]:
    """Descends through `state_dict`, `model` and `module`, and strips `module.` and `backbone.` from the keys."""
    for name in ("state_dict", "model", "module"):
        if isinstance(checkpoint.get(name), dict):
            return unwrap_state_dict(checkpoint[name])
    state_dict = {name.removeprefix("module."): value for name, value in checkpoint.items()}
    return {name.removeprefix("backbone."): value for name, value in state_dict.items()}


def apply_renames(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def rename_interaction(match: re.Match, num_branches: int) -> str:
    stage, coarse, fine, source, kind, rest = match.groups()
    # `12` are official branches 1 (coarse) and 2 (fine); inside a unit they are always called 1 and 2
    direction = "fine_to_coarse" if source == "2" else "coarse_to_fine"
    unit = f"piip.interactions.{stage}.units.{num_branches - int(fine)}.{direction}"
    if kind == "proj":
        return f"{unit}_projection.{rest}"
    return f"{unit}.{apply_renames(rest, INJECTOR_RENAMES)}"


def rename_merge(match: re.Match, num_branches: int, merge_type: str) -> str:
    branch, rest = match.groups()
    if merge_type == "linear":
        # a bare norm for official branch 1, else norm, permute, linear, permute, norm
        rest = f"0.{rest}" if branch == "1" else re.sub(r"^\d", lambda index: str(int(index[0]) // 2), rest)
    return f"piip.merge.branches.{num_branches - int(branch)}.layers.{rest}"


def rename_key(name: str, config: PiipConfig) -> str:
    """Name of an official backbone or classifier parameter in our models with a head."""
    num_branches = len(config.branches)
    if match := re.fullmatch(r"branch(\d)\.(norm|head)\.(.+)", name):
        layer = {"norm": "norm", "head": "linear"}[match[2]]
        return f"classifiers.{num_branches - int(match[1])}.{layer}.{match[3]}"
    if match := re.fullmatch(r"branch(\d)\.(.+)", name):
        return f"piip.branches.{num_branches - int(match[1])}.{apply_renames(match[2], BRANCH_RENAMES)}"
    pattern = r"interactions\.(\d+)\.interaction_units_(\d)(\d)\.branch(\d)to\d_(proj|injector)\.(.+)"
    if match := re.fullmatch(pattern, name):
        return rename_interaction(match, num_branches)
    if match := re.fullmatch(r"w(\d)", name):
        return f"piip.merge.branches.{num_branches - int(match[1])}.scale"
    if match := re.fullmatch(r"merge_branch(\d)\.(.+)", name):
        return rename_merge(match, num_branches, config.merge_type)
    if match := re.fullmatch(r"cls_(norm|head)\.(.+)", name):
        return f"classifiers.0.{'norm' if match[1] == 'norm' else 'linear'}.{match[2]}"
    if match := re.fullmatch(r"(?:fpn|up)([12])\.(.+)", name):
        if match[1] == "1":
            return f"feature_pyramid.levels.p2.{match[2]}"
        return f"feature_pyramid.levels.p3.{match[2].removeprefix('0.')}"
    return f"piip.branches.0.{apply_renames(name, BRANCH_RENAMES)}"


def fit_shape(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Differences in layout: weights of branches have a dimension, tables have no unused entry for a class token."""
    if name.endswith(".scale") and value.ndim == 0:
        return value.reshape(1)
    if name.endswith(".position_embeddings") and value.shape[1] == shape[1] + 1:
        return value[:, 1:]
    return value


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], model: PiipPreTrainedModel
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Official weights under our names.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Official weights as `load_official_checkpoint` returns them.
        model ([`PiipPreTrainedModel`]):
            The model they are for (on the meta device is enough).

    Returns:
        The converted weights and the official names that were left out on purpose: heads that are converted into
        another model class, and modules that the official code builds but never uses.

    Raises:
        ConversionError: If a weight is unknown, missing or has another shape; the message lists all of them.
    """
    expected = {name: value.shape for name, value in model.state_dict().items()}
    converted, left_out, problems = {}, [], []
    for official_name, value in state_dict.items():
        name = rename_key(official_name, model.config)
        unused = official_name.startswith("fpn1.") and "p2" not in model.config.out_features
        if unused or official_name.startswith(tuple(HEAD_PREFIXES)):
            left_out.append(official_name)
        elif name not in expected:
            problems.append(f"unknown    {official_name} {tuple(value.shape)}")
        else:
            value = fit_shape(name, value, expected[name])
            if value.shape != expected[name]:
                problems.append(f"misshapen  {official_name} {tuple(value.shape)}, expected {tuple(expected[name])}")
            converted[name] = value
    problems += [f"missing    {name} {tuple(expected[name])}" for name in expected if name not in converted]
    if problems:
        raise ConversionError(
            f"The checkpoint does not fit the configuration: {len(problems)} problems.\n  " + "\n  ".join(problems)
        )
    return converted, left_out


# --------------------------------------------------- checkpoints --------------------------------------------------


def build_image_processor(config: PiipConfig, codebase: str) -> PiipImageProcessor:
    """The preprocessing of the official configurations of a code base, for the resolution of `config`."""
    size = config.image_size
    if codebase == "classification":
        return PiipImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    options = {"do_center_crop": False, "resample": PILImageResampling.BILINEAR}
    if codebase == "segmentation":
        return PiipImageProcessor(size={"shortest_edge": size}, **options)
    # the single-scale policy: 800 x 1333 pixels, scaled to the longest side of this model
    size = {"shortest_edge": size * 800 // 1333, "longest_edge": size}
    return PiipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, **options)


def convert_checkpoint(
    official: dict, checkpoint: str | Path, output_dir: str | Path, codebase: str | None = None
) -> list[str]:
    """
    Writes a folder that `from_pretrained` loads: weights, configuration, image processor and code.

    Args:
        official (`dict`):
            The official `model` dictionary or its `backbone` entry.
        checkpoint (`str` or `Path`):
            The official weights.
        output_dir (`str` or `Path`):
            New or empty folder; it appears only when everything is written.
        codebase (`str`, *optional*):
            See `convert_config`.

    Returns:
        Official names that were left out, see `convert_state_dict`.

    Raises:
        FileExistsError: If `output_dir` holds something.
        ConversionError: If configuration and weights are not understood or do not fit each other.
    """
    check_output_dir(output_dir)
    state_dict = load_official_checkpoint(checkpoint)
    codebase = codebase or infer_codebase(official.get("backbone", official))
    config, model_class = convert_config(official, codebase, state_dict)
    return save_converted(config, model_class, state_dict, build_image_processor(config, codebase), output_dir)


def convert_variant_checkpoint(variant: str, checkpoint: str | Path | None, output_dir: str | Path) -> list[str]:
    """
    The same for a published variant. Without `checkpoint` the official weights are downloaded from the repository that
    the official table links to.
    """
    check_output_dir(output_dir)
    folder = find_variant(variant)
    config = PiipConfig.from_pretrained(folder)
    if checkpoint is None:
        checkpoint = hf_hub_download(OFFICIAL_REPOSITORY, config.official_checkpoint)
    # the backbone is what can be converted of a variant whose head is not built yet
    model_class = MODEL_CLASSES.get(config.architectures[0], PiipBackbone)
    processor = PiipImageProcessor.from_pretrained(folder)
    return save_converted(config, model_class, load_official_checkpoint(checkpoint), processor, output_dir)


def save_converted(
    config: PiipConfig,
    model_class: type[PiipPreTrainedModel],
    state_dict: dict[str, torch.Tensor],
    processor: PiipImageProcessor,
    output_dir: str | Path,
) -> list[str]:
    with torch.device("meta"):
        model = model_class(config)
    converted, left_out = convert_state_dict(state_dict, model)
    model.load_state_dict(converted, assign=True)
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return left_out


def describe_left_out(names: list[str]) -> list[str]:
    """One line per group of official weights that were left out, saying why."""
    groups: dict[str, int] = {}
    for name in names:
        prefix = next((prefix for prefix in HEAD_PREFIXES if name.startswith(prefix)), None)
        reason = (
            f"{prefix}* belongs to {HEAD_PREFIXES[prefix]}" if prefix else "fpn1.* is never used by the official code"
        )
        groups[reason] = groups.get(reason, 0) + 1
    return [f"Left out {count} weights: {reason}." for reason, count in groups.items()]
