# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Parameter-Inverted Image Pyramid Networks for Transformers."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .configuration_piip import PiipBranchConfig, PiipConfig
from .image_processing_piip import PiipImageProcessor
from .image_processing_pil_piip import PiipImageProcessorPil
from .modeling_piip import (
    PiipBackbone,
    PiipForImageClassification,
    PiipModel,
    PiipModelOutput,
    PiipPreTrainedModel,
)


__version__ = "0.1.0"

# With the package installed the Auto classes know PIIP without `trust_remote_code`.
AutoConfig.register("piip", PiipConfig)
AutoModel.register(PiipConfig, PiipModel)
AutoBackbone.register(PiipConfig, PiipBackbone)
AutoModelForImageClassification.register(PiipConfig, PiipForImageClassification)
AutoImageProcessor.register(
    PiipConfig, image_processor_classes={"torchvision": PiipImageProcessor, "pil": PiipImageProcessorPil}
)

__all__ = [
    "PiipBackbone",
    "PiipBranchConfig",
    "PiipConfig",
    "PiipForImageClassification",
    "PiipImageProcessor",
    "PiipImageProcessorPil",
    "PiipModel",
    "PiipModelOutput",
    "PiipPreTrainedModel",
]
