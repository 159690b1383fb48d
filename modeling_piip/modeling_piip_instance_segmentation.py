# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Instance segmentation and box detection with PIIP (paper, section 4.2): the feature pyramid and Mask R-CNN
(https://arxiv.org/abs/1703.06870) on the operators of torchvision. Anchors, matching, sampling, losses and detections
are those of the official code.

Inside this file boxes are `(x1, y1, x2, y2)` in pixels of the network input. Boxes, RoIAlign, non-maximum suppression
and losses are computed in float32, whatever the dtype of the model.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_convert, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_piip import PYRAMID_LEVELS, PiipConfig, PiipMaskRCNNConfig
from .modeling_piip import (
    PiipFeaturePyramid,
    PiipModel,
    PiipPreTrainedModel,
    check_label,
    check_pixel_mask,
    check_predictions,
    get_image_names,
)


# What a box is matched with, if not with the object of an index from 0 on
BACKGROUND, IGNORED = -1, -2
# Class id of rows without a detection
NO_CLASS = -1
# Predicted sizes are at most this far from those of the anchor or proposal, in both directions
MAX_LOG_RATIO = math.log(1000 / 16)
# Proposals up to twice this side, in cells of the finest level, are pooled from that level
FINEST_LEVEL_CELLS = 14


@dataclass
class PiipInstanceSegmentationOutput(ModelOutput):
    r"""
    Detections are sorted by score and padded to `max_detections` per image, so that batches can be gathered: rows
    beyond the last detection have the score 0 and the class id -1.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with `labels`):
            Sum of `loss_dict`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, with `labels`):
            The losses `"loss_objectness"` and `"loss_rpn_box_reg"` of the region proposal network,
            `"loss_classifier"` and `"loss_box_reg"` of the box head, and `"loss_mask"`.
        scores (`torch.FloatTensor` of shape `(batch_size, max_detections)`, *optional*, in evaluation mode):
            Probabilities of the detected classes.
        class_ids (`torch.LongTensor` of shape `(batch_size, max_detections)`, *optional*, in evaluation mode):
            Detected classes.
        pred_boxes (`torch.FloatTensor` of shape `(batch_size, max_detections, 4)`, *optional*, in evaluation mode):
            Boxes `(center_x, center_y, width, height)` relative to the image without padding, as in `labels`.
        pred_masks (`torch.FloatTensor` of shape `(batch_size, max_detections, size, size)`, *optional*, in evaluation
            mode, with `config.mask_rcnn.with_masks`):
            Logits of the mask of the detected class. Their grid covers the box; `size` is 28 in the published models.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`):
            See [`PiipModelOutput`].
        attentions (`tuple(torch.FloatTensor)`, *optional*, with `output_attentions=True` and eager attention):
            See [`PiipModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    scores: torch.FloatTensor | None = None
    class_ids: torch.LongTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    pred_masks: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class Objects(NamedTuple):
    """The objects of an image that can be learned from."""

    boxes: torch.Tensor  # (num_objects, 4)
    class_labels: torch.Tensor  # (num_objects,)
    masks: torch.Tensor | None  # (num_objects, height, width)


class Regions(NamedTuple):
    """The regions of an image that box and mask head learn from, positive ones first."""

    boxes: torch.Tensor  # (num_regions, 4)
    class_labels: torch.Tensor  # (num_regions,), `num_labels` is the background
    matches: torch.Tensor  # (num_positives,), indices of objects

    @property
    def positive_boxes(self) -> torch.Tensor:
        return self.boxes[: len(self.matches)]

    @property
    def positive_labels(self) -> torch.Tensor:
        return self.class_labels[: len(self.matches)]


class Detections(NamedTuple):
    """What was found in an image, best first."""

    scores: torch.Tensor  # (num_detections,)
    class_ids: torch.Tensor  # (num_detections,)
    boxes: torch.Tensor  # (num_detections, 4)


# Boxes


def get_image_sizes(pixel_mask: torch.Tensor) -> torch.Tensor:
    """(width, height, width, height) of every image without its padding: `(batch_size, 4)`"""
    heights, widths = pixel_mask.bool().any(dim=2).sum(dim=1), pixel_mask.bool().any(dim=1).sum(dim=1)
    return torch.stack((widths, heights, widths, heights), dim=1).float()


def get_anchors(
    grid_sizes: list[tuple[int, int]],
    strides: list[float],
    scale: float,
    ratios: list[float],
    device: torch.device,
) -> list[torch.Tensor]:
    """
    Anchors `(height * width * num_ratios, 4)` of every level, row by row. They are centred on the top left corners of
    the cells and not rounded.
    """
    roots = torch.tensor(ratios, device=device).float().sqrt()
    anchors = []
    for (height, width), stride in zip(grid_sizes, strides, strict=True):
        half = torch.stack((1 / roots, roots), dim=-1) * (scale * stride / 2)
        x, y = torch.arange(width, device=device) * stride, torch.arange(height, device=device) * stride
        corners = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]
        anchors.append(torch.cat((corners - half, corners + half), dim=-1).flatten(0, 2))
    return anchors


def encode_boxes(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Shift of the centre relative to the size, and logarithm of the ratio of the sizes, from `boxes` to `targets`."""
    boxes, targets = box_convert(boxes, "xyxy", "cxcywh"), box_convert(targets, "xyxy", "cxcywh")
    shifts = (targets[..., :2] - boxes[..., :2]) / boxes[..., 2:]
    return torch.cat((shifts, (targets[..., 2:] / boxes[..., 2:]).log()), dim=-1)


def decode_boxes(boxes: torch.Tensor, deltas: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Inverse of `encode_boxes`; the results are clipped to the images."""
    boxes = box_convert(boxes, "xyxy", "cxcywh")
    centers = boxes[..., :2] + deltas[..., :2] * boxes[..., 2:]
    half = boxes[..., 2:] * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat((centers - half, centers + half), dim=-1).clamp(min=0).minimum(image_sizes)


def match_boxes(
    boxes: torch.Tensor, objects: torch.Tensor, fg_iou_thresh: float, bg_iou_thresh: float
) -> torch.Tensor:
    """
    Index of the object that every box overlaps most, if by `fg_iou_thresh` at least, `BACKGROUND` for boxes that
    overlap all objects by less than `bg_iou_thresh`, and `IGNORED` between the two. Besides, every object gets the
    boxes that overlap it most, if they are no background; of several objects the last one gets a box.
    """
    overlaps = box_iou(objects, boxes)
    if overlaps.numel() == 0:
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    largest, matches = overlaps.max(dim=0)
    matches = torch.where(largest >= fg_iou_thresh, matches, IGNORED)
    matches = torch.where(largest < bg_iou_thresh, BACKGROUND, matches)
    for index, overlap in enumerate(overlaps):
        is_best = (overlap == overlap.max()) & (overlap >= bg_iou_thresh)
        matches = torch.where(is_best, index, matches)
    return matches


def sample_matches(
    matches: torch.Tensor, num_samples: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices, in rising order, of boxes with an object and of background, at most `num_samples` in all."""
    positives = choose(matches >= 0, int(num_samples * positive_fraction), generator)
    negatives = choose(matches == BACKGROUND, num_samples - len(positives), generator)
    return positives, negatives


def choose(candidates: torch.Tensor, number: int, generator: torch.Generator | None) -> torch.Tensor:
    indices = candidates.nonzero().squeeze(1)
    if len(indices) <= number:
        return indices
    chosen = torch.randperm(len(indices), generator=generator, device=indices.device)[:number]
    return indices[chosen].sort().values


def pool_regions(
    feature_maps: tuple[torch.Tensor, ...], strides: list[float], boxes: list[torch.Tensor], output_size: int
) -> torch.Tensor:
    """
    RoIAlign of the boxes of every image, each from the level that suits its size:
    `(num_boxes, channels, output_size, output_size)` for the boxes of all images together.
    """
    image_index = torch.cat([box.new_full((len(box), 1), index) for index, box in enumerate(boxes)])
    boxes = torch.cat(boxes)
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (sides / (FINEST_LEVEL_CELLS * strides[0]) + 1e-6).log2().floor().clamp(0, len(feature_maps) - 1)
    regions = torch.cat((image_index, boxes), dim=1)
    pooled = boxes.new_zeros(len(boxes), feature_maps[0].shape[1], output_size, output_size)
    for level, (feature_map, stride) in enumerate(zip(feature_maps, strides, strict=True)):
        index = (levels == level).nonzero().squeeze(1)
        pooled[index] = roi_align(
            feature_map.float(), regions[index], output_size, spatial_scale=1 / stride, aligned=True
        )
    return pooled


def crop_masks(masks: torch.Tensor, boxes: torch.Tensor, matches: torch.Tensor, output_size: int) -> torch.Tensor:
    """The masks of the matched objects inside the boxes, as 0 and 1: `(num_boxes, output_size, output_size)`"""
    height, width = masks.shape[1:]
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    crops = boxes.new_zeros(len(boxes), output_size, output_size)
    # one object after the other: in float32 all masks of a large image would take hundreds of megabytes
    for index, mask in enumerate(masks):
        is_matched = matches == index
        crops[is_matched] = roi_align(mask[None, None].float(), [boxes[is_matched]], output_size, aligned=True)[:, 0]
    return (crops >= 0.5).float()


def pad_rows(rows: torch.Tensor, length: int, value: float = 0) -> torch.Tensor:
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, length - len(rows)), value=value)


# Networks


class PiipDetectorNeck(FeaturePyramidNetwork):
    """
    Feature pyramid network (https://arxiv.org/abs/1612.03144): all levels at one width, each with the sum of the
    coarser ones, and a fifth level that is every second cell of the fourth.
    """

    def __init__(self, config: PiipConfig):
        super().__init__(config.level_sizes, config.mask_rcnn.hidden_size, extra_blocks=LastLevelMaxPool())

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(super().forward(dict(zip(PYRAMID_LEVELS, feature_maps, strict=True))).values())


class PiipRegionProposalNetwork(nn.Module):
    """Finds regions that may hold an object, of whatever class (https://arxiv.org/abs/1506.01497)."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.options = config.mask_rcnn
        self.strides = [*config.level_strides, 2 * config.level_strides[-1]]
        hidden_size, num_anchors = self.options.hidden_size, len(self.options.anchor_ratios)
        self.conv = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(hidden_size, num_anchors, kernel_size=1)
        self.deltas = nn.Conv2d(hidden_size, 4 * num_anchors, kernel_size=1)

    def forward(
        self, feature_maps: tuple[torch.Tensor, ...]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Logits `(batch_size, num_anchors)`, deltas `(batch_size, num_anchors, 4)` and anchors of every level."""
        logits, deltas = [], []
        for feature_map in feature_maps:
            hidden_states = F.relu(self.conv(feature_map))
            # (batch_size, ratios, height, width) -> (batch_size, height * width * ratios)
            logits.append(self.objectness(hidden_states).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(hidden_states).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)).float())
        grid_sizes = [tuple(feature_map.shape[2:]) for feature_map in feature_maps]
        scale, ratios = self.options.anchor_scale, self.options.anchor_ratios
        return logits, deltas, get_anchors(grid_sizes, self.strides, scale, ratios, logits[0].device)

    @torch.no_grad()
    def get_proposals(
        self,
        logits: list[torch.Tensor],
        deltas: list[torch.Tensor],
        anchors: list[torch.Tensor],
        image_sizes: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The best boxes of every image, all levels together: one `(num_proposals, 4)` per image, best first."""
        mode = "train" if self.training else "test"
        pre_nms_top_n = getattr(self.options, f"rpn_pre_nms_top_n_{mode}")
        post_nms_top_n = getattr(self.options, f"rpn_post_nms_top_n_{mode}")
        scores, boxes, levels = [], [], []
        for level, level_logits in enumerate(logits):
            top_scores, index = level_logits.sigmoid().topk(min(pre_nms_top_n, level_logits.shape[1]))
            top_deltas = deltas[level].gather(1, index[..., None].expand(-1, -1, 4))
            scores.append(top_scores)
            boxes.append(decode_boxes(anchors[level][index], top_deltas, image_sizes[:, None]))
            levels.append(torch.full_like(index, level))
        scores, boxes, levels = (torch.cat(parts, dim=1) for parts in (scores, boxes, levels))

        proposals = []
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        for valid, image_boxes, image_scores, image_levels in zip(has_area, boxes, scores, levels, strict=True):
            image_boxes = image_boxes[valid]
            keep = batched_nms(image_boxes, image_scores[valid], image_levels[valid], self.options.rpn_nms_thresh)
            proposals.append(image_boxes[keep[:post_nms_top_n]])
        return proposals

    def compute_loss(
        self,
        logits: list[torch.Tensor],
        deltas: list[torch.Tensor],
        anchors: list[torch.Tensor],
        objects: list[Objects],
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Losses on a random sample of anchors. All anchors can be in it, also those beyond the border of an image and in
        its padding. Both losses are means over the sample: most of it has no box to learn.
        """
        options = self.options
        logits, deltas, anchors = torch.cat(logits, dim=1), torch.cat(deltas, dim=1), torch.cat(anchors)
        objectness_loss, box_loss, num_samples = 0, 0, 0
        for image_logits, image_deltas, image_objects in zip(logits, deltas, objects, strict=True):
            boxes = image_objects.boxes
            matches = match_boxes(anchors, boxes, options.rpn_fg_iou_thresh, options.rpn_bg_iou_thresh)
            positives, negatives = sample_matches(
                matches, options.rpn_batch_size_per_image, options.rpn_positive_fraction, generator
            )
            sample = torch.cat((positives, negatives))
            is_positive = (matches[sample] >= 0).float()
            objectness_loss += F.binary_cross_entropy_with_logits(image_logits[sample], is_positive, reduction="sum")
            targets = encode_boxes(anchors[positives], boxes[matches[positives]])
            box_loss += F.l1_loss(image_deltas[positives], targets, reduction="sum")
            num_samples += max(len(positives), 1) + max(len(negatives), 1)
        return {"loss_objectness": objectness_loss / num_samples, "loss_rpn_box_reg": box_loss / num_samples}


class PiipBoxHead(nn.Module):
    """Classifies regions and corrects their boxes, with one correction per class (https://arxiv.org/abs/1504.08083)."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.options = config.mask_rcnn
        self.num_labels = config.num_labels
        self.strides = config.level_strides
        hidden_size = self.options.box_hidden_size
        self.fc1 = nn.Linear(self.options.hidden_size * self.options.box_pool_size**2, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        # the background is the last class
        self.classifier = nn.Linear(hidden_size, config.num_labels + 1)
        self.deltas = nn.Linear(hidden_size, 4 * config.num_labels)

    def forward(
        self, feature_maps: tuple[torch.Tensor, ...], boxes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(num_boxes, num_labels + 1)` and deltas `(num_boxes, num_labels, 4)` for the boxes of all images."""
        pooled = pool_regions(feature_maps, self.strides, boxes, self.options.box_pool_size)
        hidden_states = F.relu(self.fc1(pooled.flatten(1).to(self.fc1.weight.dtype)))
        hidden_states = F.relu(self.fc2(hidden_states))
        deltas = self.deltas(hidden_states).float().unflatten(1, (-1, 4))
        return self.classifier(hidden_states).float(), deltas * deltas.new_tensor(self.options.box_coder_stds)

    @torch.no_grad()
    def sample_regions(
        self, proposals: torch.Tensor, objects: Objects, generator: torch.Generator | None = None
    ) -> Regions:
        """Regions of one image to learn from: a random sample of its proposals and of the boxes of its objects."""
        options = self.options
        own_matches = torch.arange(len(objects.boxes), device=proposals.device)
        matches = match_boxes(proposals, objects.boxes, options.box_fg_iou_thresh, options.box_bg_iou_thresh)
        matches = torch.cat((own_matches, matches))
        positives, negatives = sample_matches(
            matches, options.box_batch_size_per_image, options.box_positive_fraction, generator
        )
        return Regions(
            boxes=torch.cat((objects.boxes, proposals))[torch.cat((positives, negatives))],
            class_labels=pad_rows(
                objects.class_labels[matches[positives]], len(positives) + len(negatives), value=self.num_labels
            ),
            matches=matches[positives],
        )

    def compute_loss(
        self, feature_maps: tuple[torch.Tensor, ...], regions: list[Regions], objects: list[Objects]
    ) -> dict[str, torch.Tensor]:
        """Both losses are means over all regions: most of them have no box to learn."""
        logits, deltas = self(feature_maps, [region.boxes for region in regions])
        class_labels = torch.cat([region.class_labels for region in regions])
        class_loss = F.cross_entropy(logits, class_labels, reduction="sum")

        is_positive = class_labels < self.num_labels
        deltas = deltas[is_positive, class_labels[is_positive]]
        boxes = torch.cat([region.positive_boxes for region in regions])
        targets = torch.cat([image.boxes[region.matches] for image, region in zip(objects, regions, strict=True)])
        stds = deltas.new_tensor(self.options.box_coder_stds)
        box_loss = F.l1_loss(deltas / stds, encode_boxes(boxes, targets) / stds, reduction="sum")
        num_regions = max(len(class_labels), 1)
        return {"loss_classifier": class_loss / num_regions, "loss_box_reg": box_loss / num_regions}

    def detect(
        self, feature_maps: tuple[torch.Tensor, ...], proposals: list[torch.Tensor], image_sizes: torch.Tensor
    ) -> list[Detections]:
        """The best detections of every image. A region can be detected as several classes."""
        logits, deltas = self(feature_maps, proposals)
        num_proposals = [len(boxes) for boxes in proposals]
        images = zip(logits.split(num_proposals), deltas.split(num_proposals), proposals, image_sizes, strict=True)
        return [self.select_detections(*image) for image in images]

    def select_detections(
        self, logits: torch.Tensor, deltas: torch.Tensor, proposals: torch.Tensor, image_size: torch.Tensor
    ) -> Detections:
        options = self.options
        scores = logits.softmax(dim=-1)[:, :-1]
        regions, class_ids = (scores > options.box_score_thresh).nonzero(as_tuple=True)
        scores = scores[regions, class_ids]
        boxes = decode_boxes(proposals[regions], deltas[regions, class_ids], image_size)
        keep = batched_nms(boxes, scores, class_ids, options.box_nms_thresh)[: options.max_detections]
        return Detections(scores[keep], class_ids[keep], boxes[keep])


class PiipMaskHead(nn.Module):
    """Segments the object of a given class inside a region (https://arxiv.org/abs/1703.06870)."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.options = config.mask_rcnn
        self.strides = config.level_strides
        hidden_size = self.options.hidden_size
        self.convs = nn.ModuleList(
            [nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1) for _ in range(self.options.mask_num_convs)]
        )
        self.upsample = nn.ConvTranspose2d(hidden_size, hidden_size, kernel_size=2, stride=2)
        self.classifier = nn.Conv2d(hidden_size, config.num_labels, kernel_size=1)

    def forward(
        self, feature_maps: tuple[torch.Tensor, ...], boxes: list[torch.Tensor], class_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits `(num_boxes, size, size)` for the boxes of all images, with a size twice that of the pooled grid."""
        pooled = pool_regions(feature_maps, self.strides, boxes, self.options.mask_pool_size)
        hidden_states = pooled.to(self.classifier.weight.dtype)
        for conv in self.convs:
            hidden_states = F.relu(conv(hidden_states))
        logits = self.classifier(F.relu(self.upsample(hidden_states)))
        return logits[torch.arange(len(class_ids), device=class_ids.device), class_ids].float()

    def compute_loss(
        self, feature_maps: tuple[torch.Tensor, ...], regions: list[Regions], objects: list[Objects]
    ) -> dict[str, torch.Tensor]:
        """Mean over the pixels of all positive regions. Without any the loss is 0 and every gradient exists."""
        class_ids = torch.cat([region.positive_labels for region in regions])
        logits = self(feature_maps, [region.positive_boxes for region in regions], class_ids)
        targets = torch.cat(
            [
                crop_masks(image.masks, region.positive_boxes, region.matches, logits.shape[-1])
                for image, region in zip(objects, regions, strict=True)
            ]
        )
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return {"loss_mask": loss / max(targets.numel(), 1)}


class PiipRoIHead(nn.Module):
    """What looks at single regions: the box head and, with `config.mask_rcnn.with_masks`, the mask head."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        self.max_detections = config.mask_rcnn.max_detections
        self.box_head = PiipBoxHead(config)
        self.mask_head = PiipMaskHead(config) if config.mask_rcnn.with_masks else None

    def compute_loss(
        self,
        feature_maps: tuple[torch.Tensor, ...],
        proposals: list[torch.Tensor],
        objects: list[Objects],
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        images = zip(proposals, objects, strict=True)
        regions = [self.box_head.sample_regions(*image, generator) for image in images]
        loss_dict = self.box_head.compute_loss(feature_maps, regions, objects)
        if self.mask_head is not None:
            loss_dict |= self.mask_head.compute_loss(feature_maps, regions, objects)
        return loss_dict

    def predict(
        self, feature_maps: tuple[torch.Tensor, ...], proposals: list[torch.Tensor], image_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The padded detections of [`PiipInstanceSegmentationOutput`]."""
        detections = self.box_head.detect(feature_maps, proposals, image_sizes)
        boxes = [image.boxes / size for image, size in zip(detections, image_sizes, strict=True)]
        columns = {
            "scores": [image.scores for image in detections],
            "class_ids": [image.class_ids for image in detections],
            "pred_boxes": [box_convert(box, "xyxy", "cxcywh") for box in boxes],
        }
        if self.mask_head is not None:
            class_ids = torch.cat(columns["class_ids"])
            masks = self.mask_head(feature_maps, [image.boxes for image in detections], class_ids)
            columns["pred_masks"] = masks.split([len(scores) for scores in columns["scores"]])
        padding = {"class_ids": NO_CLASS}
        return {
            name: torch.stack([pad_rows(rows, self.max_detections, padding.get(name, 0)) for rows in images])
            for name, images in columns.items()
        }


class PiipForInstanceSegmentation(PiipPreTrainedModel):
    r"""
    PIIP with the Mask R-CNN head of the official detectors; with `config.mask_rcnn.with_masks=False` a box detector.

    Which regions it looks at depends on the image, so the whole model is neither exported nor compiled as one graph.
    Its feature maps ([`~PiipForInstanceSegmentation.get_feature_maps`]: network, feature pyramid and neck) are, and
    they are nearly all of the work.

    In training mode the regions to learn from are drawn with torch's generator and only losses are returned. In
    evaluation mode there are detections, and with `labels` losses too, on the same draw every time.

    Args:
        config ([`PiipConfig`]):
            Architecture; `mask_rcnn` sets the head, `num_labels` or `id2label` the classes.

    Example:

    ```python
    >>> import torch
    >>> from modeling_piip import PiipConfig, PiipForInstanceSegmentation

    >>> model = PiipForInstanceSegmentation(PiipConfig(num_labels=80)).eval()
    >>> outputs = model(torch.randn(1, 3, 368, 368))
    >>> outputs.pred_boxes.shape, outputs.pred_masks.shape
    (torch.Size([1, 100, 4]), torch.Size([1, 100, 28, 28]))
    ```
    """

    _can_compile_fullgraph = False
    _no_split_modules = [
        *PiipPreTrainedModel._no_split_modules,
        "PiipDetectorNeck",
        "PiipRegionProposalNetwork",
        "PiipBoxHead",
        "PiipMaskHead",
    ]

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        config.mask_rcnn = config.mask_rcnn or PiipMaskRCNNConfig()
        if config.out_features != PYRAMID_LEVELS:
            raise ValueError(
                f"Mask R-CNN needs all levels of the feature pyramid: set `out_features` to {PYRAMID_LEVELS}, got "
                f"{config.out_features}."
            )
        self.piip = PiipModel(config)
        self.feature_pyramid = PiipFeaturePyramid(config)
        self.neck = PiipDetectorNeck(config)
        self.rpn_head = PiipRegionProposalNetwork(config)
        self.roi_head = PiipRoIHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PiipDetectorNeck):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    init.xavier_uniform_(layer.weight)
        elif isinstance(module, PiipRegionProposalNetwork):
            for layer in (module.conv, module.objectness, module.deltas):
                init.normal_(layer.weight, std=0.01)
        elif isinstance(module, PiipBoxHead):
            init.xavier_uniform_(module.fc1.weight)
            init.xavier_uniform_(module.fc2.weight)
            init.normal_(module.classifier.weight, std=0.01)
            init.normal_(module.deltas.weight, std=0.001)

    def get_feature_maps(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images at the resolution of the first branch.

        Returns:
            `tuple(torch.Tensor)`: five maps `(batch_size, config.mask_rcnn.hidden_size, height_l, width_l)`, of
            strides 4, 8, 16, 32 and 64 for a patch size of 16.
        """
        return self.neck(self.feature_pyramid(self.piip(pixel_values).merged_feature_maps))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PiipInstanceSegmentationOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images at the resolution of the first branch, padded at the right and bottom.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 for pixels of the image, 0 for padding. By default there is no padding.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                The objects of every image: `class_labels` of shape `(num_objects,)`; `boxes` of shape
                `(num_objects, 4)` as `(center_x, center_y, width, height)` relative to the image without padding;
                `masks` of shape `(num_objects, height, width)` (with padding), needed with
                `config.mask_rcnn.with_masks`; and optionally `iscrowd` of shape `(num_objects,)`. Crowd regions and
                boxes without area are left out. There may be no object at all.

        Raises:
            ValueError: If the labels cannot be used, or predictions are not finite while there are `labels`; the
                message names image and remedy.
        """
        outputs = self.piip(pixel_values, **kwargs)
        *feature_maps, coarsest_map = self.neck(self.feature_pyramid(outputs.merged_feature_maps))
        image_sizes = get_image_sizes(check_pixel_mask(pixel_mask, pixel_values))
        anchor_outputs = self.rpn_head((*feature_maps, coarsest_map))
        if labels is not None:
            logits, deltas, _ = anchor_outputs
            check_predictions([*logits, *deltas], labels)
        proposals = self.rpn_head.get_proposals(*anchor_outputs, image_sizes)

        results = {}
        if labels is not None:
            objects = self.get_objects(labels, image_sizes, tuple(pixel_values.shape[2:]))
            # evaluation gives the same loss every time and leaves torch's generator alone
            generator = None if self.training else torch.Generator(pixel_values.device).manual_seed(0)
            loss_dict = self.rpn_head.compute_loss(*anchor_outputs, objects, generator)
            loss_dict |= self.roi_head.compute_loss(feature_maps, proposals, objects, generator)
            results = {"loss": sum(loss_dict.values()), "loss_dict": loss_dict}
        if not self.training:
            results |= self.roi_head.predict(feature_maps, proposals, image_sizes)
        return PiipInstanceSegmentationOutput(
            **results, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def get_objects(
        self, labels: list[dict[str, torch.Tensor]], image_sizes: torch.Tensor, input_size: tuple[int, int]
    ) -> list[Objects]:
        """The objects to learn from, in pixels."""
        self.check_labels(labels, len(image_sizes), input_size)
        objects = []
        for image_labels, image_size in zip(labels, image_sizes, strict=True):
            image_labels = {name: value.to(image_size.device) for name, value in image_labels.items()}
            boxes = image_labels["boxes"].float().reshape(-1, 4)
            is_usable = (boxes[:, 2:] > 0).all(dim=1)
            if "iscrowd" in image_labels:
                is_usable &= ~image_labels["iscrowd"].bool()
            objects.append(
                Objects(
                    boxes=box_convert(boxes[is_usable], "cxcywh", "xyxy") * image_size,
                    class_labels=image_labels["class_labels"][is_usable].long(),
                    masks=image_labels["masks"][is_usable] if self.config.mask_rcnn.with_masks else None,
                )
            )
        return objects

    def check_labels(self, labels: list[dict[str, torch.Tensor]], batch_size: int, input_size: tuple[int, int]):
        with_masks = self.config.mask_rcnn.with_masks
        needed = {"class_labels", "boxes", "masks"} if with_masks else {"class_labels", "boxes"}
        if len(labels) != batch_size or not all(needed <= set(label) for label in labels):
            hint = " To train without masks, set `mask_rcnn.with_masks=False` in the config." if with_masks else ""
            raise ValueError(
                f"`labels` must be a list of {batch_size} dictionaries, one per image, each with {sorted(needed)}: "
                f"pass `annotations` to the image processor to get them.{hint}"
            )
        for name, label in zip(get_image_names(labels), labels, strict=True):
            check_label(name, label["class_labels"], label["boxes"], self.config.num_labels)
            shape = (len(label["class_labels"]), *input_size)
            if with_masks and tuple(label["masks"].shape) != shape:
                raise ValueError(
                    f"`masks` of {name} must have the shape {shape}, one per object at the size of the padded images, "
                    f"got {tuple(label['masks'].shape)}."
                )


PiipForInstanceSegmentation.register_for_auto_class("AutoModelForInstanceSegmentation")

__all__ = ["PiipForInstanceSegmentation", "PiipInstanceSegmentationOutput"]
