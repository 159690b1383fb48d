import argparse
import logging
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import GluMlp
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling_piip import PiipBackbone, PiipBranchConfig, PiipConfig, PiipForImageClassification, PiipModel
from modeling_piip.conversion import convert_config, convert_state_dict

from .goldens import CASES, build_official_weights, get_official_config


IMAGE_SIZE, PATCH_SIZE, WIDTH, DEPTH, HEADS = 32, 8, 32, 2, 2
TRANSFORMERS_OPTIONS = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "layer_norm_eps": 1e-6,
}


def build_config(num_branches=1, **options):
    """Single-branch configurations run the layers of the branch and nothing else."""
    options = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    } | options
    branches = [PiipBranchConfig(**options) for _ in range(num_branches)]
    return PiipConfig(branches=branches, merge_type="concat", interaction_num_heads=4)


def randomize(model):
    """Large random values everywhere, so that a swapped, lost or misplaced weight shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build_timm_vit(**options):
    options = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": DEPTH} | options
    return randomize(VisionTransformer(num_heads=HEADS, num_classes=5, **options))


def without_cls_token(**options):
    return build_timm_vit(class_token=False, global_pool="avg", **options)


def save_transformers(model, folder):
    randomize(model).save_pretrained(folder)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def save(tmp_path):
    def save_source(weights, name="vit.pth"):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(weights, path)
        else:
            torch.save(weights, path)
        return path

    return save_source


def load(source, config=None):
    config = build_config() if config is None else config
    return PiipModel.from_pretrained_branches(config, [source]).eval()


def timm_tokens(vit, images):
    """Tokens after the blocks, without the final norm."""
    return vit.blocks(vit.patch_embed(images) + vit.pos_embed)


@torch.no_grad()
def run_branch(model, hidden_states):
    """The layers of the only branch on a given sequence."""
    for layer in model.branches[0].layers:
        hidden_states = layer(hidden_states, (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE))
    return hidden_states


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ---- the branch computes what its source computes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit.pth", "vit.pt", "vit.bin", "vit.safetensors"])
@torch.no_grad()
def test_branch_computes_the_tokens_of_a_timm_vit(images, save, name):
    vit = without_cls_token()
    model = load(save(vit.state_dict(), name))
    assert_close(model(images).branch_hidden_states[0], timm_tokens(vit, images))


@torch.no_grad()
def test_branch_with_cls_token_computes_the_tokens_of_a_timm_vit(images, save):
    # Without an entry for the class token in the position table, as in DeiT III, both networks are the same.
    vit = build_timm_vit(class_token=True, no_embed_class=True, init_values=0.5)
    model = load(save(vit.state_dict()), build_config(use_cls_token=True, layer_scale_init_value=1.0))
    tokens = vit.blocks(vit._pos_embed(vit.patch_embed(images)))
    assert_close(model(images).branch_hidden_states[0], tokens[:, 1:])


@torch.no_grad()
def test_qkv_without_bias(images, save):
    vit = without_cls_token(qkv_bias=False)
    for qkv_bias in (False, True):  # a new bias is zero
        model = load(save(vit.state_dict()), build_config(qkv_bias=qkv_bias))
        assert_close(model(images).branch_hidden_states[0], timm_tokens(vit, images))


@pytest.mark.parametrize(
    "model_class, config",
    [
        (ViTModel, ViTConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH)),
        (ViTForImageClassification, ViTConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH)),
        (ViTForImageClassification, ViTConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH, qkv_bias=False)),
        (DeiTForImageClassificationWithTeacher, DeiTConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH)),
        (Dinov2Model, Dinov2Config(**TRANSFORMERS_OPTIONS)),
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TRANSFORMERS_OPTIONS)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
@torch.no_grad()
def test_branch_computes_the_layers_of_a_transformers_model(images, tmp_path, model_class, config, as_file):
    source = save_transformers(model_class(config), tmp_path).base_model
    scale = 1.0 if config.model_type.startswith("dinov2") else None
    branch_config = build_config(use_cls_token=True, layer_scale_init_value=scale)
    model = load(tmp_path / "model.safetensors" if as_file else tmp_path, branch_config)

    num_patches = model.branches[0].embeddings.position_embeddings.shape[1]
    embedded = source.embeddings(images)
    tokens, cls_token, _ = model.branches[0].embeddings(images)
    assert_close(tokens, embedded[:, -num_patches:])
    assert_close(cls_token[:1], source.embeddings.cls_token)
    # All tokens of the source, whatever stands in front of its patches
    assert_close(run_branch(model, embedded), last_layer_output(source, images))


def last_layer_output(source, images):
    outputs = {}
    layers = source.encoder.layer if hasattr(source, "encoder") else source.layers
    hook = layers[-1].register_forward_hook(lambda module, args, output: outputs.update(last=output))
    source(images)
    hook.remove()
    return outputs["last"] if isinstance(outputs["last"], torch.Tensor) else outputs["last"][0]


def test_vit_mae_without_its_decoder(tmp_path):
    config = ViTMAEConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH, decoder_num_hidden_layers=1)
    source = save_transformers(ViTMAEForPreTraining(config), tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        embeddings = load(path).branches[0].embeddings
        assert torch.equal(embeddings.position_embeddings, source.vit.embeddings.position_embeddings[:, 1:])


def test_intern_vit_keys(save):
    config = build_config(norm_type="rmsnorm", qk_norm=True, qkv_bias=False, layer_scale_init_value=0.1)
    expected = randomize(PiipModel(config)).branches[0]
    names = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "layers": "blocks",
        "attention.projection": "attn.proj",
        "attention": "attn",
        "layer_scale1.weight": "ls1.gamma",
        "layer_scale2.weight": "ls2.gamma",
    }
    weights = {"cls_token": torch.randn(1, 1, WIDTH), "clip_projector.norm1_q.weight": torch.randn(WIDTH)}
    for key, value in expected.state_dict().items():
        for ours, official in names.items():
            key = key.replace(ours, official)
        weights[key] = value
    weights["pos_embed"] = torch.cat([torch.randn(1, 1, WIDTH), weights["pos_embed"]], dim=1)
    assert "blocks.1.attn.q_norm.weight" in weights and "blocks.0.norm1.bias" not in weights
    assert_same_weights(load(save(weights), config).branches[0], expected)


def assert_same_weights(actual, expected):
    expected = expected.state_dict()
    for name, value in actual.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_gains_of_the_official_deit_3_files(save):
    vit = build_timm_vit(init_values=0.5)
    weights = vit.state_dict()
    renamed = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): weights[key] for key in weights}
    config = build_config(layer_scale_init_value=1e-4)
    assert "blocks.0.gamma_2" in renamed
    assert_same_weights(load(save(renamed), config).branches[0], load(save(weights), config).branches[0])


# ---- position tables, patch kernels, class token --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, num_dropped",
    [
        ({"class_token": True}, 1),
        ({"class_token": True, "no_embed_class": True}, 0),
        ({"class_token": True, "reg_tokens": 4}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
    ],
)
def test_position_table_is_resized_without_the_entries_of_other_tokens(save, options, num_dropped):
    vit = build_timm_vit(img_size=56, **options)
    table = load(save(vit.state_dict())).branches[0].embeddings.position_embeddings
    patches = vit.pos_embed[:, num_dropped:].reshape(1, 7, 7, WIDTH).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table, expected.permute(0, 2, 3, 1).reshape(1, 16, WIDTH))


def test_position_table_of_a_distilled_deit(save):
    vit = randomize(
        timm.models.deit.VisionTransformerDistilled(
            img_size=IMAGE_SIZE, patch_size=PATCH_SIZE, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
        )
    )
    table = load(save(vit.state_dict())).branches[0].embeddings.position_embeddings
    assert torch.equal(table, vit.pos_embed[:, 2:])


def test_position_table_follows_the_grid_of_the_config_not_the_image(save):
    vit = build_timm_vit()
    model = load(save(vit.state_dict()), build_config(image_size=64, position_embedding_grid=4))
    assert torch.equal(model.branches[0].embeddings.position_embeddings, vit.pos_embed[:, 1:])


def test_patch_kernels_are_resized(save):
    vit = build_timm_vit(img_size=56, patch_size=14)
    model = load(save(vit.state_dict()), build_config(image_size=64, patch_size=16))
    expected = F.interpolate(vit.patch_embed.proj.weight, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.branches[0].embeddings.patch_embeddings.weight, expected)


def test_half_precision_sources_are_resized_in_float32(save):
    vit = build_timm_vit(img_size=56, patch_size=14).half()
    model = load(save(vit.state_dict()), build_config(image_size=64, patch_size=16))
    kernel = vit.patch_embed.proj.weight.float()
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False).half().float()
    assert model.dtype == torch.float32
    assert torch.equal(model.branches[0].embeddings.patch_embeddings.weight, expected)


def test_class_token_is_taken_as_it_is(save):
    vit = build_timm_vit()
    model = load(save(vit.state_dict()), build_config(use_cls_token=True))
    assert torch.equal(model.branches[0].embeddings.cls_token, vit.cls_token)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {"module": {f"backbone.{key}": value for key, value in weights.items()}},
    ],
)
def test_wrapped_files(save, wrap):
    vit = build_timm_vit()
    model = load(save(wrap(vit.state_dict())))
    assert torch.equal(model.branches[0].layers[1].attention.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_files_are_not_executed(save):
    with pytest.raises(ValueError, match="cannot be read"):
        load(save(build_timm_vit()))


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_truncated_file(save, name):
    path = save(build_timm_vit().state_dict(), name)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"Branch 0 cannot start from .*{name}.*cannot be read"):
        load(path)


def test_file_without_weights(save):
    with pytest.raises(ValueError, match="holds no state dict but a list"):
        load(save([1, 2]))
    with pytest.raises(ValueError, match="it has no learned table"):
        load(save({"epoch": 3}))


# ---- timm names -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch):
    """`timm.create_model(name, pretrained=True)` with random weights and two layers."""
    created, create_model = [], timm.create_model

    def create_random_model(name, pretrained=False, **options):
        assert pretrained
        created.append(randomize(create_model(name, pretrained=False, depth=DEPTH, **options)))
        return created[-1]

    monkeypatch.setattr(timm, "create_model", create_random_model)
    return created


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224.augreg_in21k", {}),
        ("timm/vit_tiny_patch16_224.augreg_in21k", {}),
        ("hf-hub:timm/deit_tiny_patch16_224.fb_in1k", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {"layer_scale_init_value": 1.0}),
        ("vit_small_patch14_dinov2.lvd142m", {"layer_scale_init_value": 1.0}),
        ("vit_small_patch14_reg4_dinov2", {"layer_scale_init_value": 1.0}),
    ],
)
def test_timm_names(no_download, name, options):
    width = 192 if "tiny" in name else 384
    config = build_config(hidden_size=width, num_attention_heads=width // 64, patch_size=16, **options)
    model = load(name, config)
    assert torch.equal(model.branches[0].layers[1].mlp.fc2.weight, no_download[0].blocks[1].mlp.fc2.weight)


def test_number_of_heads_must_agree_where_it_is_known(no_download, tmp_path):
    # The shapes do not depend on it, the numbers do.
    config = build_config(hidden_size=192, num_attention_heads=6)
    with pytest.raises(ValueError, match="it has 3 attention heads, the branch 6\nSet num_attention_heads=3 in"):
        load("vit_tiny_patch16_224", config)
    save_transformers(Dinov2Model(Dinov2Config(**TRANSFORMERS_OPTIONS)), tmp_path)
    with pytest.raises(ValueError, match="it has 2 attention heads, the branch 4"):
        load(tmp_path, build_config(num_attention_heads=4, layer_scale_init_value=1.0))


# ---- sources that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source_options, branch_options, message, remedy",
    [
        (
            {"embed_dim": 64},
            {},
            r"`layers.0.norm1.weight` has the shape \(64,\) in the source and \(32,\) in the branch",
            "Set hidden_size=64 in",
        ),
        ({"depth": 3}, {}, "`layers.2.norm1.weight` has no place in this branch", "Set num_hidden_layers=3 in"),
        ({"depth": 1}, {}, "`layers.1.norm1.weight` is missing in the source", "Set num_hidden_layers=1 in"),
        ({"mlp_ratio": 2}, {}, r"`layers.0.mlp.fc1.weight` .*\(64, 32\).*\(128, 32\)", "Set mlp_ratio=2.0 in"),
        (
            {"init_values": 0.5},
            {},
            "`layers.0.layer_scale1.weight` has no place in this branch",
            "Set layer_scale_init_value=1.0 in",
        ),
        (
            {},
            {"qkv_bias": False},
            "`layers.0.attention.qkv.bias` has no place in this branch",
            "Set qkv_bias=True in",
        ),
        ({}, {"qk_norm": True}, "`layers.0.attention.q_norm.weight` is missing in the source", "Set qk_norm=False in"),
        (
            {},
            {"norm_type": "rmsnorm"},
            "`layers.0.norm1.bias` has no place in this branch",
            "Set norm_type='layernorm' in",
        ),
        (
            {"pre_norm": True},
            {},
            "no network for.*`norm_pre.weight` has no place in a branch",
            "A source is",
        ),
        ({"mlp_layer": GluMlp}, {}, r"`layers.0.mlp.fc2.weight` .*\(32, 64\).*\(32, 128\)", "Choose another source"),
        ({"in_chans": 1}, {}, r"\(32, 1, 8, 8\) in the source and \(32, 3, 8, 8\) in the branch", "another source"),
        ({"img_size": (56, 112)}, {}, r"\(1, 99, 32\) is no square grid of patches", "square images"),
        (
            {"pos_embed": "none"},
            {},
            "no network for.*it has no learned table of absolute positions",
            "A source is",
        ),
    ],
)
def test_misfits_name_branch_weight_shapes_and_remedy(save, source_options, branch_options, message, remedy):
    path = save(build_timm_vit(**source_options).state_dict())
    config = build_config(num_branches=2, **branch_options)
    with pytest.raises(ValueError, match=f"(?s)^Branch 1 cannot start from .*{message}.*{remedy}"):
        PiipModel.from_pretrained_branches(config, [None, path])


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("resnet18", {}, "`conv1.weight` has no place in a branch"),
        ("beit_base_patch16_224", {"depth": 1}, "it has no learned table of absolute positions"),
        ("vit_small_patch16_dinov3", {"depth": 1}, "it has no learned table of absolute positions"),
    ],
)
def test_files_of_other_architectures_are_refused(save, name, options, reason):
    weights = timm.create_model(name, pretrained=False, **options).state_dict()
    with pytest.raises(ValueError, match=f"is no network for this branch.\n.*{reason}"):
        load(save(weights))


def test_transformers_models_of_other_types_are_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`bert` models fit no branch.*dinov2_with_registers, vit, vit_mae"):
        load(tmp_path)


def test_checkpoint_with_missing_weights_is_refused(tmp_path):
    # Transformers initializes what it does not find; that must not pass for pretrained.
    model = save_transformers(ViTModel(ViTConfig(**TRANSFORMERS_OPTIONS, intermediate_size=4 * WIDTH)), tmp_path)
    weights = {key: value for key, value in model.state_dict().items() if "layers.1.mlp.fc1" not in key}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`layers.1.mlp.fc1.weight` is missing in the source"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["vit_tinny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in22k"])
def test_misspelt_timm_name_lists_close_ones(source):
    with pytest.raises(ValueError, match=r"(?s)there is no such source. Close names in timm: .*vit_tiny_patch16_224"):
        load(source)


@pytest.mark.parametrize("source", ["resnet18", "no/such/file.safetensors", "qqqqq"])
def test_unknown_source_lists_what_is_accepted(source):
    with pytest.raises(ValueError, match="there is no such source.*timm name.*Transformers checkpoint.*local file"):
        load(source)


def test_folder_without_a_checkpoint_lists_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="(?s)is not a Transformers checkpoint.*timm name"):
        load(tmp_path)


def test_unreachable_hub_id_lists_what_is_accepted(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="(?s)is not a Transformers checkpoint.*timm name"):
        load("nobody-at-all/no-such-model")


@pytest.mark.parametrize("sources", ["vit_tiny_patch16_224", [None], [None] * 3])
def test_one_source_per_branch(sources):
    with pytest.raises(ValueError, match=r"one entry per branch \(2\).*timm name"):
        PiipModel.from_pretrained_branches(build_config(num_branches=2), sources)


# ---- every model class, and the report ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [PiipModel, PiipBackbone, PiipForImageClassification])
def test_every_model_class_starts_from_branches(images, save, model_class):
    vit = without_cls_token()
    model = model_class.from_pretrained_branches(build_config(num_branches=2), [None, save(vit.state_dict())])
    first, second = model.base_model.branches
    assert type(model) is model_class
    assert torch.equal(second.layers[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    assert not torch.equal(first.layers[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    # new interactions begin with gates of zero: the branch still computes what its source computes
    with torch.no_grad():
        tokens = model.eval().base_model(images).branch_hidden_states[1]
        assert_close(tokens, timm_tokens(vit, images))


def test_result_saves_and_loads(save, tmp_path):
    model = PiipForImageClassification.from_pretrained_branches(build_config(), [save(build_timm_vit().state_dict())])
    model.save_pretrained(tmp_path / "saved")
    loaded = PiipForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, model)
    assert (tmp_path / "saved" / "branch_weights.py").exists()


def test_report_tells_what_was_used_and_what_is_new(save, caplog):
    vit = build_timm_vit(img_size=56, patch_size=14)
    config = build_config(num_branches=2, layer_scale_init_value=1.0, use_cls_token=True)
    with caplog.at_level(logging.WARNING):
        PiipForImageClassification.from_pretrained_branches(config, [save(vit.state_dict()), None])
    title, first, second, new = caplog.records[-1].getMessage().splitlines()
    assert title == "PiipForImageClassification starts from pretrained branches:"
    num_weights = 4 + 12 * DEPTH
    assert f"branch 0 (image size 32): {num_weights} weights of " in first
    assert "patch size 14 -> 8; left new: layer_scale1.weight, layer_scale2.weight; not used: norm, head" in first
    assert second == "  branch 1 (image size 32): no source, left at its initialization"
    assert new == "  new, to be trained: classifiers, interactions"


# BEiT, Uni-Perceiver and ConvNeXt: the tokens of our branch equal those of the source


def build_branch(branch, source):
    config = PiipConfig(branches=[branch], merge_type="concat", classification_head="merged")
    return PiipModel.from_pretrained_branches(config, [source]).eval()


BEIT_BRANCH = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qkv_bias": "qv",
    "layer_scale_init_value": 0.1,
    "position_embedding_type": "relative",
    "window_size": 4,
}


def test_timm_beit_gives_the_same_tokens(tmp_path):
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "num_classes": 0}
    source = randomize(timm.models.beit.Beit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **options))
    torch.save(source.state_dict(), tmp_path / "beit.pth")
    model = build_branch(PiipBranchConfig(**BEIT_BRANCH), tmp_path / "beit.pth")
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = source.patch_embed(pixel_values)
        # without its class token, which no branch with windows has, and so without the biases towards it
        for block in source.blocks:
            block.attn._get_rel_pos_bias = partial(drop_class_token_bias, block.attn)
            tokens = block(tokens)
        ours = model(pixel_values).branch_hidden_states[0]
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-4)


def drop_class_token_bias(attention):
    index = attention.relative_position_index[1:, 1:]
    size = len(index)
    return attention.relative_position_bias_table[index.flatten()].view(size, size, -1).permute(2, 0, 1).unsqueeze(0)


def test_transformers_beit_loads_its_weights(tmp_path):
    config = BeitConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        use_relative_position_bias=True,
    )
    source = randomize(BeitModel(config))
    source.save_pretrained(tmp_path)
    branch = build_branch(PiipBranchConfig(**BEIT_BRANCH), tmp_path).branches[0]
    saved = load_file(tmp_path / "model.safetensors")
    prefix = "encoder.layer.1."
    table = saved[f"{prefix}attention.attention.relative_position_bias.relative_position_bias_table"]
    torch.testing.assert_close(branch.layers[1].attention.relative_position_bias.table.data, table[:-3])
    torch.testing.assert_close(branch.layers[1].layer_scale2.weight.data, saved[f"{prefix}lambda_2"])
    torch.testing.assert_close(
        branch.layers[1].attention.q_bias.data, saved[f"{prefix}attention.attention.query.bias"]
    )
    torch.testing.assert_close(
        branch.layers[1].attention.v_bias.data, saved[f"{prefix}attention.attention.value.bias"]
    )


def test_relative_position_biases_are_resized_to_the_window(tmp_path):
    options = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "num_classes": 0}
    source = randomize(timm.models.beit.Beit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **options))
    torch.save(source.state_dict(), tmp_path / "beit.pth")
    model = build_branch(PiipBranchConfig(**(BEIT_BRANCH | {"window_size": 6})), tmp_path / "beit.pth")
    table = source.blocks[0].attn.relative_position_bias_table.data[:-3].T.reshape(1, 2, 7, 7)
    expected = torch.nn.functional.interpolate(table, size=(11, 11), mode="bicubic", align_corners=False)
    resized = model.branches[0].layers[0].attention.relative_position_bias.table.data
    torch.testing.assert_close(resized, expected[0].flatten(1).T)


def build_convnext_branch():
    return PiipBranchConfig(
        architecture="convnext",
        image_size=64,
        depths=[1, 1, 2, 1],
        hidden_sizes=[8, 16, 24, 32],
        layer_scale_init_value=1e-6,
        stages=[1, 2, 3, 2],
    )


def test_timm_convnext_gives_the_same_map(tmp_path):
    source = randomize(timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0))
    torch.save(source.state_dict(), tmp_path / "convnext.pth")
    model = build_branch(build_convnext_branch(), tmp_path / "convnext.pth")
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = source.stages(source.stem(pixel_values))
        ours = model(pixel_values).merged_feature_maps[-1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_transformers_convnext_gives_the_same_map(tmp_path):
    config = ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])
    source = randomize(ConvNextModel(config))
    source.save_pretrained(tmp_path)
    model = build_branch(build_convnext_branch(), tmp_path)
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = source(pixel_values).last_hidden_state
        ours = model(pixel_values).merged_feature_maps[-1]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_uni_perceiver_file_gives_the_converted_branch(tmp_path):
    """The same official weights once as a single network and once converted with the whole pyramid."""
    case = CASES["det_tiny_uniperceiver"]
    weights = build_official_weights(case)
    config, model_class = convert_config(get_official_config(case), "detection", weights)
    with torch.device("meta"):
        expected, _ = convert_state_dict(weights, model_class(config))
    single = {name.removeprefix("branch1."): value for name, value in weights.items() if name.startswith("branch1.")}
    torch.save(single, tmp_path / "uni_perceiver.pth")
    branch = build_branch(config.branches[-1], tmp_path / "uni_perceiver.pth").branches[0]
    prefix = f"piip.branches.{len(config.branches) - 1}."
    for name, value in branch.state_dict().items():
        torch.testing.assert_close(value, expected[prefix + name], msg=name)
