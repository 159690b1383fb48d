"""Transformers' common tests of image processors on those of PIIP."""

import unittest

from modeling_piip import (
    PiipImageProcessor,
    PiipImageProcessorPil,
    PiipInstanceSegmentationImageProcessor,
    PiipInstanceSegmentationImageProcessorPil,
)

from .common_tests import image_processing_common


class PiipImageProcessingTester(image_processing_common.ImageProcessingTester):
    """
    Sets everything itself: the newest base class would look for the processors inside the library, under the name of
    the folder of this file; the oldest has only methods.
    """

    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    size = {"height": 18, "width": 18}
    crop_size = {"height": 18, "width": 18}
    num_labels = 10

    def __init__(self):
        self.image_processing_classes = {"torchvision": PiipImageProcessor, "pil": PiipImageProcessorPil}
        self.options = {"size": self.size, "crop_size": self.crop_size}

    def prepare_image_processor_dict(self):
        return self.options


class PiipImageProcessingTestMixin(image_processing_common.ImageProcessingTestMixin):
    @property
    def image_processing_classes(self):
        return self.image_processor_tester.image_processing_classes

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    def setUp(self):
        self.image_processor_tester = PiipImageProcessingTester()

    def test_call_numpy_4_channels(self):
        """Transformers 5.17 does not tell the processor that its four channels are not RGBA; later versions do."""
        self.image_processor_tester.options["do_convert_rgb"] = False
        super().test_call_numpy_4_channels()

    def test_pil_can_run_without_torchvision(self):
        """The original (a slow test) loads with AutoImageProcessor in a process that does not know this package."""
        self.skipTest("PIIP models need torchvision")


class PiipImageProcessingTest(
    PiipImageProcessingTestMixin, image_processing_common.PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    pass


class PiipInstanceSegmentationImageProcessingTest(PiipImageProcessingTestMixin, unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.image_processor_tester.image_processing_classes = {
            "torchvision": PiipInstanceSegmentationImageProcessor,
            "pil": PiipInstanceSegmentationImageProcessorPil,
        }
        # the tests expect batches of exactly `size`
        self.image_processor_tester.options["pad_size_divisor"] = 1

    def test_valid_kwargs_set(self):
        """The original expects a class of options of its own; they are those of the other processor."""
        for processor_class in self.image_processing_classes.values():
            self.assertIs(processor_class(**self.image_processor_dict).valid_kwargs, PiipImageProcessor.valid_kwargs)
