# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Parameter-Inverted Image Pyramid Networks for Transformers."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_piip import PiipBranchConfig, PiipConfig
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

__all__ = [
    "PiipBackbone",
    "PiipBranchConfig",
    "PiipConfig",
    "PiipForImageClassification",
    "PiipModel",
    "PiipModelOutput",
    "PiipPreTrainedModel",
]
