import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_piip import PiipBranchConfig, PiipConfig, PiipForImageClassification
from modeling_piip.training import (
    EMACallback,
    ModelArguments,
    OptimizationArguments,
    build_ema,
    find_last_checkpoint,
    get_checkpoint,
    get_lr_scale,
    get_model_labels,
    get_parameter_groups,
    load_config,
    load_image_processor,
    load_model,
    parse_args,
)
from modeling_piip.training_loop import LoopArguments


def make_config(**kwargs) -> PiipConfig:
    """Three branches with 2, 3 and 6 layers, in one stage each per two layers of the largest."""
    shared = {"patch_size": 8, "hidden_size": 8, "num_attention_heads": 2}
    branches = [
        PiipBranchConfig(image_size=32, num_hidden_layers=2, stages=[1, 0, 1], **shared),
        PiipBranchConfig(image_size=24, num_hidden_layers=3, **shared),
        PiipBranchConfig(image_size=16, num_hidden_layers=6, stages=[2, 2, 2], use_cls_token=True, **shared),
    ]
    options = {"interaction_num_heads": 2, "merge_type": "linear", "num_groups": 2, "num_labels": 3}
    return PiipConfig(branches=branches, **options | kwargs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PiipForImageClassification(make_config())


@pytest.fixture(scope="module")
def saved_model(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    model.config.label2id = {"ant": 0, "bee": 1, "cat": 2}
    model.save_pretrained(folder)
    image_processor = load_image_processor(ModelArguments(config_name=str(folder)), model.config, do_rescale=False)
    image_processor.save_pretrained(folder)
    return str(folder)


# Learning rates


@pytest.mark.parametrize(
    ("name", "exponent"),
    [
        # the largest network: layer k has the id k + 1 of 6 + 1
        ("branches.2.embeddings.patch_embeddings.weight", 7),
        ("branches.2.embeddings.position_embeddings", 7),
        ("branches.2.embeddings.cls_token", 7),
        ("branches.2.layers.0.norm1.weight", 6),
        ("branches.2.layers.5.mlp.fc2.bias", 1),
        # 3 layers: every one counts for two
        ("branches.1.embeddings.patch_embeddings.bias", 7),
        ("branches.1.layers.0.attention.qkv.weight", 5),
        ("branches.1.layers.2.attention.qkv.weight", 1),
        # 2 layers: every one counts for three
        ("branches.0.layers.0.attention.qkv.weight", 4),
        ("branches.0.layers.1.attention.qkv.weight", 1),
    ],
)
@pytest.mark.parametrize("prefix", ["", "piip.", "backbone.piip."])
def test_layers_of_every_branch_decay_from_the_top(name, exponent, prefix):
    assert get_lr_scale(prefix + name, make_config(), layer_decay=0.5) == 0.5**exponent


def test_layer_ids_of_an_uneven_depth_ratio_are_rounded_down():
    config = make_config()
    config.branches = [config.branches[1], PiipBranchConfig(num_hidden_layers=4)]
    scales = [get_lr_scale(f"branches.0.layers.{k}.norm1.weight", config, layer_decay=0.5) for k in range(3)]
    assert scales == [0.5**4, 0.5**3, 0.5]  # ids 1, 2 and 4 of 4 + 1


@pytest.mark.parametrize(
    "name",
    [
        "piip.interactions.0.units.1.fine_to_coarse.attention_gate",
        "piip.merges.0.branches.0.layers.1.weight",
        "piip.merges.0.branches.2.scale",
        "feature_pyramid.levels.p3.weight",
        "classifiers.0.linear.weight",
    ],
)
def test_new_modules_have_a_rate_of_their_own(name):
    config = make_config()
    assert get_lr_scale(name, config, layer_decay=0.5) == 1
    assert get_lr_scale(name, config, layer_decay=0.5, new_module_lr_ratio=10) == 10


def test_every_trainable_parameter_is_in_one_group(model):
    frozen = model.piip.branches[0].embeddings.position_embeddings.requires_grad_(False)
    groups = get_parameter_groups(model, OptimizationArguments(layer_decay=0.9, new_module_lr_ratio=10), 1e-3, 0.1)
    frozen.requires_grad_(True)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()} - {id(frozen)}
    rates = [1e-2, *(1e-3 * 0.9**k for k in (1, 2, 3, 4, 5, 6, 7))]
    assert sorted({group["lr"] for group in groups}, reverse=True) == pytest.approx(rates)


def test_biases_and_vectors_do_not_decay_but_scalar_merge_weights_do(model):
    groups = get_parameter_groups(model, OptimizationArguments(), 1e-3, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays["piip.branches.0.layers.0.norm1.weight"] == 0
    assert decays["piip.branches.0.layers.0.mlp.fc1.bias"] == 0
    assert decays["piip.interactions.0.units.0.coarse_to_fine.attention_gate"] == 0
    assert decays["piip.branches.0.layers.0.mlp.fc1.weight"] == 0.1
    assert decays["piip.branches.0.embeddings.position_embeddings"] == 0.1
    assert decays["piip.merges.0.branches.0.scale"] == 0.1


@pytest.mark.parametrize(
    ("kwargs", "option"),
    [({"layer_decay": 0}, "--layer_decay"), ({"ema_decay": 1}, "--ema_decay"), ({"new_module_lr_ratio": 0}, "--new")],
)
def test_impossible_optimization_is_an_error(kwargs, option):
    with pytest.raises(ValueError, match=option):
        OptimizationArguments(**kwargs)


@pytest.mark.parametrize(
    ("name", "value", "smallest"),
    [
        ("num_train_epochs", 0, 1),
        ("max_train_steps", 0, 1),
        ("per_device_train_batch_size", 0, 1),
        ("per_device_eval_batch_size", -1, 1),
        ("gradient_accumulation_steps", 0, 1),
        ("logging_steps", 0, 1),
        ("checkpointing_steps", 0, 1),
        ("learning_rate", -1e-4, 0),
        ("weight_decay", -0.1, 0),
        ("warmup_steps", -1, 0),
        ("max_grad_norm", -1.0, 0),
        ("dataloader_num_workers", -1, 0),
        ("seed", -1, 0),
    ],
)
def test_impossible_options_of_the_loop_are_errors(name, value, smallest):
    with pytest.raises(ValueError, match=f"--{name} must be at least {smallest}, got {value}"):
        LoopArguments(**{name: value})


# Moving average


def test_average_follows_the_weights_with_a_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = build_ema(model, decay=0.5)
    expected = None
    for step, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected)


def test_callback_shows_the_average_and_trains_the_weights(tmp_path):
    model = torch.nn.Linear(1, 1)
    args = SimpleNamespace(fsdp=None, deepspeed=None, should_save=True, load_best_model_at_end=False, device="cpu")
    args.output_dir = str(tmp_path)
    state = SimpleNamespace(global_step=1, best_model_checkpoint=None)
    control = SimpleNamespace(should_evaluate=False, should_save=False)
    callback = EMACallback(decay=0.9)
    callback.on_train_begin(args, state, control, model=model)
    for value in (1.0, 2.0):
        callback.on_step_begin(args, state, control, model=model)
        model.weight.data.fill_(value)
        control.should_save = value == 2.0
        callback.on_step_end(args, state, control, model=model)
    average = 1.0 * 2 / 11 + 2.0 * 9 / 11
    assert model.weight.item() == pytest.approx(average)
    (tmp_path / "checkpoint-1").mkdir()
    callback.on_save(args, state, control)
    assert torch.load(tmp_path / "checkpoint-1" / callback.training_weights_name)["weight"].item() == 2.0

    resumed = EMACallback(decay=0.9, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    copy = torch.nn.Linear(1, 1)
    copy.load_state_dict(model.state_dict())
    resumed.on_train_begin(args, SimpleNamespace(global_step=2), control, model=copy)
    callback.on_step_begin(args, state, control, model=model)
    assert model.weight.item() == copy.weight.item() == 2.0
    for each_callback, each_model in ((callback, model), (resumed, copy)):
        each_model.weight.data.fill_(4.0)
        each_callback.on_step_end(args, state, control, model=each_model)
    assert model.weight.item() == copy.weight.item() == pytest.approx(0.25 * average + 0.75 * 4.0)


def test_kill_while_the_training_weights_are_written_leaves_no_complete_checkpoint(tmp_path, monkeypatch):
    def save_half(weights, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").touch()
    callback = EMACallback(decay=0.9)
    callback.ema, callback.swapped = build_ema(torch.nn.Linear(1, 1), decay=0.9), True
    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        callback.on_save(
            SimpleNamespace(should_save=True, output_dir=str(tmp_path)), SimpleNamespace(global_step=1), None
        )
    args = SimpleNamespace(resume_from_checkpoint=None, output_dir=str(tmp_path))
    assert get_checkpoint(args, OptimizationArguments(ema_decay=0.9)) is None


def test_callback_names_a_checkpoint_without_training_weights(tmp_path):
    callback = EMACallback(decay=0.9, resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="written without --ema_decay"):
        callback.on_train_begin(SimpleNamespace(fsdp=None, deepspeed=None), None, None, model=torch.nn.Linear(1, 1))


# Models


def test_model_from_scratch_gets_classes_and_drop_path_rates(saved_model):
    args = ModelArguments(config_name=saved_model, drop_path_rate=[0.1, 0.2, 0.3], interaction_drop_path_rate=0.4)
    config = load_config(args)
    model = load_model(PiipForImageClassification, args, config, ["x", "y"], training=True)
    assert get_model_labels(args, config) is None
    assert model.config.id2label == {0: "x", 1: "y"} and model.config.label2id == {"x": 0, "y": 1}
    assert [branch.drop_path_rate for branch in model.config.branches] == [0.1, 0.2, 0.3]
    assert model.piip.branches[2].layers[0].drop_path.rate == 0.3
    assert model.config.interaction_drop_path_rate == 0.4


def test_other_number_of_classes_makes_a_new_classifier_only(saved_model, model):
    args = ModelArguments(model_name_or_path=saved_model)
    new = load_model(PiipForImageClassification, args, load_config(args), ["x", "y", "z", "w"], training=True)
    assert new.classifiers[0].linear.weight.shape[0] == 4
    for name, parameter in new.piip.named_parameters():
        assert torch.equal(parameter, model.piip.get_parameter(name)), name


def test_same_number_of_classes_keeps_the_classifier(saved_model, model, caplog):
    logging.getLogger("modeling_piip").propagate = True
    args = ModelArguments(model_name_or_path=saved_model)
    new = load_model(PiipForImageClassification, args, load_config(args), ["x", "y", "z"], training=True)
    assert torch.equal(new.classifiers[0].linear.weight, model.classifiers[0].linear.weight)
    assert new.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert "other names than those of the model (ant, bee, cat, ...)" in caplog.text


def test_evaluation_with_another_number_of_classes_is_an_error(saved_model):
    args = ModelArguments(model_name_or_path=saved_model)
    with pytest.raises(ValueError, match="The model has 3 classes, the data 2"):
        load_model(PiipForImageClassification, args, load_config(args), ["x", "y"], training=False)


def test_processor_comes_from_the_folder_or_from_the_image_size(saved_model, tmp_path):
    assert load_image_processor(ModelArguments(model_name_or_path=saved_model), make_config()).do_rescale is False
    make_config().save_pretrained(tmp_path)
    for config_name in (tmp_path, tmp_path / "config.json"):
        args = ModelArguments(config_name=str(config_name))
        image_processor = load_image_processor(args, load_config(args))
        assert dict(image_processor.crop_size) == {"height": 32, "width": 32}
        assert image_processor.size["shortest_edge"] == 32


@pytest.mark.parametrize("kwargs", [{}, {"model_name_or_path": "a", "config_name": "b"}])
def test_one_source_of_the_model_is_required(kwargs):
    with pytest.raises(ValueError, match="either --model_name_or_path .* or --config_name"):
        ModelArguments(**kwargs)


def test_wrong_number_of_drop_path_rates_is_an_error(saved_model):
    with pytest.raises(ValueError, match=r"or 3 of them \(one per branch\), got \[0.1, 0.2\]"):
        load_config(ModelArguments(config_name=saved_model, drop_path_rate=[0.1, 0.2]))


def test_model_of_another_type_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="model of type 'vit', not of a PIIP model"):
        load_config(ModelArguments(config_name=str(tmp_path)))


# Command line and checkpoints


@dataclass
class Options:
    rate: float = field(default=1.0, metadata={"help": "A number."})
    sizes: list[int] = field(default_factory=list, metadata={"help": "Several numbers."})
    fast: bool = field(default=False, metadata={"help": "A switch."})
    name: str | None = field(default=None, metadata={"help": "A word."})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("options.json", '{"rate": 1e-4, "sizes": [1, 2], "fast": true, "name": null}'),
        ("options.yaml", "rate: 1e-4\nsizes: [1, 2]\nfast: true\nname:\n"),
    ],
)
def test_options_come_from_a_file_and_the_command_line_wins(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert parse_args((Options,), [str(tmp_path / file)]) == (Options(1e-4, [1, 2], True, None),)
    (options,) = parse_args((Options,), [str(tmp_path / file), "--rate", "0.5", "--name", "x"])
    assert options == Options(0.5, [1, 2], True, "x")


def test_unknown_option_in_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("speed: 3\n")
    with pytest.raises((SystemExit, ValueError), match="2|--speed"):
        parse_args((Options,), [str(tmp_path / "options.yaml")])


def test_last_complete_checkpoint_is_found(tmp_path):
    assert find_last_checkpoint(str(tmp_path / "nowhere")) is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-10" / "done").touch()
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert find_last_checkpoint(str(tmp_path), lambda folder: (folder / "done").exists()) == str(
        tmp_path / "checkpoint-10"
    )
