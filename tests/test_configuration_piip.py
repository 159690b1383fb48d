import copy
import pickle
import re
from dataclasses import asdict

import pytest

from modeling_piip import (
    PiipBackbone,
    PiipBranchConfig,
    PiipConfig,
    PiipDinoConfig,
    PiipMaskRCNNConfig,
    PiipUperNetConfig,
)

from .common import tiny_branch, tiny_cls_config, tiny_config


# options that cannot work -> what the message says: field, value, and what would be right
BAD_BRANCHES = [
    ({"image_size": 0}, "`image_size` .* must be positive, got 0"),
    ({"patch_size": -4}, "`patch_size` .* must be positive, got -4"),
    ({"hidden_size": 0}, "`hidden_size` .* must be positive, got 0"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` .* must be positive, got 0"),
    ({"num_attention_heads": 0}, "`num_attention_heads` .* must be positive, got 0"),
    ({"image_size": 3}, r"`image_size` \(3\) .* smaller than its `patch_size` \(4\)"),
    ({"num_attention_heads": 5}, r"`num_attention_heads` \(5\) .* must divide its `hidden_size` \(32\)"),
    ({"mlp_ratio": 0}, r"`mlp_ratio` \(0\) .* leaves no channel to its MLP: raise it"),
    ({"mlp_ratio": 0.01}, r"`mlp_ratio` \(0\.01\) .* leaves no channel"),
    ({"hidden_act": "gleu"}, '`hidden_act` .* such as "gelu" .* got "gleu"'),
    ({"layer_norm_eps": -1e-6}, "`layer_norm_eps` .* must not be negative, got -1e-06"),
    ({"position_embedding_grid": 0}, "`position_embedding_grid` .* must be positive, got 0"),
    (
        {"window_size": [4]},
        "`window_size` .* has 1 entries but .* 2 layers: give one number for all layers or one entry",
    ),
    ({"window_size": -4}, r"`window_size` .* positive numbers or None \(global attention\), got \[-4, -4\]"),
    (
        {"window_size": 4, "use_cls_token": True},
        "`use_cls_token` .* set `window_size` to None or drop the class token",
    ),
    ({"drop_path_rate": 1.0}, r"`drop_path_rate` .* at least 0 and less than 1, got 1\.0"),
    ({"drop_path_rate": -0.1}, r"`drop_path_rate` .* at least 0 and less than 1, got -0\.1"),
    ({"stages": [1, 2]}, r"`stages` .* sum to `num_hidden_layers` \(2\), got \[1, 2\] with the sum 3"),
    ({"stages": [3, -1]}, r"`stages` .* got \[3, -1\]"),
    ({"stages": []}, r"`stages` .* got \[\]"),
]

BAD_CONFIGS = [
    ({"branches": []}, "`branches` is empty: give at least one branch"),
    (
        {"branches": [tiny_branch(), tiny_branch(image_size=32)]},
        r"`branches` .* highest .* got image sizes \[16, 32\]",
    ),
    (
        {"branches": [tiny_branch(), tiny_branch(stages=[2])]},
        r"same number of stages .* got \[2, 1\]: set `stages` of the branches",
    ),
    ({"num_channels": 0}, "`num_channels` must be positive, got 0"),
    ({"interaction_num_heads": 0}, "`interaction_num_heads` must be positive, got 0"),
    ({"interaction_num_points": -1}, "`interaction_num_points` must be positive, got -1"),
    ({"interaction_value_ratio": 0}, "`interaction_value_ratio` must be positive, got 0"),
    ({"interaction_ffn_ratio": -0.5}, r"`interaction_ffn_ratio` .*-0\.5"),
    (
        {"interaction_ffn_ratio": 0.05},
        r"`interaction_ffn_ratio` \(0\.05\) leaves no channel .* `hidden_size` 16: raise it, or set it to 0",
    ),
    ({"layer_norm_eps": -1.0}, r"`layer_norm_eps` must not be negative, got -1\.0"),
    ({"initializer_range": -0.02}, r"`initializer_range` must not be negative, got -0\.02"),
    ({"interaction_drop_path_rate": 1.5}, r"`interaction_drop_path_rate` must be at least 0 .* got 1\.5"),
    (
        {"interaction_num_heads": 3},
        r"`interaction_num_heads` \(3\) must divide the value width 8 .* 16 \(`interaction_value_ratio` 0\.5\)",
    ),
    (
        {"interaction_num_heads": 32, "interaction_attention": "cross"},
        r"`interaction_num_heads` \(32\) must divide the value width 16",
    ),
    ({"num_groups": 0}, "`num_groups` must be positive, got 0"),
    ({"num_groups": 5}, r'`num_groups` \(5\) must divide the normalized width 32 of `merge_type="conv"`'),
    ({"num_groups": 32, "merge_type": "linear"}, r"`num_groups` \(32\) must divide the normalized width 16"),
    (
        {"classification_head": "branches"},
        '`classification_head="branches"` .*: set `merge_type="concat"`, got "conv"',
    ),
    ({"out_features": ["p1"]}, r"out_features .*\['p2', 'p3', 'p4', 'p5'\] got \['p1'\]"),
    ({"out_features": ["p5", "p2"]}, r"out_features .* same order .* got \['p5', 'p2'\]"),
    ({"out_indices": [4]}, "out_indices .*4"),
    ({"out_features": []}, r"`out_features` .* is empty: name at least one level of \['p2', 'p3', 'p4', 'p5'\]"),
    ({"out_indices": ()}, "`out_indices` is empty: .* leave both out for all"),
    ({"num_labels": 0}, "`num_labels` must be positive, .* got 0 .* use `PiipModel` or `PiipBackbone`"),
    ({"id2label": {}, "num_labels": 0}, "`id2label` hold a class, got 0"),
]

BAD_HEADS = [
    ("uper_net", {"hidden_size": 0}, "`hidden_size` of `PiipUperNetConfig` must be positive, got 0"),
    ("uper_net", {"pool_scales": [1, 0]}, r"`pool_scales` .* positive, got \[1, 0\]"),
    ("uper_net", {"pool_scales": []}, r"`pool_scales` .* positive, got \[\]"),
    ("uper_net", {"dropout": 1.5}, r"`dropout` of `PiipUperNetConfig` must be between 0 and 1, got 1\.5"),
    ("uper_net", {"crop_size": 64, "stride": 65}, r"`stride` \(65\) .* larger than its `crop_size` \(64\)"),
    ("dino", {"num_queries": 0}, "`num_queries` of `PiipDinoConfig` must be positive, got 0"),
    ("dino", {"num_denoising_queries": -1}, "`num_denoising_queries` .* must not be negative, got -1"),
    ("dino", {"hidden_size": 36}, r"`hidden_size` \(36\) .* divisible by 4 and by its `num_attention_heads` \(8\)"),
    ("mask_rcnn", {"anchor_ratios": [1.0, -1.0]}, "`anchor_ratios` of `PiipMaskRCNNConfig` must be positive"),
    ("mask_rcnn", {"box_score_thresh": 5}, "`box_score_thresh` .* between 0 and 1, got 5"),
    ("mask_rcnn", {"box_coder_stds": [0.1, 0.2]}, r"`box_coder_stds` .* needs 4 numbers .* got \[0\.1, 0\.2\]"),
    ("mask_rcnn", {"rpn_bg_iou_thresh": 0.8}, r"`rpn_bg_iou_thresh` \(0\.8\) .* above `rpn_fg_iou_thresh` \(0\.7\)"),
]


@pytest.mark.parametrize("options, message", BAD_BRANCHES, ids=[str(options) for options, _ in BAD_BRANCHES])
def test_impossible_branch_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PiipBranchConfig(**tiny_branch(**options))


@pytest.mark.parametrize("options, message", BAD_CONFIGS, ids=[str(options)[:60] for options, _ in BAD_CONFIGS])
def test_impossible_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


@pytest.mark.parametrize("head, options, message", BAD_HEADS, ids=[f"{head}-{bad}" for head, bad, _ in BAD_HEADS])
def test_impossible_head_is_refused(head, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{head: options})


def test_level_with_a_group_norm_that_does_not_fit_is_refused_by_the_backbone():
    config = tiny_config(merge_type="concat", num_groups=32)
    with pytest.raises(ValueError, match=r"`num_groups` \(32\) must divide the width 48 .* set `pyramid_norm"):
        PiipBackbone(config)
    PiipBackbone(tiny_config(merge_type="concat", num_groups=32, out_features=["p3", "p4", "p5"]))
    PiipBackbone(tiny_config(merge_type="concat", num_groups=32, pyramid_norm="layer"))


@pytest.mark.parametrize(
    "options",
    [{"hidden_size": "16"}, {"stages": 2}, {"norm_type": "batchnorm"}, {"window_padding": None}, {"qkv_bias": 2}],
    ids=str,
)
def test_wrong_type_in_a_branch_names_the_field(options):
    with pytest.raises(Exception, match=re.escape(next(iter(options)))):
        PiipBranchConfig(**tiny_branch(**options))


@pytest.mark.parametrize(
    "options", [{"num_groups": "4"}, {"merge_type": "mean"}, {"interaction_attention": "linear"}], ids=str
)
def test_wrong_type_names_the_field(options):
    with pytest.raises(Exception, match=re.escape(next(iter(options)))):
        tiny_config(**options)


def test_levels_cannot_be_emptied_later():
    config = tiny_config()
    with pytest.raises(ValueError, match="`out_features` .* is empty"):
        config.out_features = []


def test_misspelled_branch_option_is_refused():
    with pytest.raises(TypeError, match="hidden_sise"):
        tiny_config(branches=[tiny_branch(hidden_sise=8)])


CONFIGS = {"default": PiipConfig, "dense": tiny_config, "classification": tiny_cls_config}


@pytest.mark.parametrize("make_config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_json(make_config, tmp_path):
    config = make_config(out_features=["p3", "p5"], id2label={0: "cat", 1: "dog", 2: "eel"})
    config.save_pretrained(tmp_path)
    loaded = PiipConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.branches == config.branches
    assert loaded.out_features == ["p3", "p5"] and loaded.out_indices == [1, 3]
    assert loaded.id2label == {0: "cat", 1: "dog", 2: "eel"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(duplicate):
    config = tiny_config()
    twin = duplicate(config)
    assert twin.to_dict() == config.to_dict()
    twin.branches[0].image_size = 64
    twin.out_features = ["p4"]
    assert config.branches[0].image_size == 32
    assert config.out_features == ["p2", "p3", "p4", "p5"]


def test_branches_may_be_dicts_or_objects():
    dicts = tiny_config()
    objects = tiny_config(
        branches=[
            PiipBranchConfig(**tiny_branch(image_size=32, hidden_size=16, window_size=[3, None])),
            PiipBranchConfig(**tiny_branch()),
        ]
    )
    assert dicts.to_dict() == objects.to_dict()


def test_heads_may_be_dicts_or_objects_and_survive_json(tmp_path):
    heads = {
        "uper_net": PiipUperNetConfig(hidden_size=64),
        "dino": PiipDinoConfig(num_queries=30),
        "mask_rcnn": PiipMaskRCNNConfig(with_masks=False),
    }
    config = tiny_config(**heads)
    config.save_pretrained(tmp_path)
    loaded = PiipConfig.from_pretrained(tmp_path)
    for name, head in heads.items():
        assert getattr(loaded, name) == getattr(tiny_config(**{name: asdict(head)}), name) == head
        assert getattr(PiipConfig(), name) is None
    assert loaded.to_dict() == config.to_dict()


def test_misspelled_option_of_a_head_is_refused():
    with pytest.raises(TypeError, match="hidden_sise"):
        tiny_config(dino={"hidden_sise": 8})


def test_options_of_from_pretrained_replace_saved_ones(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = PiipConfig.from_pretrained(tmp_path, num_labels=7, out_features=["p4"], interaction_attention="cross")
    assert (config.num_labels, config.out_features, config.interaction_attention) == (7, ["p4"], "cross")


def test_default_is_the_smallest_published_pyramid():
    config = PiipConfig()
    assert [branch.image_size for branch in config.branches] == [368, 192, 128]
    assert [branch.hidden_size for branch in config.branches] == [192, 384, 768]
    assert (config.image_size, config.hidden_size, config.num_hidden_layers, config.num_stages) == (368, 768, 36, 12)


def test_head_follows_the_merge_unless_it_is_given():
    assert tiny_config().classification_head == "merged"
    assert tiny_cls_config().classification_head == "branches"
    assert tiny_cls_config(classification_head="merged").classification_head == "merged"


def test_merged_width_is_that_of_the_last_branch_or_the_sum():
    assert tiny_config().hidden_size == 32
    assert tiny_config(merge_type="concat").hidden_size == 48


def test_drop_path_is_constant_or_rises_to_the_last_layer():
    options = tiny_branch(num_hidden_layers=3, drop_path_rate=0.4)
    assert PiipBranchConfig(**options).drop_path_rates == [0.4, 0.4, 0.4]
    assert PiipBranchConfig(**options, drop_path_schedule="linear").drop_path_rates == pytest.approx([0, 0.2, 0.4])
