# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Configuration of Parameter-Inverted Image Pyramid Networks (https://arxiv.org/abs/2406.04330)."""

import difflib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


PYRAMID_LEVELS = ["p2", "p3", "p4", "p5"]

# Every class that a saved folder can be loaded as, whichever of them wrote it.
AUTO_MAP = {
    "AutoConfig": "configuration_piip.PiipConfig",
    "AutoModel": "modeling_piip.PiipModel",
    "AutoBackbone": "modeling_piip.PiipBackbone",
    "AutoModelForImageClassification": "modeling_piip.PiipForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_piip_semantic_segmentation.PiipForSemanticSegmentation",
    # pipelines of instance masks look for the former
    "AutoModelForImageSegmentation": "modeling_piip_instance_segmentation.PiipForInstanceSegmentation",
    "AutoModelForInstanceSegmentation": "modeling_piip_instance_segmentation.PiipForInstanceSegmentation",
    "AutoModelForObjectDetection": "modeling_piip_object_detection.PiipForObjectDetection",
}


# Published variants: beside this file in an installed wheel, at the top level of the repository in a checkout.
_VARIANT_FOLDERS = (Path(__file__).parent / "configuration", Path(__file__).parents[1] / "configuration")


def list_variants() -> list[str]:
    """Names of the published variants."""
    return sorted({path.parent.name for folder in _VARIANT_FOLDERS for path in folder.glob("*/config.json")})


def find_variant(name: str) -> Path:
    """
    Folder of a published variant with its `config.json` and `preprocessor_config.json`.

    Raises:
        ValueError: If there is no such variant; the message lists the closest names.
    """
    for folder in _VARIANT_FOLDERS:
        if (folder / name / "config.json").is_file():
            return folder / name
    variants = list_variants()
    if not variants:
        raise ValueError(f"No variants beside {__file__}: install the package `piip-transformers` to use their names.")
    close = difflib.get_close_matches(name, variants, n=5, cutoff=0.3) or variants
    raise ValueError(f"Unknown variant {name!r}. Closest: {', '.join(close)}.")


def _require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@strict
@dataclass(kw_only=True)
class PiipBranchConfig:
    r"""
    One branch of a PIIP network: a plain Vision Transformer or a ConvNeXt, and the resolution it looks at (paper,
    section 3.2).

    The options cover the branches of the published models: DeiT, DeiT III, AugReg, MAE, DINOv2, InternViT-6B, BEiTv2,
    Uni-Perceiver and ConvNeXt.

    Args:
        architecture (`str`, *optional*, defaults to `"vit"`):
            `"vit"` or `"convnext"`. A ConvNeXt is given by `depths` and `hidden_sizes`; options of attention,
            positions, MLP and class token do not apply to it.
        image_size (`int`, *optional*, defaults to 224):
            Nominal side of the image this branch sees, in pixels. Only the ratios between the branches matter for
            the pyramid; any input size works.
        patch_size (`int`, *optional*, defaults to 16, for ConvNeXt to 4):
            Side of a patch, in pixels. Incomplete patches at the right and bottom border are dropped.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the tokens; for ConvNeXt that of its last stage.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of transformer layers. A ConvNeXt has `sum(depths)` blocks, and between its stages a downsampling
            layer that counts like a block.
        depths (`list[int]`, *optional*):
            Number of blocks in each stage of a ConvNeXt.
        hidden_sizes (`list[int]`, *optional*):
            Width of each stage of a ConvNeXt.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads; must divide `hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the MLP relative to `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP: `"gelu"` is exact, `"gelu_pytorch_tanh"` what the fused kernels of the official
            code compute.
        qkv_bias (`bool` or `str`, *optional*, defaults to `True`):
            Whether the fused query, key and value projection has a bias; `"qv"`: queries and values only, as in BEiT.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether queries and keys are normalized over the full width (all heads together), as in InternViT-6B.
        norm_type (`str`, *optional*, defaults to `"layernorm"`):
            `"layernorm"` or `"rmsnorm"`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the norms of this branch.
        layer_scale_init_value (`float`, *optional*):
            Initial value of the learned gain on every residual; `None` builds no gain.
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`, for ConvNeXt to `"none"`):
            `"absolute"`: a learned table added to the patches; `"relative"`: a learned attention bias per layer, head
            and distance, as in BEiT, which needs windows in every layer; `"none"`.
        position_embedding_grid (`int`, *optional*):
            Side of the grid of the learned position table, in patches. The table is resized bicubically to the
            grid of the input. Defaults to `image_size // patch_size`.
        embedding_norm (`bool`, *optional*, defaults to `False`, for ConvNeXt to `True`):
            Whether patches with their positions are normalized before the first layer, as in Uni-Perceiver.
        window_size (`int` or `list[int | None]`, *optional*):
            Side of the attention windows in patches, one for all layers or one per layer; `None` is global attention.
        window_padding (`str`, *optional*, defaults to `"tokens"`):
            What is zero where windows reach beyond the grid: `"tokens"` pads before the query, key and value
            projection (padded keys equal the bias), `"qkv"` pads after it (padded keys are zero). Padded positions
            take part in the softmax in both cases, as in the official code.
        use_cls_token (`bool`, *optional*, defaults to `False`):
            Whether a class token runs along inside the layers. It takes no part in the interactions, has no position
            embedding and cannot be combined with windows.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Probability of dropping a residual of a sample in training (stochastic depth).
        drop_path_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`: the same rate in every layer; `"linear"`: rising from 0 in the first to `drop_path_rate` in
            the last layer.
        stages (`list[int]`, *optional*):
            How many layers run before each interaction; one entry per interaction, summing to `num_hidden_layers`.
            Defaults to one layer per stage.
    """

    architecture: Literal["vit", "convnext"] = "vit"
    image_size: int = 224
    patch_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    depths: list[int] | None = None
    hidden_sizes: list[int] | None = None
    num_attention_heads: int = 12
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    qkv_bias: bool | Literal["qv"] = True
    qk_norm: bool = False
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = None
    position_embedding_type: Literal["absolute", "relative", "none"] | None = None
    position_embedding_grid: int | None = None
    embedding_norm: bool | None = None
    window_size: int | list[int | None] | None = None
    window_padding: Literal["tokens", "qkv"] = "tokens"
    use_cls_token: bool = False
    drop_path_rate: float | int = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    stages: list[int] | None = None

    def __post_init__(self):
        is_convnext = self.architecture == "convnext"
        if is_convnext:
            self._set_convnext_sizes()
        if self.patch_size is None:
            self.patch_size = 4 if is_convnext else 16
        if self.position_embedding_type is None:
            self.position_embedding_type = "none" if is_convnext else "absolute"
        if self.embedding_norm is None:
            self.embedding_norm = is_convnext
        for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, name)
            _require(value > 0, f"`{name}` of a branch must be positive, got {value}.")
        if self.position_embedding_grid is None and self.position_embedding_type == "absolute":
            self.position_embedding_grid = self.image_size // self.patch_size
        if self.stages is None:
            self.stages = [1] * self.num_hidden_layers
        self._check()
        if not is_convnext:
            self._check_vit()

    def _set_convnext_sizes(self):
        depths, hidden_sizes = self.depths or [], self.hidden_sizes or []
        _require(
            len(depths) > 0 and len(depths) == len(hidden_sizes) and min(depths + hidden_sizes) > 0,
            "A ConvNeXt branch needs positive `depths` and `hidden_sizes` of the same length, for example "
            f"[3, 3, 9, 3] and [96, 192, 384, 768]; got {self.depths} and {self.hidden_sizes}.",
        )
        self.hidden_size = hidden_sizes[-1]
        self.num_hidden_layers = sum(depths) + len(depths) - 1

    def _check(self):
        _require(
            self.image_size >= self.patch_size,
            f"`image_size` ({self.image_size}) of a branch is smaller than its `patch_size` ({self.patch_size}): "
            "there would be no patch.",
        )
        _require(
            self.layer_norm_eps >= 0, f"`layer_norm_eps` of a branch must not be negative, got {self.layer_norm_eps}."
        )
        _require(
            0 <= self.drop_path_rate < 1,
            f"`drop_path_rate` of a branch must be at least 0 and less than 1, got {self.drop_path_rate}.",
        )
        _require(
            all(length >= 0 for length in self.stages) and sum(self.stages) == self.num_hidden_layers,
            f"`stages` of a branch must sum to `num_hidden_layers` ({self.num_hidden_layers}), got {self.stages} with "
            f"the sum {sum(self.stages)}.",
        )

    def _check_vit(self):
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"`num_attention_heads` ({self.num_attention_heads}) of a branch must divide its `hidden_size` "
            f"({self.hidden_size}).",
        )
        _require(
            self.intermediate_size > 0,
            f"`mlp_ratio` ({self.mlp_ratio}) of a branch leaves no channel to its MLP: raise it.",
        )
        _require(
            self.hidden_act in ACT2FN,
            f'`hidden_act` of a branch must be an activation that Transformers knows, such as "gelu" or '
            f'"gelu_pytorch_tanh", got "{self.hidden_act}".',
        )
        _require(
            self.position_embedding_type != "absolute" or self.position_embedding_grid > 0,
            f"`position_embedding_grid` of a branch must be positive, got {self.position_embedding_grid}.",
        )
        _require(
            len(self.window_sizes) == self.num_hidden_layers,
            f"`window_size` of a branch has {len(self.window_sizes)} entries but the branch has "
            f"{self.num_hidden_layers} layers: give one number for all layers or one entry per layer.",
        )
        windows = [size for size in self.window_sizes if size is not None]
        _require(
            all(size > 0 for size in windows),
            f"`window_size` of a branch must hold positive numbers or None (global attention), got {windows}.",
        )
        _require(
            not (self.use_cls_token and windows),
            "`use_cls_token` cannot be combined with windows: set `window_size` to None or drop the class token.",
        )
        _require(
            self.position_embedding_type != "relative" or len(windows) == self.num_hidden_layers,
            '`position_embedding_type="relative"` needs a window in every layer: set `window_size`, got '
            f"{self.window_size}.",
        )

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def window_sizes(self) -> list[int | None]:
        """Side of the attention windows of every layer; `None` is global attention."""
        if isinstance(self.window_size, list):
            return self.window_size
        return [self.window_size] * self.num_hidden_layers

    @property
    def drop_path_rates(self) -> list[float]:
        """Stochastic depth rate of every layer; downsampling layers have none."""
        num_layers = sum(self.depths) if self.architecture == "convnext" else self.num_hidden_layers
        if self.drop_path_schedule == "constant":
            return [self.drop_path_rate] * num_layers
        return [self.drop_path_rate * layer / max(num_layers - 1, 1) for layer in range(num_layers)]

    @property
    def layer_widths(self) -> list[int]:
        """Width of the tokens after every layer."""
        if self.architecture == "vit":
            return [self.hidden_size] * self.num_hidden_layers
        sizes = zip(self.depths, self.hidden_sizes)
        # the downsampling layer in front of every stage but the first has the width of its stage
        return [width for k, (depth, width) in enumerate(sizes) for _ in range(depth + (k > 0))]

    @property
    def stage_widths(self) -> list[int]:
        """Width of the tokens at every interaction."""
        return [self.layer_widths[max(sum(self.stages[: stage + 1]) - 1, 0)] for stage in range(len(self.stages))]

    @property
    def stride(self) -> int:
        """Pixels per token side after the last layer."""
        return self.patch_size * 2 ** (len(self.depths) - 1) if self.architecture == "convnext" else self.patch_size


def _require_positive(config, *names: str):
    for name in names:
        value = getattr(config, name)
        _require(
            min(value if isinstance(value, list) else [value], default=0) > 0,
            f"`{name}` of `{type(config).__name__}` must be positive, got {value}.",
        )


def _require_fraction(config, *names: str):
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"`{name}` of `{type(config).__name__}` must be between 0 and 1, got {value}.")


@strict
@dataclass(kw_only=True)
class PiipUperNetConfig:
    r"""
    The UperNet head of [`PiipForSemanticSegmentation`] and how it looks at images larger than its training crops.

    Args:
        hidden_size (`int`, *optional*, defaults to 512):
            Channels of the decode head; the published models have 1536.
        pool_scales (`list[int]`, *optional*, defaults to `[1, 2, 3, 6]`):
            Sides of the grids that pyramid pooling averages the coarsest map to.
        use_auxiliary_head (`bool`, *optional*, defaults to `True`):
            Whether a second, small head on level `"p4"` adds to the loss in training.
        auxiliary_hidden_size (`int`, *optional*, defaults to 256):
            Channels of the auxiliary head; the published models have 1536.
        auxiliary_loss_weight (`float`, *optional*, defaults to 0.4):
            Weight of the loss of the auxiliary head.
        dropout (`float`, *optional*, defaults to 0.1):
            Probability of dropping a channel in front of the classifier of either head in training.
        loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that do not count.
        inference_mode (`str`, *optional*, defaults to `"whole"`):
            `"whole"`: one look at the whole image; `"slide"`: overlapping windows whose logits are averaged.
        crop_size (`int`, *optional*, defaults to 512):
            Side of a sliding window, in pixels.
        stride (`int`, *optional*, defaults to 341):
            Step between sliding windows, in pixels; at most `crop_size`.
        windows_per_forward (`int`, *optional*, defaults to 8):
            How many windows, of all images of a batch, go through the network at once. It bounds the memory and does
            not change the result.
    """

    hidden_size: int = 512
    pool_scales: list[int] = field(default_factory=lambda: [1, 2, 3, 6])
    use_auxiliary_head: bool = True
    auxiliary_hidden_size: int = 256
    auxiliary_loss_weight: float | int = 0.4
    dropout: float | int = 0.1
    loss_ignore_index: int = 255
    inference_mode: Literal["whole", "slide"] = "whole"
    crop_size: int = 512
    stride: int = 341
    windows_per_forward: int = 8

    def __post_init__(self):
        _require_positive(self, "hidden_size", "pool_scales", "auxiliary_hidden_size")
        _require_positive(self, "crop_size", "stride", "windows_per_forward")
        _require_fraction(self, "dropout")
        _require(
            self.stride <= self.crop_size,
            f"`stride` ({self.stride}) of `PiipUperNetConfig` is larger than its `crop_size` ({self.crop_size}): "
            "sliding windows would leave gaps.",
        )


@strict
@dataclass(kw_only=True)
class PiipDinoConfig:
    r"""
    The DINO head of [`PiipForObjectDetection`]; the defaults are those of the published models.

    Args:
        hidden_size (`int`, *optional*, defaults to 256):
            Width of the transformer; must be divisible by 4 (the position embedding has a sine and a cosine per
            axis) and by `num_attention_heads`.
        num_queries (`int`, *optional*, defaults to 900):
            Queries of the decoder, chosen among the cells of all levels.
        encoder_layers (`int`, *optional*, defaults to 6):
            Layers of the encoder.
        decoder_layers (`int`, *optional*, defaults to 6):
            Layers of the decoder.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of all attentions.
        num_points (`int`, *optional*, defaults to 4):
            Points each head of a deformable attention samples per query and level.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the feed-forward networks.
        position_temperature (`float`, *optional*, defaults to 20):
            Temperature of the sine position embedding of the maps.
        num_denoising_queries (`int`, *optional*, defaults to 100):
            About how many noised ground-truth boxes of either kind an image gets in training; 0 for none.
        label_noise_ratio (`float`, *optional*, defaults to 0.5):
            Half of it is the share of denoising queries whose class is drawn anew.
        box_noise_scale (`float`, *optional*, defaults to 1.0):
            Largest shift of the corners of denoising boxes, relative to half the box.
        class_cost, bbox_cost, giou_cost (`float`, *optional*, defaults to 2, 5 and 2):
            Costs of classification (focal), box distance (L1) and overlap (GIoU) in the matching of predictions and
            objects.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient (`float`, *optional*):
            Weights of the same in the loss, by default 1, 5 and 2.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Weight of positive examples in the focal loss.
        focal_gamma (`float`, *optional*, defaults to 2):
            Exponent of the focal loss.
    """

    hidden_size: int = 256
    num_queries: int = 900
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    num_points: int = 4
    intermediate_size: int = 2048
    position_temperature: float | int = 20
    num_denoising_queries: int = 100
    label_noise_ratio: float | int = 0.5
    box_noise_scale: float | int = 1.0
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 1
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2

    def __post_init__(self):
        _require_positive(self, "hidden_size", "num_queries", "encoder_layers", "decoder_layers")
        _require_positive(self, "num_attention_heads", "num_points", "intermediate_size", "position_temperature")
        _require_fraction(self, "label_noise_ratio", "focal_alpha")
        for name in ("num_denoising_queries", "box_noise_scale"):
            _require(
                getattr(self, name) >= 0,
                f"`{name}` of `PiipDinoConfig` must not be negative, got {getattr(self, name)}.",
            )
        _require(
            self.hidden_size % 4 == 0 and self.hidden_size % self.num_attention_heads == 0,
            f"`hidden_size` ({self.hidden_size}) of `PiipDinoConfig` must be divisible by 4 and by its "
            f"`num_attention_heads` ({self.num_attention_heads}).",
        )


@strict
@dataclass(kw_only=True)
class PiipMaskRCNNConfig:
    r"""
    The Mask R-CNN head of [`PiipForInstanceSegmentation`]; the defaults are those of the published models.

    Args:
        hidden_size (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid of the detector, of its region proposal network and of its mask head.
        anchor_scale (`float`, *optional*, defaults to 8):
            Side of the square anchor of a level relative to its stride.
        anchor_ratios (`list[float]`, *optional*, defaults to `[0.5, 1.0, 2.0]`):
            Height over width of the anchors of a cell.
        rpn_fg_iou_thresh (`float`, *optional*, defaults to 0.7):
            Anchors that overlap an object by this much are positive.
        rpn_bg_iou_thresh (`float`, *optional*, defaults to 0.3):
            Anchors that overlap all objects by less are negative. An object's best anchors are positive from here on.
        rpn_batch_size_per_image (`int`, *optional*, defaults to 256):
            Anchors per image that are sampled for the loss.
        rpn_positive_fraction (`float`, *optional*, defaults to 0.5):
            Largest share of positive ones among them.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test (`int`, *optional*, defaults to 2000 and 1000):
            Proposals per level that enter non-maximum suppression, in training and in inference.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test (`int`, *optional*, defaults to 1000 and 1000):
            Proposals per image, of all levels together, that leave it.
        rpn_nms_thresh (`float`, *optional*, defaults to 0.7):
            Proposals of a level that overlap a better one by more are suppressed.
        box_pool_size (`int`, *optional*, defaults to 7):
            Side of the grid of features that is pooled from a proposal.
        box_hidden_size (`int`, *optional*, defaults to 1024):
            Width of the two layers of the box head.
        box_coder_stds (`list[float]`, *optional*, defaults to `[0.1, 0.1, 0.2, 0.2]`):
            Scales of the predicted shifts of centre and logarithmic size in the box head.
        box_fg_iou_thresh, box_bg_iou_thresh (`float`, *optional*, defaults to 0.5 and 0.5):
            As for the region proposal network, for the proposals that the box head learns from.
        box_batch_size_per_image (`int`, *optional*, defaults to 512):
            Proposals per image that are sampled for the losses of box and mask head.
        box_positive_fraction (`float`, *optional*, defaults to 0.25):
            Largest share of positive ones among them.
        box_score_thresh (`float`, *optional*, defaults to 0.05):
            Detections need a higher score.
        box_nms_thresh (`float`, *optional*, defaults to 0.5):
            Detections of a class that overlap a better one by more are suppressed.
        max_detections (`int`, *optional*, defaults to 100):
            Detections per image.
        with_masks (`bool`, *optional*, defaults to `True`):
            Whether there is a mask head; without it the model detects boxes only.
        mask_pool_size (`int`, *optional*, defaults to 14):
            Side of the grid of features that is pooled from a detection; its mask has twice as many pixels a side.
        mask_num_convs (`int`, *optional*, defaults to 4):
            Convolutions of the mask head in front of its upsampling.
    """

    hidden_size: int = 256
    anchor_scale: float | int = 8
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    rpn_fg_iou_thresh: float | int = 0.7
    rpn_bg_iou_thresh: float | int = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float | int = 0.5
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float | int = 0.7
    box_pool_size: int = 7
    box_hidden_size: int = 1024
    box_coder_stds: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.2, 0.2])
    box_fg_iou_thresh: float | int = 0.5
    box_bg_iou_thresh: float | int = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float | int = 0.25
    box_score_thresh: float | int = 0.05
    box_nms_thresh: float | int = 0.5
    max_detections: int = 100
    with_masks: bool = True
    mask_pool_size: int = 14
    mask_num_convs: int = 4

    def __post_init__(self):
        fractions = [item.name for item in fields(self) if item.name.endswith(("_thresh", "_fraction"))]
        others = {item.name for item in fields(self)} - {*fractions, "with_masks"}
        _require_fraction(self, *fractions)
        _require_positive(self, *sorted(others))
        _require(
            len(self.box_coder_stds) == 4,
            "`box_coder_stds` of `PiipMaskRCNNConfig` needs 4 numbers (x, y, width, height), got "
            f"{self.box_coder_stds}.",
        )
        for part in ("rpn", "box"):
            low, high = getattr(self, f"{part}_bg_iou_thresh"), getattr(self, f"{part}_fg_iou_thresh")
            _require(
                low <= high,
                f"`{part}_bg_iou_thresh` ({low}) of `PiipMaskRCNNConfig` is above `{part}_fg_iou_thresh` ({high}): "
                "a box could be both background and object.",
            )


HEAD_CONFIGS = {"uper_net": PiipUperNetConfig, "dino": PiipDinoConfig, "mask_rcnn": PiipMaskRCNNConfig}


def _default_branches() -> list[PiipBranchConfig]:
    """The branches of PIIP-TSB 368/192/128: Tiny, Small and Base DeiT."""
    shared = {"layer_scale_init_value": 1.0, "use_cls_token": True}
    return [
        PiipBranchConfig(image_size=368, hidden_size=192, num_attention_heads=3, drop_path_rate=0.05, **shared),
        PiipBranchConfig(image_size=192, hidden_size=384, num_attention_heads=6, drop_path_rate=0.05, **shared),
        PiipBranchConfig(image_size=128, hidden_size=768, num_attention_heads=12, drop_path_rate=0.2, **shared),
    ]


@strict
class PiipConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`PiipModel`], [`PiipBackbone`] and the PIIP models with heads. The defaults give the branches of
    PIIP-TSB 368/192/128 with the merge module of the dense-prediction models.

    Args:
        branches (`list[PiipBranchConfig]` or `list[dict]`, *optional*):
            The branches, highest resolution and smallest network first, in the order of the paper's names: PIIP-TSB
            1120/896/448 is Tiny at 1120, Small at 896 and Base at 448 pixels. One branch is the plain single-ViT
            baseline of the paper's tables. All branches have the same number of stages.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image.
        interaction_attention (`str`, *optional*, defaults to `"deformable"`):
            How neighbouring branches look at each other: `"deformable"` or plain `"cross"` attention (paper,
            section 3.3).
        interaction_num_heads (`int`, *optional*, defaults to 16):
            Attention heads of the interactions; must divide the width of every branch.
        interaction_num_points (`int`, *optional*, defaults to 4):
            Points each head samples per query in deformable attention.
        interaction_value_ratio (`float`, *optional*, defaults to 0.5):
            Width of the values of deformable attention relative to the width of the query branch.
        interaction_projection (`bool`, *optional*, defaults to `True`):
            Whether tokens are projected to the width of the other branch before the attention.
        interaction_norm (`bool`, *optional*, defaults to `True`):
            Whether interactions normalize queries, features and the input of their feed-forward network.
        interaction_ffn_ratio (`float`, *optional*, defaults to 0.25):
            Width of the convolutional feed-forward network relative to the width of the branch; 0 builds none.
        interaction_drop_path_rate (`float`, *optional*, defaults to 0.4):
            Stochastic depth rate of the feed-forward residuals of the interactions.
        merge_type (`str`, *optional*, defaults to `"conv"`):
            How the branches become one map on the grid of the first branch (paper, section 3.4): `"conv"` (dense
            prediction), `"single_conv"` (the same with one convolution less) and `"linear"` (classification) project
            every branch to the width of the last one and add them with learned weights; `"concat"` has no parameters
            and concatenates the channels.
        merge_stages (`list[int]`, *optional*):
            Three stages whose branches are merged in addition to those of the last one (regular pyramid): each level
            of the feature pyramid then has its own merged map. By default all levels come from the last one (simple
            pyramid). Needed when the first branch is a ConvNeXt.
        num_groups (`int`, *optional*, defaults to 32):
            Groups of the group norms of merge and pyramid.
        pyramid_norm (`str`, *optional*, defaults to `"group"`):
            Norm between the two up-convolutions of level `"p2"`: `"group"`, or `"layer"` as in the single-branch
            baselines.
        classification_head (`str`, *optional*):
            `"branches"`: one norm and classifier per branch on its first patch token, logits averaged, as in the
            published classification models; needs `merge_type="concat"`. `"merged"`: one norm, mean over the merged
            map, one classifier. Defaults to `"branches"` with `merge_type="concat"`, else to `"merged"`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the layer norms outside the branches.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal distribution of new linear layers, classifiers and tables. Small
            models that are trained from scratch learn much sooner with 0.1.
        out_features (`list[str]`, *optional*):
            Levels that the feature pyramid returns, among `"p2"`, `"p3"`, `"p4"` and `"p5"`: strides 4, 8, 16 and 32
            for a patch size of 16. Defaults to all. Modules of other levels are not built.
        out_indices (`list[int]`, *optional*):
            The same as indices into `["p2", "p3", "p4", "p5"]`.
        uper_net ([`PiipUperNetConfig`] or `dict`, *optional*):
            The head of [`PiipForSemanticSegmentation`].
        dino ([`PiipDinoConfig`] or `dict`, *optional*):
            The head of [`PiipForObjectDetection`].
        mask_rcnn ([`PiipMaskRCNNConfig`] or `dict`, *optional*):
            The head of [`PiipForInstanceSegmentation`].

    Raises:
        ValueError: If the numbers cannot work together; the message names field, value and remedy.

    Example:

    ```python
    >>> from modeling_piip import PiipBranchConfig, PiipConfig, PiipModel

    >>> config = PiipConfig(
    ...     branches=[
    ...         PiipBranchConfig(image_size=224, hidden_size=192, num_attention_heads=3),
    ...         PiipBranchConfig(image_size=112, hidden_size=384, num_attention_heads=6),
    ...     ]
    ... )
    >>> model = PiipModel(config)
    ```
    """

    model_type = "piip"
    # so that Trainer gathers only predictions while it evaluates
    keys_to_ignore_at_inference = [
        "loss_dict",
        "auxiliary_outputs",
        "encoder_logits",
        "encoder_pred_boxes",
        "last_hidden_state",
        "encoder_last_hidden_state",
        "hidden_states",
        "attentions",
    ]

    branches: list[PiipBranchConfig | dict] | None = None
    num_channels: int = 3
    interaction_attention: Literal["deformable", "cross"] = "deformable"
    interaction_num_heads: int = 16
    interaction_num_points: int = 4
    interaction_value_ratio: float | int = 0.5
    interaction_projection: bool = True
    interaction_norm: bool = True
    interaction_ffn_ratio: float | int = 0.25
    interaction_drop_path_rate: float | int = 0.4
    merge_type: Literal["conv", "single_conv", "linear", "concat"] = "conv"
    merge_stages: list[int] | None = None
    num_groups: int = 32
    pyramid_norm: Literal["group", "layer"] = "group"
    classification_head: Literal["branches", "merged"] | None = None
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    uper_net: PiipUperNetConfig | dict | None = None
    dino: PiipDinoConfig | dict | None = None
    mask_rcnn: PiipMaskRCNNConfig | dict | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        branches = _default_branches() if self.branches is None else self.branches
        self.branches = [PiipBranchConfig(**b) if isinstance(b, dict) else b for b in branches]
        for name, head_config in HEAD_CONFIGS.items():
            if isinstance(options := getattr(self, name), dict):
                setattr(self, name, head_config(**options))
        if self.classification_head is None:
            self.classification_head = "branches" if self.merge_type == "concat" else "merged"
        self.stage_names = list(PYRAMID_LEVELS)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = list(PYRAMID_LEVELS)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        kwargs.pop("stage_names", None)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.architectures == ["PiipForSemanticSegmentation"]:
            # the pipeline tries this class first, whatever the kind of segmentation
            self.auto_map["AutoModelForImageSegmentation"] = self.auto_map["AutoModelForSemanticSegmentation"]
        _require(
            self.num_labels > 0,
            f"`num_labels` must be positive, or `id2label` hold a class, got {self.num_labels} classes. For features "
            "without a classifier use `PiipModel` or `PiipBackbone`, which ignore the number.",
        )
        self._check_branches()
        self._check_interactions()
        self._check_merge()

    def verify_out_features_out_indices(self):
        super().verify_out_features_out_indices()
        _require(
            self._out_features != [] and self._out_indices != [],
            f"`out_features` or `out_indices` is empty: name at least one level of {self.stage_names}, or leave both "
            "out for all of them.",
        )

    def _check_branches(self):
        _require(len(self.branches) > 0, "`branches` is empty: give at least one branch.")
        sizes = [branch.image_size for branch in self.branches]
        _require(
            sizes == sorted(sizes, reverse=True),
            f"`branches` must be ordered from the highest to the lowest resolution, got image sizes {sizes}.",
        )
        num_stages = [len(branch.stages) for branch in self.branches]
        _require(
            len(set(num_stages)) == 1,
            f"All branches need the same number of stages (one per interaction), got {num_stages}: set `stages` of "
            "the branches, for example [2, 2, 2] beside [1, 1, 1].",
        )
        _require(self.num_channels > 0, f"`num_channels` must be positive, got {self.num_channels}.")
        for name in ("layer_norm_eps", "initializer_range"):
            _require(getattr(self, name) >= 0, f"`{name}` must not be negative, got {getattr(self, name)}.")

    def _check_interactions(self):
        for name in ("interaction_num_heads", "interaction_num_points", "interaction_value_ratio"):
            _require(getattr(self, name) > 0, f"`{name}` must be positive, got {getattr(self, name)}.")
        _require(
            self.interaction_ffn_ratio >= 0, f"`interaction_ffn_ratio` is negative: {self.interaction_ffn_ratio}."
        )
        _require(
            0 <= self.interaction_drop_path_rate < 1,
            f"`interaction_drop_path_rate` must be at least 0 and less than 1, got {self.interaction_drop_path_rate}.",
        )
        if len(self.branches) == 1:
            return
        value_ratio = self.interaction_value_ratio if self.interaction_attention == "deformable" else 1
        for hidden_size in sorted({width for branch in self.branches for width in branch.stage_widths}):
            width = int(hidden_size * value_ratio)
            _require(
                width >= self.interaction_num_heads and width % self.interaction_num_heads == 0,
                f"`interaction_num_heads` ({self.interaction_num_heads}) must divide the value width {width} of the "
                f"branch with `hidden_size` {hidden_size} (`interaction_value_ratio` {value_ratio}).",
            )
            _require(
                self.interaction_ffn_ratio == 0 or int(hidden_size * self.interaction_ffn_ratio) > 0,
                f"`interaction_ffn_ratio` ({self.interaction_ffn_ratio}) leaves no channel to the feed-forward "
                f"network of the branch with `hidden_size` {hidden_size}: raise it, or set it to 0 to build none.",
            )

    def _check_merge(self):
        _require(self.num_groups > 0, f"`num_groups` must be positive, got {self.num_groups}.")
        _require(
            not (self.classification_head == "branches" and self.merge_type != "concat"),
            '`classification_head="branches"` does not use the merged map: set `merge_type="concat"`, got '
            f'"{self.merge_type}".',
        )
        if self.merge_stages is not None:
            stages = range(self.num_stages - 1)
            _require(
                self.merge_stages == sorted(set(self.merge_stages))
                and len(self.merge_stages) == len(PYRAMID_LEVELS) - 1
                and set(self.merge_stages) <= set(stages),
                f"`merge_stages` must be {len(PYRAMID_LEVELS) - 1} different stages between 0 and {len(stages) - 1} "
                f"in rising order (the last stage is always merged), got {self.merge_stages}.",
            )
        widths = []
        if self.merge_type == "linear":
            widths = [branch.hidden_size for branch in self.branches]
        elif self.merge_type != "concat":
            widths = self.merged_sizes
        for width in widths:
            _require(
                width % self.num_groups == 0,
                f"`num_groups` ({self.num_groups}) must divide the normalized width {width} of "
                f'`merge_type="{self.merge_type}"`.',
            )

    @classmethod
    def list_variants(cls) -> list[str]:
        """Names of the published variants that `from_variant` takes."""
        return list_variants()

    @classmethod
    def from_variant(cls, name: str, **kwargs) -> "PiipConfig":
        """
        Configuration of a published variant, such as `"piip-tsb-368-192-128-in1k"`.

        Args:
            name (`str`):
                One of `PiipConfig.list_variants()`.
            kwargs:
                Attributes to change.

        Raises:
            ValueError: If there is no such variant; the message lists the closest names.
        """
        return cls.from_pretrained(find_variant(name), **kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the merged map of the last stage."""
        return self.merged_sizes[-1]

    @property
    def all_merge_stages(self) -> list[int]:
        """Stages whose branches are merged, the last one included."""
        return [*(self.merge_stages or []), self.num_stages - 1]

    @property
    def merged_sizes(self) -> list[int]:
        """Width of every merged map."""
        merged = self.branches if self.merge_type == "concat" else self.branches[-1:]
        return [sum(branch.stage_widths[stage] for branch in merged) for stage in self.all_merge_stages]

    @property
    def level_sizes(self) -> list[int]:
        """Width of every level of the feature pyramid that `out_features` asks for."""
        sizes = self.merged_sizes if self.merge_stages else self.merged_sizes * len(PYRAMID_LEVELS)
        return [sizes[index] for index in self.out_indices]

    @property
    def level_strides(self) -> list[float]:
        """Pixels per cell side of every level of the feature pyramid that `out_features` asks for."""
        first = self.branches[0]
        finest = first.patch_size if first.architecture == "convnext" else first.patch_size / 4
        return [finest * 2 ** PYRAMID_LEVELS.index(level) for level in self.out_features]

    @property
    def image_size(self) -> int:
        """Nominal side of the input image: that of the highest-resolution branch."""
        return self.branches[0].image_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all branches together."""
        return sum(branch.num_hidden_layers for branch in self.branches)

    @property
    def num_stages(self) -> int:
        """Number of interactions; every branch runs that many groups of layers."""
        return len(self.branches[0].stages)

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["branches"] = [asdict(branch) for branch in self.branches]
        for name in HEAD_CONFIGS:
            head = getattr(self, name)
            output[name] = head and asdict(head)
        return output


PiipConfig.register_for_auto_class()

__all__ = ["PiipBranchConfig", "PiipConfig", "PiipDinoConfig", "PiipMaskRCNNConfig", "PiipUperNetConfig"]
