# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Parameter-Inverted Image Pyramid Networks for Transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
)

from .configuration_piip import PiipBranchConfig, PiipConfig, PiipDinoConfig, PiipMaskRCNNConfig, PiipUperNetConfig
from .image_processing_piip import PiipImageProcessor
from .image_processing_piip_instance_segmentation import (
    PiipInstanceSegmentationImageProcessor,
    PiipInstanceSegmentationImageProcessorPil,
)
from .image_processing_pil_piip import PiipImageProcessorPil
from .modeling_piip import (
    PiipBackbone,
    PiipForImageClassification,
    PiipModel,
    PiipModelOutput,
    PiipPreTrainedModel,
)
from .modeling_piip_instance_segmentation import PiipForInstanceSegmentation, PiipInstanceSegmentationOutput
from .modeling_piip_object_detection import PiipForObjectDetection, PiipObjectDetectionOutput
from .modeling_piip_semantic_segmentation import PiipForSemanticSegmentation


__version__ = "0.1.0"

# With the package installed the Auto classes know PIIP without `trust_remote_code`.
AutoConfig.register("piip", PiipConfig)
AutoModel.register(PiipConfig, PiipModel)
AutoBackbone.register(PiipConfig, PiipBackbone)
AutoModelForImageClassification.register(PiipConfig, PiipForImageClassification)
AutoModelForInstanceSegmentation.register(PiipConfig, PiipForInstanceSegmentation)
# The pipeline tries this class first, whatever the kind of segmentation: `architectures` of the checkpoint chooses.
AutoModelForImageSegmentation.register(PiipConfig, (PiipForInstanceSegmentation, PiipForSemanticSegmentation))
# Mask R-CNN finds boxes too
AutoModelForObjectDetection.register(PiipConfig, (PiipForObjectDetection, PiipForInstanceSegmentation))
AutoModelForSemanticSegmentation.register(PiipConfig, PiipForSemanticSegmentation)
AutoImageProcessor.register(
    PiipConfig, image_processor_classes={"torchvision": PiipImageProcessor, "pil": PiipImageProcessorPil}
)
# By its name in a saved folder AutoImageProcessor finds a processor under any key, and this one suits that head only.
AutoImageProcessor.register(
    PiipMaskRCNNConfig,
    image_processor_classes={
        "torchvision": PiipInstanceSegmentationImageProcessor,
        "pil": PiipInstanceSegmentationImageProcessorPil,
    },
)

__all__ = [
    "PiipBackbone",
    "PiipBranchConfig",
    "PiipConfig",
    "PiipDinoConfig",
    "PiipForImageClassification",
    "PiipForInstanceSegmentation",
    "PiipForObjectDetection",
    "PiipForSemanticSegmentation",
    "PiipImageProcessor",
    "PiipImageProcessorPil",
    "PiipInstanceSegmentationImageProcessor",
    "PiipInstanceSegmentationImageProcessorPil",
    "PiipInstanceSegmentationOutput",
    "PiipMaskRCNNConfig",
    "PiipModel",
    "PiipModelOutput",
    "PiipObjectDetectionOutput",
    "PiipPreTrainedModel",
    "PiipUperNetConfig",
]
