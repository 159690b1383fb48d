# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Image processor of PIIP on NumPy and Pillow, for machines without torchvision."""

from transformers.image_processing_backends import PilBackend

from .image_processing_piip import PiipImageProcessorKwargs, PiipImageProcessorMixin, PiipPostProcessingMixin


class PiipImageProcessorPil(PiipPostProcessingMixin, PiipImageProcessorMixin, PilBackend):
    r"""
    Constructs a PIIP image processor that works on NumPy arrays with Pillow. Options, defaults and accepted images are
    those of [`PiipImageProcessor`]; the results agree up to the rounding of the resize.
    """

    valid_kwargs = PiipImageProcessorKwargs


PiipImageProcessorPil.register_for_auto_class("AutoImageProcessor")


__all__ = ["PiipImageProcessorPil"]
