"""Transformers' common tests of configurations, models and backbones on the classes of PIIP."""

import unittest

import pytest
import torch
from torch import nn
from transformers.models.auto import modeling_auto

from modeling_piip import (
    PiipBackbone,
    PiipConfig,
    PiipForImageClassification,
    PiipForInstanceSegmentation,
    PiipForObjectDetection,
    PiipForSemanticSegmentation,
    PiipModel,
)

from ..common import tiny_branch, tiny_config
from .common_tests import backbone_common, configuration_common, modeling_common


# Every class, and the list of the library from which the common tests read which labels its forward needs
MODEL_CLASSES = {
    PiipModel: modeling_auto.MODEL_MAPPING_NAMES,
    PiipBackbone: modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
    PiipForImageClassification: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    PiipForInstanceSegmentation: modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    PiipForObjectDetection: modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    PiipForSemanticSegmentation: modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
}


@pytest.fixture(autouse=True)
def listed_classes(monkeypatch):
    for model_class, names in MODEL_CLASSES.items():
        monkeypatch.setitem(names, "piip", model_class.__name__)


class PiipModelTester:
    """The model that is tested: two branches of one layer, because the common tests allow two layers in all."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2
    # the first branch comes first in hidden states and attentions
    seq_length = 64
    hidden_size = 16
    num_attention_heads = 2
    # two branches, before and after their one interaction
    expected_num_hidden_layers = 4

    def __init__(self, parent):
        pass

    def get_config(self) -> PiipConfig:
        branches = [
            tiny_branch(image_size=32, hidden_size=16, num_hidden_layers=1),
            tiny_branch(num_hidden_layers=1),
        ]
        return tiny_config(branches=branches)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": modeling_common.floats_tensor([self.batch_size, 3, 32, 32])}


class PiipModelTest(modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(MODEL_CLASSES)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = PiipModelTester(self)
        self.config_tester = configuration_common.ConfigTester(
            self,
            config_class=PiipConfig,
            has_text_modality=False,
            # without `num_attention_heads`: every branch has its own number
            common_properties=["hidden_size", "num_hidden_layers"],
            num_channels=4,
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The original makes no labels for detectors."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class in (PiipForInstanceSegmentation, PiipForObjectDetection):
            label = {
                "class_labels": torch.tensor([1], device=modeling_common.torch_device),
                "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]], device=modeling_common.torch_device),
                "masks": torch.ones(1, 32, 32, dtype=torch.bool, device=modeling_common.torch_device),
            }
            inputs["labels"] = [label] * self.model_tester.batch_size
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """The original expects token embeddings; here it is the patch projection of the first branch."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
            self.assertIsNone(model.get_output_embeddings())


class PiipBackboneTest(backbone_common.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (PiipBackbone,)
    config_class = PiipConfig

    def setUp(self):
        self.model_tester = PiipModelTester(self)

    def test_config(self):
        """
        The original expects the levels "stem", "stage1" ... and the last of them as default; these are feature pyramid
        levels and the default is all of them, as in the detectors and segmenters of the paper.
        """
        levels = ["p2", "p3", "p4", "p5"]
        for config in (PiipConfig(), PiipConfig(out_features=None, out_indices=None)):
            self.assertEqual(config.stage_names, levels)
            self.assertEqual(config.out_features, levels)
            self.assertEqual(config.out_indices, [0, 1, 2, 3])
        for options in ({"out_features": ["p3", "p5"]}, {"out_indices": [1, 3]}, {"out_indices": [1, -1]}):
            config = PiipConfig(**options)
            self.assertEqual(config.out_features, ["p3", "p5"])
            self.assertEqual([index % 4 for index in config.out_indices], [1, 3])
        with self.assertRaises(ValueError):
            PiipConfig(out_features=["p3", "p4"], out_indices=[0, 2])
