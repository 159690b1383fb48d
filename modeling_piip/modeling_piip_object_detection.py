# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Object detection with PIIP (paper, section 4.2): the feature pyramid and DINO (https://arxiv.org/abs/2203.03605), a
detection transformer with contrastive denoising. Architecture, matching and losses are those of the official code.

Boxes are (center x, center y, width, height) relative to the image without its padding, from 0 to 1.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_piip import PiipConfig, PiipDinoConfig
from .deformable_attention import PiipDeformableAttention
from .modeling_piip import (
    PiipFeaturePyramid,
    PiipModel,
    PiipPreTrainedModel,
    check_label,
    check_pixel_mask,
    check_predictions,
    eager_attention_forward,
    get_image_names,
)


try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # needed for the loss only
    linear_sum_assignment = None


@dataclass
class PiipObjectDetectionOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `labels`):
            Sum of `loss_dict`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_queries, num_labels)`):
            Scores of every query before the sigmoid; there is no class for "nothing".
        pred_boxes (`torch.FloatTensor` of shape `(batch_size, num_queries, 4)`):
            Boxes (center x, center y, width, height) relative to the image without its padding, in float32.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, with `labels`):
            The terms of the loss with their weights: `loss_class`, `loss_bbox` and `loss_giou` of the last decoder
            layer, with the suffix `_0`, `_1` ... of the layers before it, with `_encoder` of the selected proposals,
            and with `_denoising` in front of the layer of the denoising queries (training mode only).
        auxiliary_outputs (`list[dict[str, torch.FloatTensor]]`):
            `logits` and `pred_boxes` of the decoder layers before the last one.
        encoder_logits (`torch.FloatTensor` of shape `(batch_size, num_queries, num_labels)`):
            Scores of the proposals that the encoder selects.
        encoder_pred_boxes (`torch.FloatTensor` of shape `(batch_size, num_queries, 4)`):
            Boxes of these proposals, where the decoder starts.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_queries, hidden_size)`):
            Queries after the last decoder layer and the final norm.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sum(height * width), hidden_size)`):
            Cells of all levels after the encoder.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            Those of [`PiipModel`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    auxiliary_outputs: list[dict[str, torch.FloatTensor]] | None = None
    encoder_logits: torch.FloatTensor | None = None
    encoder_pred_boxes: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# ---------------------------------------------- boxes and positions -----------------------------------------------


def inverse_sigmoid(boxes: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Logits of numbers in 0..1; numbers within `eps` of the ends stay finite."""
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps)).log()


def center_to_corners(boxes: torch.Tensor) -> torch.Tensor:
    """(center x, center y, width, height) -> (x1, y1, x2, y2)"""
    centers, sizes = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centers - sizes / 2, centers + sizes / 2), dim=-1)


def corners_to_center(boxes: torch.Tensor) -> torch.Tensor:
    """(x1, y1, x2, y2) -> (center x, center y, width, height)"""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((first + second) / 2, second - first), dim=-1)


def generalized_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Generalized IoU (https://arxiv.org/abs/1902.09630) of boxes with corners; leading dimensions broadcast."""
    eps = 1e-12
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    other_areas = (others[..., 2:] - others[..., :2]).prod(dim=-1)
    first = torch.maximum(boxes[..., :2], others[..., :2])
    second = torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (second - first).clamp(min=0).prod(dim=-1)
    union = (areas + other_areas - overlap).clamp(min=eps)
    first = torch.minimum(boxes[..., :2], others[..., :2])
    second = torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (second - first).prod(dim=-1).clamp(min=eps)
    return overlap / union - (hull - union) / hull


def embed_positions(positions: torch.Tensor, num_features: int, temperature: float) -> torch.Tensor:
    """Sine and cosine of positions in 0..1 at falling frequencies: `(...)` -> `(..., num_features)`"""
    exponents = torch.arange(0, num_features, 2, dtype=torch.float32, device=positions.device) / num_features
    angles = positions.unsqueeze(-1) * (2 * math.pi) / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


@dataclass
class PiipDinoLevels:
    """
    Geometry of the maps of a batch. Cells of all levels are listed one level after the other, row by row.

    Args:
        spatial_shapes (`list[tuple[int, int]]`):
            `(height, width)` of every level.
        masks (`list[torch.BoolTensor]`):
            False where a cell is padding: `(batch_size, height, width)` per level.
        mask (`torch.BoolTensor` of shape `(batch_size, num_cells)`):
            The same for all cells.
        valid_ratios (`torch.FloatTensor` of shape `(batch_size, num_levels, 2)`):
            Share of the cells along x and y that is not padding.
        centers (`torch.FloatTensor` of shape `(batch_size, num_cells, 2)`):
            Centers of the cells as (x, y) relative to the part that is not padding.
    """

    spatial_shapes: list[tuple[int, int]]
    masks: list[torch.Tensor]
    mask: torch.Tensor
    valid_ratios: torch.Tensor
    centers: torch.Tensor

    @classmethod
    def from_pixel_mask(cls, pixel_mask: torch.Tensor, spatial_shapes: list[tuple[int, int]]) -> "PiipDinoLevels":
        masks, valid_ratios, centers = [], [], []
        for height, width in spatial_shapes:
            mask = F.interpolate(pixel_mask.unsqueeze(1).float(), size=(height, width)).squeeze(1).bool()
            # (batch_size, 2)
            valid_sizes = torch.stack((mask[:, 0].sum(dim=-1), mask[:, :, 0].sum(dim=-1)), dim=-1).float()
            y, x = torch.meshgrid(
                torch.arange(height, device=mask.device) + 0.5,
                torch.arange(width, device=mask.device) + 0.5,
                indexing="ij",
            )
            masks.append(mask)
            valid_ratios.append(valid_sizes / valid_sizes.new_tensor([width, height]))
            centers.append(torch.stack((x, y), dim=-1).flatten(0, 1) / valid_sizes.unsqueeze(1))
        mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        return cls(spatial_shapes, masks, mask, torch.stack(valid_ratios, dim=1), torch.cat(centers, dim=1))

    def scale(self, points: torch.Tensor) -> torch.Tensor:
        """
        Points or boxes relative to the image without padding -> relative to each padded map:
        `(batch_size, num_points, 2 or 4)` -> `(batch_size, num_points, num_levels, 2 or 4)`
        """
        ratios = self.valid_ratios.repeat(1, 1, points.shape[-1] // 2)
        return points.unsqueeze(2) * ratios.unsqueeze(1)


# ------------------------------------------------ neck and encoder ------------------------------------------------


def build_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for in_size, out_size in itertools.pairwise(sizes[1:]):
        layers += [nn.ReLU(), nn.Linear(in_size, out_size)]
    return nn.Sequential(*layers)


class PiipDinoNeck(nn.Module):
    """Brings all levels to one width and makes one more, half as fine, out of the coarsest."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        sizes, hidden_size = config.level_sizes, config.dino.hidden_size
        if hidden_size % config.num_groups != 0:
            raise ValueError(
                f"`num_groups` ({config.num_groups}) must divide the `hidden_size` ({hidden_size}) of "
                "`PiipDinoConfig`: change either."
            )
        self.convs = nn.ModuleList([nn.Conv2d(size, hidden_size, kernel_size=1, bias=False) for size in sizes])
        self.convs.append(nn.Conv2d(sizes[-1], hidden_size, kernel_size=3, stride=2, padding=1, bias=False))
        self.norms = nn.ModuleList([nn.GroupNorm(config.num_groups, hidden_size) for _ in self.convs])

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        inputs = [*feature_maps, feature_maps[-1]]
        return [norm(conv(level)) for conv, norm, level in zip(self.convs, self.norms, inputs, strict=True)]


class PiipDinoPositions(nn.Module):
    """What tells the encoder where a cell lies: sines of its place, and a learned vector of its level."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.num_features = config.dino.hidden_size // 2
        self.temperature = config.dino.position_temperature
        self.levels = nn.Embedding(len(config.level_sizes) + 1, config.dino.hidden_size)

    def forward(self, levels: PiipDinoLevels) -> torch.Tensor:
        """Returns `(batch_size, num_cells, hidden_size)`."""
        positions = []
        for mask, level in zip(levels.masks, self.levels.weight, strict=True):
            y, x = mask.cumsum(dim=1).float(), mask.cumsum(dim=2).float()
            places = (y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6))
            sines = [embed_positions(place, self.num_features, self.temperature) for place in places]
            # (batch_size, height, width, hidden_size) -> (batch_size, height * width, hidden_size)
            positions.append(torch.cat(sines, dim=-1).flatten(1, 2).to(level.dtype) + level)
        return torch.cat(positions, dim=1)


def build_deformable_attention(config: PiipConfig) -> PiipDeformableAttention:
    options = config.dino
    return PiipDeformableAttention(
        options.hidden_size,
        options.hidden_size,
        num_heads=options.num_attention_heads,
        num_points=options.num_points,
        num_levels=len(config.level_sizes) + 1,
    )


class PiipDinoEncoderLayer(GradientCheckpointingLayer):
    """Every cell looks at a few places on all levels. Norms follow the residuals."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size = config.dino.hidden_size
        self.attention = build_deformable_attention(config)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.ffn = build_mlp(hidden_size, config.dino.intermediate_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: list[tuple[int, int]],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        attended = self.attention(hidden_states + positions, hidden_states, reference_points, spatial_shapes, mask)
        hidden_states = self.attention_norm(hidden_states + attended)
        return self.ffn_norm(hidden_states + self.ffn(hidden_states))


class PiipDinoEncoder(nn.Module):
    """Multi-scale deformable encoder over the cells of all levels."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.positions = PiipDinoPositions(config)
        self.layers = nn.ModuleList([PiipDinoEncoderLayer(config) for _ in range(config.dino.encoder_layers)])

    def forward(self, feature_maps: list[torch.Tensor], levels: PiipDinoLevels) -> torch.Tensor:
        """Returns `(batch_size, num_cells, hidden_size)`."""
        hidden_states = torch.cat([feature_map.flatten(2) for feature_map in feature_maps], dim=2).transpose(1, 2)
        positions = self.positions(levels)
        reference_points = levels.scale(levels.centers)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, reference_points, levels.spatial_shapes, levels.mask)
        return hidden_states


# ---------------------------------------------- queries and decoder -----------------------------------------------


class PiipDinoHead(nn.Module):
    """Scores and boxes out of hidden states. A box is a correction to a reference box, added to its logits."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size = config.dino.hidden_size
        self.classifier = nn.Linear(hidden_size, config.num_labels)
        self.box_regressor = build_mlp(hidden_size, hidden_size, hidden_size, 4)

    def predict_boxes(self, hidden_states: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
        """Returns boxes `(..., 4)` in float32."""
        return (self.box_regressor(hidden_states).float() + reference_logits).sigmoid()


class PiipDinoQuerySelection(nn.Module):
    """
    The encoder's best guesses become the boxes that the decoder starts from; the contents of its queries are learned
    and the same for every image (mixed query selection).
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size = config.dino.hidden_size
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = PiipDinoHead(config)
        self.contents = nn.Embedding(config.dino.num_queries, hidden_size)

    def forward(self, memory: torch.Tensor, levels: PiipDinoLevels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits, boxes and contents of the queries, best guess first: `(batch_size, num_queries, ...)`."""
        self.check_number_of_cells(levels)
        proposals, is_usable = self.get_proposals(levels)
        hidden_states = self.norm(self.projection(memory.masked_fill(~is_usable.unsqueeze(-1), 0)))
        logits = self.head.classifier(hidden_states)
        best = logits.amax(dim=-1).topk(self.contents.num_embeddings, dim=1).indices.unsqueeze(-1)
        logits, hidden_states, proposals = (
            values.gather(1, best.expand(-1, -1, values.shape[-1])) for values in (logits, hidden_states, proposals)
        )
        boxes = self.head.predict_boxes(hidden_states, proposals)
        # a copy, because sharded training frees the weight as soon as this module is done
        contents = self.contents.weight.expand(memory.shape[0], -1, -1).clone()
        return logits, boxes, contents

    def get_proposals(self, levels: PiipDinoLevels) -> tuple[torch.Tensor, torch.Tensor]:
        """
        A square box around every cell, as logits, and which are usable: not at the border of the image and not in
        its padding. Unusable ones can be selected where there are too few others; their box is the whole image.
        """
        sizes = [
            levels.centers.new_full((height * width, 2), 0.05 * 2**level)
            for level, (height, width) in enumerate(levels.spatial_shapes)
        ]
        sizes = torch.cat(sizes).expand_as(levels.centers)
        proposals = torch.cat((levels.centers, sizes), dim=-1)
        is_usable = ((proposals > 0.01) & (proposals < 0.99)).all(dim=-1) & levels.mask
        proposals = (proposals / (1 - proposals)).log()
        return proposals.masked_fill(~is_usable.unsqueeze(-1), torch.inf), is_usable

    def check_number_of_cells(self, levels: PiipDinoLevels):
        num_cells = sum(height * width for height, width in levels.spatial_shapes)
        if num_cells < self.contents.num_embeddings:
            raise ValueError(
                f"The images are too small: all levels together have {num_cells} cells, fewer than the "
                f"{self.contents.num_embeddings} queries that are chosen among them. Use larger images or lower "
                "`num_queries` of `PiipDinoConfig`."
            )


class PiipDinoSelfAttention(nn.Module):
    """Attention between queries. Positions are added to queries and keys, not to values."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.config = config
        hidden_size = config.dino.hidden_size
        self.num_heads = config.dino.num_attention_heads
        self.scaling = (hidden_size // self.num_heads) ** -0.5
        self.is_causal = False
        self.query_key = nn.Linear(hidden_size, 2 * hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        query, key = self.query_key(hidden_states + positions).chunk(2, dim=-1)
        # (batch_size, num_queries, hidden_size) -> (batch_size, num_heads, num_queries, head_dim)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (query, key, self.value(hidden_states))
        )
        implementation = self.config._attn_implementation
        if attention_mask is not None:
            # flash and flex kernels take no additive mask
            implementation = "eager" if implementation == "eager" else "sdpa"
            attention_mask = attention_mask.to(query.dtype)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, _ = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.projection(context.flatten(2))


class PiipDinoDecoderLayer(GradientCheckpointingLayer):
    """Queries look at each other, then at a few places inside and around their boxes."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size = config.dino.hidden_size
        self.self_attention = PiipDinoSelfAttention(config)
        self.self_attention_norm = nn.LayerNorm(hidden_size)
        self.cross_attention = build_deformable_attention(config)
        self.cross_attention_norm = nn.LayerNorm(hidden_size)
        self.ffn = build_mlp(hidden_size, config.dino.intermediate_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor,
        reference_boxes: torch.Tensor,
        spatial_shapes: list[tuple[int, int]],
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        attended = self.self_attention(hidden_states, positions, attention_mask)
        hidden_states = self.self_attention_norm(hidden_states + attended)
        attended = self.cross_attention(
            hidden_states + positions, memory, reference_boxes, spatial_shapes, memory_mask
        )
        hidden_states = self.cross_attention_norm(hidden_states + attended)
        return self.ffn_norm(hidden_states + self.ffn(hidden_states))


class PiipDinoDecoder(nn.Module):
    """
    Refines the boxes of the queries layer by layer. Every layer has its own head, which does two things: from the
    normalized states it predicts, from the raw states it refines the boxes for the next layer. The next layer works
    with detached boxes, but its prediction starts from the undetached ones, so that its loss reaches this layer too
    ("look forward twice").
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size, num_layers = config.dino.hidden_size, config.dino.decoder_layers
        self.num_features = hidden_size // 2
        self.layers = nn.ModuleList([PiipDinoDecoderLayer(config) for _ in range(num_layers)])
        self.heads = nn.ModuleList([PiipDinoHead(config) for _ in range(num_layers)])
        self.position_mlp = build_mlp(4 * self.num_features, hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        boxes: torch.Tensor,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor,
        levels: PiipDinoLevels,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """
        Returns logits `(batch_size, num_queries, num_labels)` and boxes `(batch_size, num_queries, 4)` of every layer,
        and the normalized states of the last.
        """
        all_logits, all_boxes = [], []
        for k, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            reference_boxes = levels.scale(boxes.detach())
            hidden_states = layer(
                hidden_states,
                self.embed_boxes(reference_boxes[:, :, 0]).to(hidden_states.dtype),
                attention_mask,
                memory,
                reference_boxes,
                levels.spatial_shapes,
                levels.mask,
            )
            normalized = self.norm(hidden_states)
            all_logits.append(head.classifier(normalized))
            all_boxes.append(head.predict_boxes(normalized, inverse_sigmoid(boxes)))
            if k + 1 < len(self.layers):
                boxes = head.predict_boxes(hidden_states, inverse_sigmoid(boxes.detach()))
        return all_logits, all_boxes, normalized

    def embed_boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Position of a query out of its box on the finest level."""
        x, y, width, height = embed_positions(boxes, self.num_features, temperature=10000).unbind(dim=-2)
        sines = torch.cat((y, x, width, height), dim=-1)
        return self.position_mlp(sines.to(self.position_mlp[0].weight.dtype))


# --------------------------------------------------- denoising ----------------------------------------------------


@dataclass
class PiipDinoObjects:
    """
    The objects of all images of a batch in one list.

    Args:
        class_labels (`torch.LongTensor` of shape `(num_objects,)`): Class ids.
        boxes (`torch.FloatTensor` of shape `(num_objects, 4)`): Relative (center x, center y, width, height).
        counts (`list[int]`): Number of objects of every image.
    """

    class_labels: torch.Tensor
    boxes: torch.Tensor
    counts: list[int]

    @classmethod
    def from_labels(cls, labels: list[dict[str, torch.Tensor]], device: torch.device) -> "PiipDinoObjects":
        return cls(
            torch.cat([label["class_labels"].to(device).long() for label in labels]),
            torch.cat([label["boxes"].to(device).float().view(-1, 4) for label in labels]),
            [len(label["class_labels"]) for label in labels],
        )


@dataclass
class PiipDinoMatches:
    """Which prediction stands for which object; three `(num_matches,)` tensors of indices."""

    images: torch.Tensor
    queries: torch.Tensor
    objects: torch.Tensor


@dataclass
class PiipDinoNoise:
    """
    What is random about denoising queries; every row is a noised copy of an object.

    Args:
        label_scores (`torch.FloatTensor` of shape `(num_rows,)`): From 0 to 1; low ones change the class.
        class_labels (`torch.LongTensor` of shape `(num_rows,)`): The classes they change to.
        signs (`torch.FloatTensor` of shape `(num_rows, 4)`): -1 or 1: where a coordinate of the corners moves.
        shifts (`torch.FloatTensor` of shape `(num_rows, 4)`): From 0 to 1: how far.
    """

    label_scores: torch.Tensor
    class_labels: torch.Tensor
    signs: torch.Tensor
    shifts: torch.Tensor

    @classmethod
    def draw(cls, num_rows: int, num_labels: int, device: torch.device) -> "PiipDinoNoise":
        return cls(
            label_scores=torch.rand(num_rows, device=device),
            class_labels=torch.randint(num_labels, (num_rows,), device=device),
            signs=2.0 * torch.randint(2, (num_rows, 4), device=device) - 1,
            shifts=torch.rand(num_rows, 4, device=device),
        )


@dataclass
class PiipDinoDenoisingQueries:
    """
    Args:
        contents (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): Embeddings of noised classes.
        boxes (`torch.FloatTensor` of shape `(batch_size, num_slots, 4)`): Noised boxes.
        groups (`torch.LongTensor` of shape `(num_slots,)`): Which copy of the objects a slot belongs to.
        matches ([`PiipDinoMatches`]): The positive slots and their objects.
    """

    contents: torch.Tensor
    boxes: torch.Tensor
    groups: torch.Tensor
    matches: PiipDinoMatches

    def build_attention_mask(self, num_queries: int) -> torch.Tensor:
        """
        Additive mask `(1, 1, num_slots + num_queries, num_slots + num_queries)`. Every query sees its own group and
        the matching queries; these see nothing of the denoising, whose boxes give the objects away.
        """
        groups = torch.cat((self.groups, self.groups.new_full((num_queries,), -1)))
        is_hidden = (groups != groups.unsqueeze(1)) & (groups != -1)
        mask = torch.zeros(is_hidden.shape, device=groups.device)
        return mask.masked_fill(is_hidden, -torch.inf)[None, None]


class PiipDinoDenoising(nn.Module):
    """
    Contrastive denoising: in training, additional queries start from noised objects and learn to restore them
    (slightly noised, "positive") or to reject them (noised more, "negative"). A group holds all objects of an image
    once as positives and once as negatives.
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.options = config.dino
        self.labels = nn.Embedding(config.num_labels, config.dino.hidden_size)

    def get_num_groups(self, objects: PiipDinoObjects) -> int:
        return max(1, self.options.num_denoising_queries // max(1, *objects.counts))

    def draw_noise(self, objects: PiipDinoObjects) -> PiipDinoNoise:
        num_rows = 2 * self.get_num_groups(objects) * sum(objects.counts)
        return PiipDinoNoise.draw(num_rows, self.labels.num_embeddings, objects.boxes.device)

    def forward(self, objects: PiipDinoObjects, noise: PiipDinoNoise) -> PiipDinoDenoisingQueries:
        """
        Rows of the noise are the positives of all images of the first group, the negatives of the first group, the
        positives of the second group and so on. An image with fewer objects than another has empty slots.
        """
        device = objects.boxes.device
        num_groups, largest = self.get_num_groups(objects), max(objects.counts)
        images = torch.cat([torch.full((count,), k) for k, count in enumerate(objects.counts)]).to(device)
        places = torch.cat([torch.arange(count) for count in objects.counts]).to(device)
        # (2 * num_groups, num_objects): rows of positives and negatives take turns
        halves = torch.arange(2 * num_groups, device=device).unsqueeze(1).expand(-1, len(images))
        slots = halves * largest + places
        is_negative = halves % 2 == 1
        indices = torch.arange(len(images), device=device).expand_as(slots)
        images = images.expand_as(slots)

        class_labels, boxes = self.add_noise(objects, indices.flatten(), is_negative.flatten(), noise)
        shape = (len(objects.counts), 2 * num_groups * largest)
        filled = (images.flatten(), slots.flatten())
        contents = self.labels(class_labels)
        contents = contents.new_zeros(*shape, contents.shape[-1]).index_put(filled, contents)
        # empty slots have logits of zero
        boxes = boxes.new_full((*shape, 4), 0.5).index_put(filled, inverse_sigmoid(boxes).sigmoid())
        groups = torch.arange(num_groups, device=device).repeat_interleave(2 * largest)
        matches = PiipDinoMatches(images[::2].flatten(), slots[::2].flatten(), indices[::2].flatten())
        return PiipDinoDenoisingQueries(contents, boxes, groups, matches)

    def add_noise(
        self, objects: PiipDinoObjects, indices: torch.Tensor, is_negative: torch.Tensor, noise: PiipDinoNoise
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised classes and boxes of the objects `indices`. Boxes of negatives may be turned inside out."""
        is_changed = noise.label_scores < self.options.label_noise_ratio / 2
        class_labels = torch.where(is_changed, noise.class_labels, objects.class_labels[indices])
        boxes = objects.boxes[indices]
        shifts = noise.signs * (noise.shifts + is_negative.unsqueeze(-1)) * boxes[:, 2:].repeat(1, 2) / 2
        corners = (center_to_corners(boxes) + shifts * self.options.box_noise_scale).clamp(0, 1)
        return class_labels, corners_to_center(corners)


# ----------------------------------------------- matching and loss ------------------------------------------------


def focal_terms(logits: torch.Tensor, options: PiipDinoConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal loss (https://arxiv.org/abs/1708.02002) of every logit if its class is there, and if it is not."""
    scores = logits.sigmoid()
    present = -options.focal_alpha * (1 - scores) ** options.focal_gamma * F.logsigmoid(logits)
    absent = -(1 - options.focal_alpha) * scores**options.focal_gamma * F.logsigmoid(-logits)
    return present, absent


@torch.no_grad()
def match_objects(
    logits: torch.Tensor, boxes: torch.Tensor, objects: PiipDinoObjects, options: PiipDinoConfig
) -> PiipDinoMatches:
    """Gives every object the query that costs least, no query twice (Hungarian matching)."""
    if linear_sum_assignment is None:
        raise ImportError("The loss of PIIP object detection needs scipy: `pip install scipy`.")
    present, absent = focal_terms(logits.float(), options)
    # all (batch_size, num_queries, num_objects)
    class_costs = (present - absent)[:, :, objects.class_labels]
    box_costs = (boxes.unsqueeze(2) - objects.boxes).abs().sum(dim=-1)
    overlaps = generalized_iou(center_to_corners(boxes).unsqueeze(2), center_to_corners(objects.boxes))
    costs = options.class_cost * class_costs + options.bbox_cost * box_costs - options.giou_cost * overlaps

    images, queries, indices, first = [], [], [], 0
    for k, (image_costs, count) in enumerate(zip(costs.cpu(), objects.counts, strict=True)):
        image_queries, image_objects = linear_sum_assignment(image_costs[:, first : first + count])
        images += [k] * len(image_queries)
        queries += image_queries.tolist()
        indices += (image_objects + first).tolist()
        first += count
    return PiipDinoMatches(*torch.tensor([images, queries, indices], dtype=torch.long, device=logits.device))


def compute_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    objects: PiipDinoObjects,
    matches: PiipDinoMatches,
    normalizer: torch.Tensor,
    options: PiipDinoConfig,
) -> dict[str, torch.Tensor]:
    """Weighted losses of one set of predictions, all divided by `normalizer`."""
    present, absent = focal_terms(logits.float(), options)
    is_present = torch.zeros_like(present, dtype=torch.bool)
    is_present[matches.images, matches.queries, objects.class_labels[matches.objects]] = True
    boxes, targets = boxes[matches.images, matches.queries], objects.boxes[matches.objects]
    overlaps = generalized_iou(center_to_corners(boxes), center_to_corners(targets))
    losses = {
        "loss_class": options.class_loss_coefficient * torch.where(is_present, present, absent).sum(),
        "loss_bbox": options.bbox_loss_coefficient * (boxes - targets).abs().sum(),
        "loss_giou": options.giou_loss_coefficient * (1 - overlaps).sum(),
    }
    return {name: loss / normalizer for name, loss in losses.items()}


def average_over_processes(values: torch.Tensor) -> torch.Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()


# ----------------------------------------------------- model ------------------------------------------------------


class PiipForObjectDetection(PiipPreTrainedModel):
    r"""
    PIIP with the DINO head of the official detectors.

    DINO looks at the levels of `config.out_features` and at one more that is half as fine as the last. The published
    models have `out_features=["p3", "p4", "p5"]`: level "p2" costs much time and memory.

    Args:
        config ([`PiipConfig`]):
            Architecture; `dino` sets the head, `num_labels` or `id2label` the classes.

    Example:

    ```python
    >>> import torch
    >>> from modeling_piip import PiipConfig, PiipForObjectDetection

    >>> config = PiipConfig(num_labels=80, out_features=["p3", "p4", "p5"])
    >>> model = PiipForObjectDetection(config).eval()
    >>> outputs = model(torch.randn(1, 3, 368, 368))
    >>> outputs.logits.shape, outputs.pred_boxes.shape
    (torch.Size([1, 900, 80]), torch.Size([1, 900, 4]))
    ```
    """

    _no_split_modules = [
        *PiipPreTrainedModel._no_split_modules,
        "PiipDinoNeck",
        "PiipDinoPositions",
        "PiipDinoEncoderLayer",
        "PiipDinoQuerySelection",
        "PiipDinoDecoderLayer",
        "PiipDinoHead",
    ]

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        # so that a saved configuration says which head its weights belong to
        config.dino = config.dino or PiipDinoConfig()
        self.piip = PiipModel(config)
        self.feature_pyramid = PiipFeaturePyramid(config)
        self.neck = PiipDinoNeck(config)
        self.encoder = PiipDinoEncoder(config)
        self.query_selection = PiipDinoQuerySelection(config)
        self.denoising = PiipDinoDenoising(config) if config.dino.num_denoising_queries else None
        self.decoder = PiipDinoDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # `PiipModel` initializes its own modules, so these are the ones of DINO and the feature pyramid
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, PiipDinoNeck):
            for conv in module.convs:
                init.xavier_uniform_(conv.weight)
        elif isinstance(module, PiipDinoHead):
            # every class starts with a probability of 1 %, and boxes as their references
            init.constant_(module.classifier.bias, -math.log(99))
            init.zeros_(module.box_regressor[-1].weight)
            init.zeros_(module.box_regressor[-1].bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.piip.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PiipObjectDetectionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, padded with zeros at the right and bottom to one size.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 for pixels of the image, 0 for padding. By default there is no padding.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                The objects of every image, as [`PiipImageProcessor`] returns them: `class_labels` of shape
                `(num_objects,)` and `boxes` of shape `(num_objects, 4)`, (center x, center y, width, height) from 0
                to 1 relative to the image **without its padding**. An image may have no objects. An `image_id` names
                the image in error messages; other entries are not used.

        Raises:
            ValueError: If `pixel_mask` or `labels` do not fit, images are too small for the number of queries, or
                predictions are not finite while there are `labels`.
        """
        pixel_mask = check_pixel_mask(pixel_mask, pixel_values)
        objects = None
        if labels is not None:
            self.check_labels(labels, batch_size=pixel_values.shape[0])
            objects = PiipDinoObjects.from_labels(labels, pixel_values.device)

        outputs = self.piip(pixel_values, **kwargs)
        feature_maps = self.neck(self.feature_pyramid(outputs.merged_feature_maps))
        shapes = [(feature_map.shape[2], feature_map.shape[3]) for feature_map in feature_maps]
        levels = PiipDinoLevels.from_pixel_mask(pixel_mask, shapes)
        memory = self.encoder(feature_maps, levels)
        encoder_logits, encoder_boxes, contents = self.query_selection(memory, levels)

        # the matching queries come last, after those of the denoising
        boxes, attention_mask, denoising_queries = encoder_boxes.detach(), None, None
        if self.training and objects is not None and self.denoising is not None:
            denoising_queries = self.denoising(objects, self.denoising.draw_noise(objects))
            attention_mask = denoising_queries.build_attention_mask(boxes.shape[1])
            contents = torch.cat((denoising_queries.contents, contents), dim=1)
            boxes = torch.cat((denoising_queries.boxes, boxes), dim=1)
        all_logits, all_boxes, hidden_states = self.decoder(contents, boxes, attention_mask, memory, levels)
        num_queries = encoder_boxes.shape[1]

        loss, loss_dict = None, None
        if objects is not None:
            check_predictions([encoder_logits, *all_logits, encoder_boxes, *all_boxes], labels)
            loss_dict = self.compute_loss_dict(
                encoder_logits, encoder_boxes, all_logits, all_boxes, objects, denoising_queries
            )
            loss = sum(loss_dict.values())
        all_logits = [logits[:, -num_queries:] for logits in all_logits]
        all_boxes = [boxes[:, -num_queries:] for boxes in all_boxes]
        return PiipObjectDetectionOutput(
            loss=loss,
            logits=all_logits[-1],
            pred_boxes=all_boxes[-1],
            loss_dict=loss_dict,
            auxiliary_outputs=[
                {"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(all_logits[:-1], all_boxes[:-1])
            ],
            encoder_logits=encoder_logits,
            encoder_pred_boxes=encoder_boxes,
            last_hidden_state=hidden_states[:, -num_queries:],
            encoder_last_hidden_state=memory,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_loss_dict(
        self,
        encoder_logits: torch.Tensor,
        encoder_boxes: torch.Tensor,
        all_logits: list[torch.Tensor],
        all_boxes: list[torch.Tensor],
        objects: PiipDinoObjects,
        denoising_queries: PiipDinoDenoisingQueries | None,
    ) -> dict[str, torch.Tensor]:
        """Losses of the encoder, of every decoder layer, and of the denoising queries of every decoder layer."""
        options, num_queries = self.config.dino, encoder_boxes.shape[1]
        num_matches = sum(min(count, num_queries) for count in objects.counts)
        num_denoising = 0 if denoising_queries is None else len(denoising_queries.matches.images)
        normalizers = torch.tensor([num_matches, num_denoising], dtype=torch.float32, device=encoder_boxes.device)
        main_normalizer, denoising_normalizer = average_over_processes(normalizers).clamp(min=1)

        predictions = {"_encoder": (encoder_logits, encoder_boxes)}
        denoising_predictions = {}
        for k, (logits, boxes) in enumerate(zip(all_logits, all_boxes)):
            layer = f"_{k}" if k + 1 < len(all_logits) else ""
            predictions[layer] = (logits[:, -num_queries:], boxes[:, -num_queries:])
            if denoising_queries is not None:
                denoising_predictions[f"_denoising{layer}"] = (logits[:, :-num_queries], boxes[:, :-num_queries])

        loss_dict = {}
        for suffix, (logits, boxes) in predictions.items():
            matches = match_objects(logits, boxes, objects, options)
            losses = compute_losses(logits, boxes, objects, matches, main_normalizer, options)
            loss_dict |= {f"{name}{suffix}": loss for name, loss in losses.items()}
        for suffix, (logits, boxes) in denoising_predictions.items():
            matches = denoising_queries.matches
            losses = compute_losses(logits, boxes, objects, matches, denoising_normalizer, options)
            loss_dict |= {f"{name}{suffix}": loss for name, loss in losses.items()}
        return loss_dict

    def check_labels(self, labels: list[dict[str, torch.Tensor]], batch_size: int):
        if len(labels) != batch_size or not all({"class_labels", "boxes"} <= set(label) for label in labels):
            raise ValueError(
                f"`labels` must be a list of {batch_size} dictionaries, one per image, each with `class_labels` and "
                "`boxes`: pass `annotations` to the image processor to get them."
            )
        for name, label in zip(get_image_names(labels), labels):
            check_label(name, label["class_labels"], label["boxes"], self.config.num_labels)


PiipForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")

__all__ = ["PiipForObjectDetection", "PiipObjectDetectionOutput"]
