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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from .configuration_piip import PiipBranchConfig, PiipConfig, find_variant
from .files import check_output_dir, new_folder
from .image_processing_piip import PiipImageProcessor
from .image_processing_piip_instance_segmentation import PiipInstanceSegmentationImageProcessor
from .model_cards import read_variant_card, render_generic_card
from .modeling_piip import PiipBackbone, PiipForImageClassification, PiipPreTrainedModel
from .modeling_piip_instance_segmentation import PiipForInstanceSegmentation
from .modeling_piip_object_detection import PiipForObjectDetection
from .modeling_piip_semantic_segmentation import PiipForSemanticSegmentation


logger = logging.get_logger(__name__)

CODEBASES = ("classification", "detection", "segmentation")
OFFICIAL_REPOSITORY = "OpenGVLab/PIIP"
# Families of single-branch baselines by their official class
BASELINE_TYPES = {"vit_models": "vit", "InternViT6B": "intern_vit", "ConvNextHFWrapper": "convnext"}
# The detector with three branches chooses the network of a branch by a text in its `pretrained` entry
FAMILY_TEXTS = {"deit": "vit", "beit": "beit", "perceiver": "uni_perceiver", "convnext": "convnext"}

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
BASE_DEFAULTS = {
    "patch_size": 16,
    "pretrain_img_size": 224,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "drop_path_rate": 0.0,
    "window_attn": False,
    "window_size": 14,
}
VIT_DEFAULTS = BASE_DEFAULTS | {"init_scale": 1e-4, "use_flash_attn": False, "Mlp_block": None}
BEIT_DEFAULTS = BASE_DEFAULTS | {"init_values": None, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": False}
UNI_PERCEIVER_DEFAULTS = BASE_DEFAULTS | {"qkv_bias": True}
INTERN_VIT_DEFAULTS = BASE_DEFAULTS | {"embed_dim": 3200, "depth": 48, "num_heads": 25, "mlp_type": "regular"}
INTERN_VIT_CODEBASE_DEFAULTS = {
    "classification": {"init_values": None, "qk_normalization": False, "norm_layer_type": "ln"},
    "detection": {"patch_size": 14, "init_values": 0.1, "qk_normalization": True, "norm_layer_type": "RMSNorm"},
    "segmentation": {"patch_size": 14, "init_values": 0.1, "qk_normalization": True, "norm_layer_type": "RMSNorm"},
}
# Depths and widths of the Hugging Face checkpoints that the official code names
CONVNEXT_SIZES = {
    "tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
    "xlarge": ([3, 3, 27, 3], [256, 512, 1024, 2048]),
}

# Official branch keys to ours, applied in this order
VIT_RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^visual_embed\.patch_embed\.spatial_pos_embed\.weight$", "embeddings.position_embeddings"),
    (r"^visual_embed\.embeddings_norm\.", "embeddings.norm."),
    (r"^(?:visual_embed\.)?patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.table"),
    (r"\.attn\.proj\.", ".attention.projection."),
    (r"\.attn\.", ".attention."),
    (r"\.self_attn\.in_proj\.", ".attention.qkv."),
    (r"\.self_attn\.out_proj\.", ".attention.projection."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.gamma_(\d)$", r".layer_scale\1.weight"),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.weight"),
)
CONVNEXT_RENAMES = (
    (r"^convnext_model\.", ""),
    (r"^embeddings\.layernorm\.", "embeddings.norm."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv(\d)\.", r".fc\1."),
    (r"\.layer_scale_parameter$", ".layer_scale.weight"),
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
UPER_NET_RENAMES = (
    (r"\.psp_modules\.(\d+)\.1\.", r".pool_convs.\1."),
    (r"\.bottleneck\.", ".top_conv."),
    (r"\.fpn_bottleneck\.", ".fusion_conv."),
    (r"\.convs\.0\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"\.conv_seg\.", ".classifier."),
)
MASK_RCNN_RENAMES = (
    (r"\.lateral_convs\.(\d)\.conv\.", r".inner_blocks.\1.0."),
    (r"\.fpn_convs\.(\d)\.conv\.", r".layer_blocks.\1.0."),
    (r"\.rpn_conv\.", ".conv."),
    (r"\.rpn_cls\.", ".objectness."),
    (r"\.rpn_reg\.", ".deltas."),
    (r"\.bbox_head\.", ".box_head."),
    (r"\.shared_fcs\.0\.", ".fc1."),
    (r"\.shared_fcs\.1\.", ".fc2."),
    (r"\.fc_cls\.", ".classifier."),
    (r"\.fc_reg\.", ".deltas."),
    (r"\.convs\.(\d)\.conv\.", r".convs.\1."),
    (r"\.conv_logits\.", ".classifier."),
)
DINO_RENAMES = (
    (r"^neck\.convs\.(\d)\.conv\.", r"neck.convs.\1."),
    (r"^neck\.convs\.(\d)\.gn\.", r"neck.norms.\1."),
    # behind the levels "p3", "p4" and "p5", which all official DINOs have
    (r"^neck\.extra_convs\.0\.conv\.", "neck.convs.3."),
    (r"^neck\.extra_convs\.0\.gn\.", "neck.norms.3."),
    (r"^bbox_head\.(?:transformer\.)?", ""),
    (r"^level_embeds$", "encoder.positions.levels.weight"),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.norms\.0\.", r"\1.attention_norm."),
    (r"^(encoder\.layers\.\d+)\.norms\.1\.", r"\1.ffn_norm."),
    (r"\.attentions\.0\.attn\.out_proj\.", ".self_attention.projection."),
    (r"\.attentions\.0\.attn\.", ".self_attention."),
    (r"\.attentions\.1\.", ".cross_attention."),
    (r"^(decoder\.layers\.\d+)\.norms\.0\.", r"\1.self_attention_norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.1\.", r"\1.cross_attention_norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.2\.", r"\1.ffn_norm."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".ffn.0."),
    (r"\.ffns\.0\.layers\.1\.", ".ffn.2."),
    (r"\.ref_point_head\.", ".position_mlp."),
    (r"^enc_output\.", "query_selection.projection."),
    (r"^enc_output_norm\.", "query_selection.norm."),
    (r"^query_embed\.", "query_selection.contents."),
    (r"^label_embedding\.", "denoising.labels."),
    (r"^cls_branches\.(\d+)\.", r"decoder.heads.\1.classifier."),
    (r"^reg_branches\.(\d+)\.", r"decoder.heads.\1.box_regressor."),
)
# Our settings of DINO, where they are in the official configuration, and the only values of others
DINO_ENTRIES = {
    "hidden_size": "neck.out_channels",
    "num_queries": "bbox_head.num_query",
    "encoder_layers": "bbox_head.transformer.encoder.num_layers",
    "decoder_layers": "bbox_head.transformer.decoder.num_layers",
    "intermediate_size": "bbox_head.transformer.encoder.transformerlayers.feedforward_channels",
    "position_temperature": "bbox_head.positional_encoding.temperature",
    "num_denoising_queries": "bbox_head.dn_cfg.group_cfg.num_dn_queries",
    "label_noise_ratio": "bbox_head.dn_cfg.noise_scale.label",
    "box_noise_scale": "bbox_head.dn_cfg.noise_scale.box",
    "class_cost": "train_cfg.assigner.cls_cost.weight",
    "bbox_cost": "train_cfg.assigner.reg_cost.weight",
    "giou_cost": "train_cfg.assigner.iou_cost.weight",
    "class_loss_coefficient": "bbox_head.loss_cls.loss_weight",
    "bbox_loss_coefficient": "bbox_head.loss_bbox.loss_weight",
    "giou_loss_coefficient": "bbox_head.loss_iou.loss_weight",
    "focal_alpha": "bbox_head.loss_cls.alpha",
    "focal_gamma": "bbox_head.loss_cls.gamma",
}
DINO_SETTINGS = {"type": "DINOHead", "as_two_stage": True, "with_box_refine": True}
# The only settings of the official segmentation heads that ours have
DECODE_HEAD_SETTINGS = {"type": "UPerHead", "in_index": [0, 1, 2, 3], "align_corners": False}
AUXILIARY_HEAD_SETTINGS = {
    "type": "FCNHead",
    "in_index": 2,
    "num_convs": 1,
    "concat_input": False,
    "align_corners": False,
}
# Our settings of Mask R-CNN, where they are in the official configuration, and the only values of others
MASK_RCNN_ENTRIES = {
    "hidden_size": "neck.out_channels",
    "anchor_ratios": "rpn_head.anchor_generator.ratios",
    "rpn_fg_iou_thresh": "train_cfg.rpn.assigner.pos_iou_thr",
    "rpn_bg_iou_thresh": "train_cfg.rpn.assigner.neg_iou_thr",
    "rpn_batch_size_per_image": "train_cfg.rpn.sampler.num",
    "rpn_positive_fraction": "train_cfg.rpn.sampler.pos_fraction",
    "rpn_pre_nms_top_n_train": "train_cfg.rpn_proposal.nms_pre",
    "rpn_pre_nms_top_n_test": "test_cfg.rpn.nms_pre",
    "rpn_post_nms_top_n_train": "train_cfg.rpn_proposal.max_per_img",
    "rpn_post_nms_top_n_test": "test_cfg.rpn.max_per_img",
    "rpn_nms_thresh": "test_cfg.rpn.nms.iou_threshold",
    "box_pool_size": "roi_head.bbox_head.roi_feat_size",
    "box_hidden_size": "roi_head.bbox_head.fc_out_channels",
    "box_coder_stds": "roi_head.bbox_head.bbox_coder.target_stds",
    "box_fg_iou_thresh": "train_cfg.rcnn.assigner.pos_iou_thr",
    "box_bg_iou_thresh": "train_cfg.rcnn.assigner.neg_iou_thr",
    "box_batch_size_per_image": "train_cfg.rcnn.sampler.num",
    "box_positive_fraction": "train_cfg.rcnn.sampler.pos_fraction",
    "box_score_thresh": "test_cfg.rcnn.score_thr",
    "box_nms_thresh": "test_cfg.rcnn.nms.iou_threshold",
    "max_detections": "test_cfg.rcnn.max_per_img",
    "mask_pool_size": "roi_head.mask_roi_extractor.roi_layer.output_size",
    "mask_num_convs": "roi_head.mask_head.num_convs",
}
MASK_RCNN_SETTINGS = {
    "neck": {"type": "FPN", "num_outs": 5},
    "rpn_head": {"type": "RPNHead"},
    "rpn_head.bbox_coder": {"target_stds": [1.0, 1.0, 1.0, 1.0]},
    "rpn_head.loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    "roi_head": {"type": "StandardRoIHead"},
    "roi_head.bbox_head": {"type": "Shared2FCBBoxHead", "reg_class_agnostic": False},
    "roi_head.bbox_head.loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
    "roi_head.mask_head": {"type": "FCNMaskHead"},
}
MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (
        PiipBackbone,
        PiipForImageClassification,
        PiipForInstanceSegmentation,
        PiipForObjectDetection,
        PiipForSemanticSegmentation,
    )
}
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


def get_official_branches(backbone: dict) -> list[dict]:
    """The branch dictionaries in official order; a single-branch baseline is its own branch."""
    branches = [backbone[f"branch{b}"] for b in range(1, 5) if backbone.get(f"branch{b}")]
    return branches or [backbone]


def infer_codebase(backbone: dict) -> str:
    """Which of the three official code bases a backbone dictionary comes from."""
    is_baseline = backbone.get("type") in BASELINE_TYPES
    names = {name for branch in get_official_branches(backbone) for name in branch}
    if "real_size" in names or (is_baseline and backbone.get("with_fpn")):
        return "segmentation" if "img_size" in names else "detection"
    if "img_size" in names and not is_baseline:
        return "classification"
    raise ConversionError(
        f"Cannot tell which official code base the configuration comes from: say it, one of {', '.join(CODEBASES)}."
    )


def get_family(branch: dict, codebase: str, num_branches: int) -> str:
    """Which network the official code builds a branch with."""
    if branch.get("type") in BASELINE_TYPES:
        return BASELINE_TYPES[branch["type"]]
    if codebase == "classification":
        model_type = branch.get("model_type", "deit")
        if model_type not in ("deit", "augreg"):
            raise ConversionError(f"Unknown `model_type` {model_type!r} of a branch: expected 'deit' or 'augreg'.")
        return "vit" if model_type == "deit" else "intern_vit"
    pretrained = branch.get("pretrained")
    if not isinstance(pretrained, str):
        raise ConversionError(
            "The official code chooses the network of a branch by the text of its `pretrained` entry, for example "
            f"'deit' or 'intern_vit'; got {pretrained!r}."
        )
    # the other pyramids know DeiT and InternViT only
    texts = FAMILY_TEXTS if codebase == "detection" and num_branches == 3 else {"deit": "vit"}
    return next((family for text, family in texts.items() if text in pretrained), "intern_vit")


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


def convert_vit_options(attributes: dict, codebase: str) -> dict:
    return {
        "qkv_bias": attributes["qkv_bias"],
        "layer_scale_init_value": attributes["init_scale"],
        "hidden_act": "gelu_pytorch_tanh" if attributes["Mlp_block"] == "fused_mlp" else "gelu",
        "window_padding": "tokens" if attributes["use_flash_attn"] else "qkv",
    }


def convert_intern_vit_options(attributes: dict, codebase: str) -> dict:
    return {
        "qkv_bias": attributes["qkv_bias"],
        "qk_norm": attributes["qk_normalization"],
        "norm_type": "rmsnorm" if attributes["norm_layer_type"] == "RMSNorm" else "layernorm",
        "layer_scale_init_value": attributes["init_values"] or None,
        "hidden_act": "gelu_pytorch_tanh" if attributes["mlp_type"] == "fused_mlp" else "gelu",
        "drop_path_schedule": "constant" if codebase == "classification" else "linear",
    }


def convert_beit_options(attributes: dict, codebase: str) -> dict:
    if attributes["use_abs_pos_emb"] or attributes["use_shared_rel_pos_bias"]:
        raise ConversionError("BEiT branches are supported with one relative position bias per layer only.")
    return {
        "qkv_bias": "qv" if attributes["qkv_bias"] else False,
        "layer_scale_init_value": attributes["init_values"],
        "position_embedding_type": "relative",
        "drop_path_schedule": "linear",
    }


def convert_uni_perceiver_options(attributes: dict, codebase: str) -> dict:
    return {
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 0.0,
        "embedding_norm": True,
        "drop_path_schedule": "linear",
    }


# Per family of ViTs: what the official constructor assumes, and the options that only it has
VIT_FAMILIES = {
    "vit": (VIT_DEFAULTS, convert_vit_options),
    "intern_vit": (INTERN_VIT_DEFAULTS, convert_intern_vit_options),
    "beit": (BEIT_DEFAULTS, convert_beit_options),
    "uni_perceiver": (UNI_PERCEIVER_DEFAULTS, convert_uni_perceiver_options),
}


def convert_vit_branch(branch: dict, family: str, codebase: str) -> PiipBranchConfig:
    """A branch (or a single-branch baseline) of an official configuration whose network is a ViT."""
    defaults, convert_options = VIT_FAMILIES[family]
    if family == "intern_vit":
        defaults = defaults | INTERN_VIT_CODEBASE_DEFAULTS[codebase]
    attributes = defaults | branch
    options = convert_options(attributes, codebase)
    if options.get("position_embedding_type") != "relative":
        # only the detection code resizes its tables while it runs
        table_size = attributes["pretrain_img_size"] if codebase == "detection" else attributes.get("img_size", 224)
        options["position_embedding_grid"] = table_size // attributes["patch_size"]
    if "interaction_indexes" in attributes:
        options["stages"] = convert_stages(attributes["interaction_indexes"], attributes["depth"])
    return PiipBranchConfig(
        image_size=attributes.get("real_size", attributes.get("img_size", attributes["pretrain_img_size"])),
        patch_size=attributes["patch_size"],
        hidden_size=attributes["embed_dim"],
        num_hidden_layers=attributes["depth"],
        num_attention_heads=attributes["num_heads"],
        mlp_ratio=attributes["mlp_ratio"],
        window_size=convert_window_sizes(attributes),
        use_cls_token=attributes.get("use_cls_token", codebase == "classification"),
        drop_path_rate=attributes["drop_path_rate"],
        **options,
    )


def get_convnext_sizes(pretrained: str, state_dict: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Depths and widths of a ConvNeXt: from the weights of its branch if there are any, else from its name."""
    depths, hidden_sizes = {}, {}
    for name, value in state_dict.items():
        if match := re.search(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.bias$", name):
            stage = int(match[1])
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
            hidden_sizes[stage] = value.shape[0]
    if depths:
        return [depths[stage] for stage in sorted(depths)], [hidden_sizes[stage] for stage in sorted(depths)]
    for size, sizes in CONVNEXT_SIZES.items():
        if f"-{size}-" in pretrained:
            return sizes
    raise ConversionError(f"Unknown ConvNeXt {pretrained!r}: expected a size among {', '.join(CONVNEXT_SIZES)}.")


def convert_convnext_branch(branch: dict, state_dict: dict[str, torch.Tensor]) -> PiipBranchConfig:
    depths, hidden_sizes = get_convnext_sizes(branch["pretrained"], state_dict)
    if "interaction_indexes" in branch:
        stages = convert_stages(branch["interaction_indexes"], sum(depths) + len(depths) - 1)
    else:
        stages = [depth + (k > 0) for k, depth in enumerate(depths)]
    return PiipBranchConfig(
        architecture="convnext",
        image_size=branch["real_size"],
        depths=depths,
        hidden_sizes=hidden_sizes,
        layer_scale_init_value=1e-6,
        drop_path_rate=branch.get("drop_path_rate") or 0.0,
        drop_path_schedule="linear",
        stages=stages,
    )


def convert_branches(branches: list[dict], codebase: str, state_dict: dict) -> list[PiipBranchConfig]:
    """Branches in official order to ours in our order."""
    converted = []
    for number, branch in enumerate(branches, start=1):
        family = get_family(branch, codebase, len(branches))
        if family == "convnext":
            prefix = f"branch{number}." if len(branches) > 1 else ""
            weights = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
            converted.append(convert_convnext_branch(branch, weights))
        else:
            converted.append(convert_vit_branch(branch, family, codebase))
    return converted[::-1]


def build_fourth_branch(branches: list[dict], state_dict: dict[str, torch.Tensor]) -> dict:
    """
    The official detection code builds its fourth branch from the settings of the third; only `real_size` and
    `interaction_indexes` are its own. A checkpoint may come from a repaired version: then its shapes tell.
    """
    third, fourth = branches[2], branches[3]
    bias = state_dict.get("branch4.patch_embed.proj.bias")
    if bias is not None and bias.shape[0] != third["embed_dim"] and bias.shape[0] == fourth["embed_dim"]:
        logger.warning("The fourth branch is %d wide: it has the settings of `branch4`.", bias.shape[0])
        return fourth
    logger.warning(
        "The fourth branch is %d wide: it has the settings of `branch3`, as the official detection code builds it.",
        third["embed_dim"],
    )
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


def convert_baseline_merge(backbone: dict, codebase: str) -> dict:
    if backbone["type"] == "ConvNextHFWrapper":
        # the outputs of its four stages
        return {"merge_type": "concat", "merge_stages": [0, 1, 2]}
    if codebase == "classification" or not backbone.get("with_fpn"):
        raise ConversionError("Single-branch baselines are supported as dense backbones (`with_fpn=True`).")
    return {"merge_type": "concat", "pyramid_norm": "layer"}


def convert_classification_merge(backbone: dict) -> dict:
    if backbone.get("separate_head"):
        return {"merge_type": "concat", "num_labels": backbone["branch1"].get("num_classes", 1000)}
    return {"merge_type": "linear", "num_labels": backbone.get("num_classes", 1000)}


def convert_dense_merge(backbone: dict) -> dict:
    levels = ["p3", "p4", "p5"] if backbone.get("is_dino") else ["p2", "p3", "p4", "p5"]
    if backbone.get("with_simple_fpn", True):
        return {"merge_type": "conv", "out_features": levels}
    stages = list(backbone["out_interaction_indexes"])
    return {"merge_type": "single_conv", "merge_stages": stages, "out_features": levels}


def check_settings(options: dict, expected: dict, part: str):
    for name, value in expected.items():
        if options.get(name) != value:
            raise ConversionError(f"`{name}` of `{part}` is {options.get(name)!r}: only {value!r} is supported.")


def get_side(size: list[int], name: str) -> int:
    if len(set(size)) != 1:
        raise ConversionError(f"`{name}` of `test_cfg` is {size}: only squares are supported.")
    return size[0]


def convert_uper_net(segmentor: dict) -> dict:
    """Head, number of classes and inference of an official segmentor."""
    decode_head, auxiliary_head = segmentor["decode_head"], segmentor.get("auxiliary_head")
    check_settings(decode_head, DECODE_HEAD_SETTINGS, "decode_head")
    uper_net = {
        "hidden_size": get_entry(segmentor, "decode_head.channels"),
        "pool_scales": list(get_entry(segmentor, "decode_head.pool_scales")),
        "dropout": get_entry(segmentor, "decode_head.dropout_ratio"),
        "use_auxiliary_head": auxiliary_head is not None,
    }
    if auxiliary_head is not None:
        settings = AUXILIARY_HEAD_SETTINGS | {"dropout_ratio": uper_net["dropout"]}
        check_settings(auxiliary_head, settings, "auxiliary_head")
        uper_net["auxiliary_hidden_size"] = get_entry(segmentor, "auxiliary_head.channels")
        uper_net["auxiliary_loss_weight"] = get_entry(segmentor, "auxiliary_head.loss_decode.loss_weight")
    uper_net["inference_mode"] = get_entry(segmentor, "test_cfg.mode") if segmentor.get("test_cfg") else "whole"
    if uper_net["inference_mode"] == "slide":
        uper_net |= {
            name: get_side(get_entry(segmentor, f"test_cfg.{name}"), name) for name in ("crop_size", "stride")
        }
    return {"uper_net": uper_net, "num_labels": get_entry(segmentor, "decode_head.num_classes")}


def convert_mask_rcnn(detector: dict) -> dict:
    """
    Head and number of classes of an official Mask R-CNN. Its classes keep their order: the background is last in both.
    """
    for part, settings in MASK_RCNN_SETTINGS.items():
        check_settings(get_entry(detector, part), settings, part)
    scales = get_entry(detector, "rpn_head.anchor_generator.scales")
    if len(scales) != 1:
        raise ConversionError(f"`rpn_head.anchor_generator.scales` is {scales}: only one scale is supported.")
    mask_rcnn = {name: get_entry(detector, path) for name, path in MASK_RCNN_ENTRIES.items()}
    return {
        "mask_rcnn": mask_rcnn | {"anchor_scale": scales[0]},
        "num_labels": get_entry(detector, "roi_head.bbox_head.num_classes"),
    }


def get_entry(options: dict, path: str):
    """Entry of nested dictionaries, its keys separated by dots."""
    for name in path.split("."):
        if not isinstance(options, dict) or name not in options:
            raise ConversionError(f"The configuration lacks `{path}`.")
        options = options[name]
    return options


def convert_dino(detector: dict) -> dict:
    """Head and number of classes of an official DINO."""
    check_settings(get_entry(detector, "bbox_head"), DINO_SETTINGS, "bbox_head")
    self_attention, cross_attention = get_entry(detector, "bbox_head.transformer.decoder.transformerlayers.attn_cfgs")
    dino = {name: get_entry(detector, path) for name, path in DINO_ENTRIES.items()}
    dino["num_attention_heads"] = get_entry(self_attention, "num_heads")
    dino["num_points"] = cross_attention.get("num_points", 4)
    return {"dino": dino, "num_labels": get_entry(detector, "bbox_head.num_classes")}


def convert_config(
    official: dict, codebase: str | None = None, state_dict: dict | None = None
) -> tuple[PiipConfig, type[PiipPreTrainedModel]]:
    """
    Our configuration and model class for an official one.

    Args:
        official (`dict`):
            The official `model` dictionary or its `backbone` entry. A segmentor with its `decode_head` becomes a
            [`PiipForSemanticSegmentation`].
        codebase (`str`, *optional*):
            `"classification"`, `"detection"` or `"segmentation"`; inferred when omitted and unambiguous.
        state_dict (`dict`, *optional*):
            The official weights. They tell what the configuration alone does not: the width of the fourth branch of
            detectors and the size of a ConvNeXt with an unknown name.

    Raises:
        ConversionError: If the configuration is not understood.
    """
    backbone = official.get("backbone", official)
    state_dict = state_dict or {}
    codebase = codebase or infer_codebase(backbone)
    branches = get_official_branches(backbone)
    if codebase == "segmentation" and len(branches) == 3:
        raise ConversionError(
            "The official segmentation code scales the images of three branches relative to the second one; no "
            "published model does so, and it is not supported."
        )
    if codebase == "detection" and len(branches) == 4:
        branches = [*branches[:3], build_fourth_branch(branches, state_dict)]
    options = {"branches": convert_branches(branches, codebase, state_dict)}
    if backbone.get("type") in BASELINE_TYPES:
        options |= convert_baseline_merge(backbone, codebase)
    else:
        options |= convert_interactions(backbone)
        convert_merge = convert_classification_merge if codebase == "classification" else convert_dense_merge
        options |= convert_merge(backbone)
    if codebase == "classification":
        return PiipConfig(**options), PiipForImageClassification
    if "decode_head" in official:
        return PiipConfig(**options, **convert_uper_net(official)), PiipForSemanticSegmentation
    if official.get("type") == "MaskRCNN":
        return PiipConfig(**options, **convert_mask_rcnn(official)), PiipForInstanceSegmentation
    if official.get("type") == "DINO":
        return PiipConfig(**options, **convert_dino(official)), PiipForObjectDetection
    return PiipConfig(**options), PiipBackbone


# ---------------------------------------------------- weights ----------------------------------------------------


def read_official_file(path: str | Path) -> dict:
    """
    The content of an official `.pth` or DeepSpeed `mp_rank_00_model_states.pt` file. Only tensors and plain data are
    unpickled.
    """
    # The training state beside the weights holds the command line, NumPy scalars and the colours of mmsegmentation in
    # a NumPy array, pickled by old NumPy versions
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    harmless = [argparse.Namespace, np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Int64DType, scalar, array]
    old_names = [(scalar, "numpy.core.multiarray.scalar"), (array, "numpy.core.multiarray._reconstruct")]
    with torch.serialization.safe_globals(harmless + old_names):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def load_official_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads the weights of an official file, unwraps them and drops the prefixes of wrappers."""
    return unwrap_state_dict(read_official_file(path))


def unwrap_state_dict(checkpoint: dict) -> dict[str, torch.Tensor]:
    """Descends through `state_dict`, `model` and `module`, and strips `module.` and `backbone.` from the keys."""
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"The checkpoint holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    for name in ("state_dict", "model", "module"):
        if isinstance(checkpoint.get(name), dict):
            return unwrap_state_dict(checkpoint[name])
    state_dict = {name.removeprefix("module."): value for name, value in checkpoint.items()}
    return {name.removeprefix("backbone."): value for name, value in state_dict.items()}


def set_class_names(config: PiipConfig, checkpoint: dict):
    """Takes the names of the classes that mmdetection and mmsegmentation write beside the weights, if they fit."""
    meta = checkpoint.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return
    if len(names) == len(set(names)) == config.num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: class_id for class_id, name in enumerate(names)}


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


def rename_merge(branch: str, rest: str, merge: int, config: PiipConfig) -> str:
    if config.merge_type == "linear":
        # a bare norm for official branch 1, else norm, permute, linear, permute, norm
        rest = f"0.{rest}" if branch == "1" else re.sub(r"^\d", lambda index: str(int(index[0]) // 2), rest)
    return f"piip.merges.{merge}.branches.{len(config.branches) - int(branch)}.layers.{rest}"


def rename_branch(name: str, branch: PiipBranchConfig) -> str:
    if branch.architecture == "vit":
        return apply_renames(name, VIT_RENAMES)

    def flatten(match: re.Match) -> str:
        """Blocks of all stages in one list, each downsampling layer in front of its stage."""
        stage, kind, index = int(match[1]), match[2], int(match[3])
        first = sum(branch.depths[:stage]) + max(stage - 1, 0)
        if kind == "downsampling_layer":
            return f"layers.{first}.{'norm' if index == 0 else 'conv'}"
        return f"layers.{first + (stage > 0) + index}"

    name = re.sub(r"encoder\.stages\.(\d+)\.(downsampling_layer|layers)\.(\d+)", flatten, name)
    return apply_renames(name, CONVNEXT_RENAMES)


def rename_dino(name: str, config: PiipConfig) -> str:
    # the official code has the head of the encoder behind those of the decoder
    encoder_head = f"decoder.heads.{config.dino.decoder_layers}."
    return apply_renames(name, DINO_RENAMES).replace(encoder_head, "query_selection.head.")


def rename_head(name: str, config: PiipConfig) -> str:
    if name.startswith(("decode_head.", "auxiliary_head.")):
        return apply_renames(name, UPER_NET_RENAMES)
    if name.startswith(("neck.lateral_convs.", "neck.fpn_convs.", "rpn_head.", "roi_head.")):
        return apply_renames(name, MASK_RCNN_RENAMES)
    return rename_dino(name, config)


def rename_key(name: str, config: PiipConfig) -> str:
    """Name of an official parameter in our models with a head."""
    num_branches = len(config.branches)
    if name.startswith(tuple(HEAD_PREFIXES)):
        return rename_head(name, config)
    if match := re.fullmatch(r"branch(\d)\.(norm|head)\.(.+)", name):
        layer = {"norm": "norm", "head": "linear"}[match[2]]
        return f"classifiers.{num_branches - int(match[1])}.{layer}.{match[3]}"
    if match := re.fullmatch(r"branch(\d)\.(.+)", name):
        index = num_branches - int(match[1])
        return f"piip.branches.{index}.{rename_branch(match[2], config.branches[index])}"
    pattern = r"interactions\.(\d+)\.interaction_units_(\d)(\d)\.branch(\d)to\d_(proj|injector)\.(.+)"
    if match := re.fullmatch(pattern, name):
        return rename_interaction(match, num_branches)
    if match := re.fullmatch(r"(?:intermediate_merging_(\d+)_|merge_)?(?:w|branch)(\d)(?:\.(.+))?", name):
        stage = config.num_stages - 1 if match[1] is None else int(match[1])
        merge = config.all_merge_stages.index(stage)
        if match[3] is None:
            return f"piip.merges.{merge}.branches.{num_branches - int(match[2])}.scale"
        return rename_merge(match[2], match[3], merge, config)
    if match := re.fullmatch(r"cls_(norm|head)\.(.+)", name):
        return f"classifiers.0.{'norm' if match[1] == 'norm' else 'linear'}.{match[2]}"
    if match := re.fullmatch(r"(?:fpn|up)([12])\.(.+)", name):
        if match[1] == "1":
            return f"feature_pyramid.levels.p2.{match[2]}"
        return f"feature_pyramid.levels.p3.{match[2].removeprefix('0.')}"
    return f"piip.branches.0.{rename_branch(name, config.branches[0])}"


def fold_temporal_embeddings(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Uni-Perceiver adds the first row of a table for video frames to every patch of an image. A constant survives the
    resizing of the position table, so the row goes into it.
    """
    suffix = "temporal_pos_embed.weight"
    folded = {name: value for name, value in state_dict.items() if not name.endswith(suffix)}
    for name in state_dict.keys() - folded.keys():
        table = name.replace("temporal", "spatial")
        folded[table] = (folded[table] + state_dict[name][0]).unsqueeze(0)
    return folded


def split_attention_projections(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DINO's queries and keys come from other states than the values, so that ours has two projections for them."""
    split = {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r"(bbox_head\..+)\.in_proj_(weight|bias)", name):
            size = value.shape[0] // 3
            split[f"{match[1]}.query_key.{match[2]}"] = value[: 2 * size]
            split[f"{match[1]}.value.{match[2]}"] = value[2 * size :]
        else:
            split[name] = value
    return split


def is_never_used(name: str, config: PiipConfig) -> bool:
    """Modules that the official code builds and never runs, and buffers that we compute."""
    if name.endswith(".relative_position_index") or "convnext_model.layernorm." in name:
        return True
    return name.startswith("fpn1.") and "p2" not in config.out_features


def is_foreign_head(name: str, model: PiipPreTrainedModel) -> bool:
    """Whether a weight belongs to a head of the official detectors and segmenters that the model does not have."""
    # the parts of DINO have no module around them in ours
    part = "decoder" if name.startswith("bbox_head.") else name.split(".")[0]
    return name.startswith(tuple(HEAD_PREFIXES)) and getattr(model, part, None) is None


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
    converted, problems = {}, []
    state_dict = fold_temporal_embeddings(state_dict)
    left_out = [name for name in state_dict if is_never_used(name, model.config) or is_foreign_head(name, model)]
    kept = {name: value for name, value in state_dict.items() if name not in set(left_out)}
    for official_name, value in split_attention_projections(kept).items():
        name = rename_key(official_name, model.config)
        if name not in expected:
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


def get_pad_size_divisor(branches: list[PiipBranchConfig]) -> int:
    """What the official Mask R-CNNs with such branches pad to: whole windows of pyramids of plain ViTs."""
    if len(branches) == 1 or any(branch.qk_norm for branch in branches):
        return 64
    return 32 if any(branch.architecture == "convnext" for branch in branches) else 224


def build_image_processor(config: PiipConfig, codebase: str) -> PiipImageProcessor:
    """The preprocessing of the official configurations of a code base, for the resolution of `config`."""
    size = config.image_size
    if codebase == "classification":
        return PiipImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    options = {"do_center_crop": False, "resample": PILImageResampling.BILINEAR}
    if codebase == "segmentation":
        # of ADE20K, where 0 is no class; the longer side has a limit that no photo reaches, which rounds the sizes
        size = {"shortest_edge": size, "longest_edge": 16 * size}
        return PiipImageProcessor(size=size, do_reduce_labels=True, **options)
    if config.dino is not None:
        # the multi-scale policy: 800 x 1333 pixels for a model of 1024, scaled to this model
        size = {"shortest_edge": size * 800 // 1024, "longest_edge": size * 1333 // 1024}
        if any(branch.norm_type == "rmsnorm" for branch in config.branches):
            # with InternViT
            options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "pad_size_divisor": 64}
        else:
            options |= {"pad_size_divisor": 224}
        return PiipImageProcessor(size=size, do_pad=True, **options)
    # the single-scale policy: 800 x 1333 pixels, scaled to the longest side of this model
    size = {"shortest_edge": size * 800 // 1333, "longest_edge": size}
    if config.mask_rcnn is not None:
        return PiipInstanceSegmentationImageProcessor(
            size=size, pad_size_divisor=get_pad_size_divisor(config.branches)
        )
    return PiipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, **options)


def convert_checkpoint(
    official: dict,
    checkpoint: str | Path,
    output_dir: str | Path,
    codebase: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """
    Writes a folder that `from_pretrained` loads: weights, configuration, image processor and code.

    Args:
        official (`dict`):
            The official `model` dictionary or its `backbone` entry.
        checkpoint (`str` or `Path`):
            The official weights. If the file names as many classes as the model has, in `meta["CLASSES"]`, these are
            its `id2label`.
        output_dir (`str` or `Path`):
            New or empty folder; it appears only when everything is written.
        codebase (`str`, *optional*):
            See `convert_config`.
        dtype (`torch.dtype`, *optional*):
            Of the written weights; as in the checkpoint by default.

    Returns:
        Official names that were left out, see `convert_state_dict`.

    Raises:
        FileExistsError: If `output_dir` holds something.
        ConversionError: If configuration and weights are not understood or do not fit each other.
    """
    check_output_dir(output_dir)
    content = read_official_file(checkpoint)
    state_dict = unwrap_state_dict(content)
    codebase = codebase or infer_codebase(official.get("backbone", official))
    config, model_class = convert_config(official, codebase, state_dict)
    set_class_names(config, content)
    processor = build_image_processor(config, codebase)
    sizes = [branch.image_size for branch in config.branches]
    card = render_generic_card(Path(output_dir).resolve().name, model_class.__name__, sizes)
    return save_converted(config, model_class, state_dict, processor, card, output_dir, dtype)


def fit_fourth_branch(config: PiipConfig, state_dict: dict[str, torch.Tensor]):
    """
    The variants with four branches have the fourth one as the official detection code builds it, see
    `build_fourth_branch`. If a checkpoint holds the one that the official configurations describe, a Tiny ViT, the
    variant gets it.
    """
    bias = state_dict.get("branch4.patch_embed.proj.bias")
    if len(config.branches) == 4 and bias is not None and bias.shape[0] == 192:
        logger.warning("The fourth branch is 192 wide: a Tiny ViT as `branch4` says, unlike the variant.")
        config.branches[0] = replace(config.branches[0], hidden_size=192, num_attention_heads=3)


def convert_variant_checkpoint(
    variant: str, checkpoint: str | Path | None, output_dir: str | Path, dtype: torch.dtype | None = None
) -> list[str]:
    """
    The same for a published variant. Without `checkpoint` the official weights are downloaded from the repository that
    the official table links to.
    """
    check_output_dir(output_dir)
    folder = find_variant(variant)
    config, card = PiipConfig.from_pretrained(folder), read_variant_card(variant)
    if checkpoint is None:
        if config.official_checkpoint is None:
            raise ConversionError(f"No weights were published for {variant}: pass the checkpoint you have.")
        checkpoint = hf_hub_download(OFFICIAL_REPOSITORY, config.official_checkpoint)
    state_dict = load_official_checkpoint(checkpoint)
    fit_fourth_branch(config, state_dict)
    # the backbone is what can be converted of a variant whose head is not built yet
    model_class = MODEL_CLASSES.get(config.architectures[0], PiipBackbone)
    processor = AutoImageProcessor.from_pretrained(folder)
    return save_converted(config, model_class, state_dict, processor, card, output_dir, dtype)


def save_converted(
    config: PiipConfig,
    model_class: type[PiipPreTrainedModel],
    state_dict: dict[str, torch.Tensor],
    processor: PiipImageProcessor,
    card: str,
    output_dir: str | Path,
    dtype: torch.dtype | None,
) -> list[str]:
    with torch.device("meta"):
        model = model_class(config)
    converted, left_out = convert_state_dict(state_dict, model)
    if dtype is not None:
        counters = {name: value for name, value in converted.items() if not value.is_floating_point()}
        converted = {name: value.to(dtype) for name, value in converted.items()} | counters
    # the tensors stay in the mapped file of the checkpoint until their shard is written
    model.load_state_dict(converted, assign=True)
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return left_out


def describe_left_out(names: list[str]) -> list[str]:
    """One line per group of official weights that were left out, saying why."""
    groups: dict[str, int] = {}
    for name in names:
        reason = "the official code builds them and never uses them, or we compute them"
        for prefix, head in HEAD_PREFIXES.items():
            if name.startswith(prefix):
                reason = f"{prefix}* belongs to {head}, which is not converted"
        groups[reason] = groups.get(reason, 0) + 1
    return [f"Left out {count} weights: {reason}." for reason, count in groups.items()]
