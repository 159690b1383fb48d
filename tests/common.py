"""Small models and inputs that several test files use."""

import torch

from modeling_piip import PiipConfig


def tiny_config(**options) -> PiipConfig:
    """
    Two branches of two layers: class token in neither, windows in the first layer of the first branch. Both branches
    cut an input of 32 pixels into several patches: the first into 8 x 8, the second into 4 x 4.
    """
    defaults = {
        "branches": [tiny_branch(image_size=32, hidden_size=16, window_size=[3, None]), tiny_branch()],
        "interaction_num_heads": 2,
        "interaction_num_points": 2,
        "num_groups": 4,
        "num_labels": 3,
        "uper_net": {"hidden_size": 8, "auxiliary_hidden_size": 8},
        "dino": {
            "hidden_size": 16,
            "num_queries": 12,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "num_points": 2,
            "intermediate_size": 16,
            "num_denoising_queries": 6,
        },
        "mask_rcnn": {"hidden_size": 8, "box_hidden_size": 16, "mask_num_convs": 2, "max_detections": 10},
    }
    return PiipConfig(**(defaults | options))


def tiny_branch(**options) -> dict:
    defaults = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
    }
    return defaults | options


def tiny_cls_config(**options) -> PiipConfig:
    """As the published classification models: class tokens, layer scale, one classifier per branch."""
    shared = {"use_cls_token": True, "layer_scale_init_value": 1.0}
    branches = [tiny_branch(image_size=32, hidden_size=16, **shared), tiny_branch(**shared)]
    return tiny_config(**({"branches": branches, "merge_type": "concat"} | options))


def build(model_class, config: PiipConfig | None = None):
    """The model in evaluation mode, with noise in all weights: new interactions have gates of zero and do nothing."""
    torch.manual_seed(0)
    model = model_class(config or tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(*shape: int) -> torch.Tensor:
    """Random images, the same for the same shape."""
    return torch.randn(shape or (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
