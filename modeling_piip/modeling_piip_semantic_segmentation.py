# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
Semantic segmentation with PIIP (paper, section 4.3): the feature pyramid, a UperNet head, and whole-image or
sliding-window inference. Loss, windows and averages are those of the official code.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_piip import PiipConfig, PiipUperNetConfig
from .modeling_piip import PiipFeaturePyramid, PiipModel, PiipModelOutput, PiipPreTrainedModel, resize_map


class PiipConvBlock(nn.Module):
    """Convolution, batch norm and ReLU; height and width stay."""

    def __init__(self, in_size: int, out_size: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_size, out_size, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(feature_map)))


class PiipUperNetHead(nn.Module):
    """
    UperNet decode head (https://arxiv.org/abs/1807.10221). The coarsest level sees the whole image through averages
    over several grids, coarser levels are added to finer ones, and all levels together are classified on the grid of
    the finest.
    """

    def __init__(self, config: PiipConfig):
        super().__init__()
        hidden_size, pool_scales = config.uper_net.hidden_size, config.uper_net.pool_scales
        *fine_sizes, top_size = config.level_sizes
        self.pools = nn.ModuleList([nn.AdaptiveAvgPool2d(scale) for scale in pool_scales])
        self.pool_convs = nn.ModuleList([PiipConvBlock(top_size, hidden_size, 1) for _ in pool_scales])
        self.top_conv = PiipConvBlock(top_size + len(pool_scales) * hidden_size, hidden_size, 3)
        self.lateral_convs = nn.ModuleList([PiipConvBlock(size, hidden_size, 1) for size in fine_sizes])
        self.fpn_convs = nn.ModuleList([PiipConvBlock(hidden_size, hidden_size, 3) for _ in fine_sizes])
        self.fusion_conv = PiipConvBlock(len(config.level_sizes) * hidden_size, hidden_size, 3)
        self.dropout = nn.Dropout2d(config.uper_net.dropout)
        self.classifier = nn.Conv2d(hidden_size, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Levels from fine to coarse -> logits `(batch_size, num_labels, height, width)` on the finest grid"""
        *fine_maps, top_map = feature_maps
        levels = [conv(feature_map) for conv, feature_map in zip(self.lateral_convs, fine_maps, strict=True)]
        levels.append(self.top_conv(torch.cat([top_map, *self.pool(top_map)], dim=1)))
        for k in reversed(range(len(fine_maps))):
            levels[k] = levels[k] + resize_map(levels[k + 1], levels[k].shape[2:])
        levels[:-1] = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused = self.fusion_conv(torch.cat([resize_map(level, levels[0].shape[2:]) for level in levels], dim=1))
        return self.classifier(self.dropout(fused))

    def pool(self, top_map: torch.Tensor) -> list[torch.Tensor]:
        """Averages over 1x1, 2x2, ... cells of the map (pyramid pooling), back on its grid."""
        pooled_maps = [pool(top_map) for pool in self.pools]
        for conv, pooled in zip(self.pool_convs, pooled_maps, strict=True):
            self.check_number_of_values(conv.norm, pooled)
        pooled_maps = [conv(pooled) for conv, pooled in zip(self.pool_convs, pooled_maps, strict=True)]
        return [resize_map(pooled, top_map.shape[2:]) for pooled in pooled_maps]

    @staticmethod
    def check_number_of_values(norm: nn.Module, pooled: torch.Tensor):
        # synchronized batch norm, which is not a BatchNorm2d, may find more values on other devices
        if isinstance(norm, nn.BatchNorm2d) and norm.training and pooled[:, 0].numel() == 1:
            raise ValueError(
                "UperNet cannot train on a batch of one image: the batch norm behind the average over the whole image "
                "gets one value per channel. Raise the batch size, drop an incomplete last batch "
                "(`dataloader_drop_last=True`), or train on several devices with "
                "`torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`."
            )


class PiipAuxiliaryHead(nn.Module):
    """A small convolutional classifier on level "p4", which helps training and is not used in inference."""

    def __init__(self, config: PiipConfig):
        super().__init__()
        if "p4" not in config.out_features:
            raise ValueError(
                f'The auxiliary head of UperNet needs level "p4" but `out_features` is {config.out_features}: add it, '
                "or set `use_auxiliary_head=False` of `PiipUperNetConfig`."
            )
        self.level = config.out_features.index("p4")
        hidden_size = config.uper_net.auxiliary_hidden_size
        self.conv = PiipConvBlock(config.level_sizes[self.level], hidden_size, 3)
        self.dropout = nn.Dropout2d(config.uper_net.dropout)
        self.classifier = nn.Conv2d(hidden_size, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Levels from fine to coarse -> logits `(batch_size, num_labels, height, width)` on the grid of its level"""
        return self.classifier(self.dropout(self.conv(feature_maps[self.level])))


def get_window_starts(length: int, crop_size: int, stride: int) -> list[int]:
    """Where windows start along an axis. The last one is moved back so that it ends at the border."""
    num_windows = max(length - crop_size + stride - 1, 0) // stride + 1
    last = max(length - crop_size, 0)
    return [min(k * stride, last) for k in range(num_windows)]


class PiipForSemanticSegmentation(PiipPreTrainedModel):
    r"""
    PIIP with the UperNet head of the official segmenters.

    `config.uper_net.inference_mode` chooses how images are segmented in evaluation mode: `"whole"` at once, or
    `"slide"`: in overlapping windows whose logits are averaged, as in the published models. In training mode the
    images are random crops already and always go through at once.

    The heads use batch norm. To share its statistics between devices, as the official training does, convert the model
    before training: `model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`.

    Args:
        config ([`PiipConfig`]):
            Architecture; `uper_net` sets the head and the inference, `num_labels` or `id2label` the classes.

    Example:

    ```python
    >>> import torch
    >>> from modeling_piip import PiipConfig, PiipForSemanticSegmentation

    >>> model = PiipForSemanticSegmentation(PiipConfig(num_labels=150)).eval()
    >>> model(torch.randn(1, 3, 368, 368)).logits.shape
    torch.Size([1, 150, 368, 368])
    ```
    """

    _no_split_modules = [*PiipPreTrainedModel._no_split_modules, "PiipUperNetHead", "PiipAuxiliaryHead"]

    def __init__(self, config: PiipConfig):
        super().__init__(config)
        # so that a saved configuration says which head its weights belong to
        config.uper_net = config.uper_net or PiipUperNetConfig()
        self.piip = PiipModel(config)
        self.feature_pyramid = PiipFeaturePyramid(config)
        self.decode_head = PiipUperNetHead(config)
        self.auxiliary_head = PiipAuxiliaryHead(config) if config.uper_net.use_auxiliary_head else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (PiipUperNetHead, PiipAuxiliaryHead)):
            init.trunc_normal_(module.classifier.weight, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.piip.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images. Windows of sliding-window inference are cut out of them.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`, *optional*):
                Maps of class ids. Pixels of `config.uper_net.loss_ignore_index` do not count.

        Returns:
            [`~transformers.modeling_outputs.SemanticSegmenterOutput`]: `logits` of shape `(batch_size, num_labels,
            height, width)`: those of the head, on the grid of level "p2", resized bilinearly to the size of
            `pixel_values`. `loss` as in the official code: the cross-entropy of these logits, resized to the size of
            the labels, plus `auxiliary_loss_weight` times that of the auxiliary head. Both are sums over the pixels
            that are not ignored, divided by the number of all pixels. `hidden_states` and `attentions` are those of
            [`PiipModel`]; sliding-window inference returns none.

        Raises:
            ValueError: If `labels` are no maps of class ids of the batch.
        """
        heads = [self.decode_head]
        if labels is not None:
            self.check_labels(labels, batch_size=pixel_values.shape[0])
            heads += [self.auxiliary_head] if self.auxiliary_head is not None else []
        if self.training or self.config.uper_net.inference_mode == "whole":
            logits, outputs = self.segment(pixel_values, heads, **kwargs)
        else:
            logits, outputs = self.segment_windows(pixel_values, heads, **kwargs), PiipModelOutput()
        return SemanticSegmenterOutput(
            loss=None if labels is None else self.compute_loss(logits, labels),
            logits=logits[0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def segment(
        self, pixel_values: torch.Tensor, heads: list[nn.Module], **kwargs
    ) -> tuple[list[torch.Tensor], PiipModelOutput]:
        """Logits of every head at the size of the images, and the output of the network below."""
        outputs = self.piip(pixel_values, **kwargs)
        feature_maps = self.feature_pyramid(outputs.merged_feature_maps)
        return [resize_map(head(feature_maps), pixel_values.shape[2:]) for head in heads], outputs

    def segment_windows(self, pixel_values: torch.Tensor, heads: list[nn.Module], **kwargs) -> list[torch.Tensor]:
        """Logits of every head at the size of the images: the average over overlapping windows."""
        options = self.config.uper_net
        batch_size, _, height, width = pixel_values.shape
        rows = get_window_starts(height, options.crop_size, options.stride)
        columns = get_window_starts(width, options.crop_size, options.stride)
        windows = [
            (image, slice(None), slice(top, top + options.crop_size), slice(left, left + options.crop_size))
            for image, top, left in itertools.product(range(batch_size), rows, columns)
        ]
        shape = (batch_size, self.config.num_labels, height, width)
        sums = [pixel_values.new_zeros(shape, dtype=torch.float32) for _ in heads]
        counts = pixel_values.new_zeros((batch_size, 1, height, width), dtype=torch.float32)
        for first in range(0, len(windows), options.windows_per_forward):
            chunk = windows[first : first + options.windows_per_forward]
            logits, _ = self.segment(torch.stack([pixel_values[window] for window in chunk]), heads, **kwargs)
            for k, window in enumerate(chunk):
                counts[window] += 1
                for head_sums, head_logits in zip(sums, logits, strict=True):
                    head_sums[window] += head_logits[k]
        return [(head_sums / counts).to(logits[0].dtype) for head_sums in sums]

    def compute_loss(self, logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        weights = [1.0, self.config.uper_net.auxiliary_loss_weight]
        return sum(weight * self.cross_entropy(head_logits, labels) for weight, head_logits in zip(weights, logits))

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over all pixels, ignored ones included: finite also where all pixels of a batch are ignored."""
        logits = resize_map(logits.float(), labels.shape[1:])
        ignore_index = self.config.uper_net.loss_ignore_index
        loss = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
        return loss / labels.numel()

    def check_labels(self, labels: torch.Tensor, batch_size: int):
        if labels.ndim != 3 or labels.shape[0] != batch_size or labels.is_floating_point():
            raise ValueError(
                f"`labels` must be integer maps of the shape ({batch_size}, height, width), one per image; got "
                f"{labels.dtype} of the shape {tuple(labels.shape)}."
            )
        if torch.compiler.is_compiling():
            return
        num_labels, ignore_index = self.config.num_labels, self.config.uper_net.loss_ignore_index
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_labels))]
        if len(outside) > 0:
            raise ValueError(
                f"`labels` hold the class id {outside[0].item()}, but the model has {num_labels} classes (ids 0 to "
                f"{num_labels - 1}; {ignore_index} is ignored). Set `num_labels` or `id2label` to fit the data, or "
                "`do_reduce_labels=True` of the image processor where id 0 means that a pixel has no class."
            )


PiipForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = ["PiipForSemanticSegmentation"]
