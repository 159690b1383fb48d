"""The benchmark script on networks so small that their times say nothing: none is looked at."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from modeling_piip.linear import get_linear_backend

from .common import tiny_cls_config, tiny_config


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def load_script():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_script()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Configurations of a classifier, a backbone, and a network without deformable attention."""
    folder = tmp_path_factory.mktemp("models")
    tiny_cls_config(architectures=["PiipForImageClassification"]).save_pretrained(folder / "classifier")
    tiny_config(architectures=["PiipForInstanceSegmentation"]).save_pretrained(folder / "backbone")
    tiny_config(interaction_attention="cross").save_pretrained(folder / "cross")
    return folder


def run(*arguments: object) -> dict:
    arguments = [str(argument) for argument in arguments]
    return benchmark.main([*arguments, "--device", "cpu", "--rounds", "2"])


def test_inference_is_measured_beside_a_single_branch_and_timm(models, capsys):
    opponents = ["single@16", "timm:vit_tiny_patch16_224@32"]
    options = ["--batch_size", 1, 2, "--dtype", "float32", "bfloat16", "--linear", "default", "onednn"]
    report = run("--variant", models / "classifier", "--against", *opponents, *options)

    # two batch sizes, two types; two kinds of linear layers in ours only
    names = [row["network"] for row in report["networks"]]
    assert {name: names.count(name) for name in names} == {
        "classifier@32": 8,
        "single@16": 8,
        "timm vit_tiny_patch16_224@32": 4,
    }
    first = report["networks"][0]
    assert first["images_per_second"] == pytest.approx(first["batch size"] / first["seconds"]["median"])
    assert len(first["rounds"]) == 2 and min(first["rounds"]) > 0
    # beside two opponents, and in bfloat16 beside the own float32
    assert len(report["comparisons"]) == 8 * 2 + 4
    assert {row["products"] for row in report["products"]} >= {"oneDNN, 1x1 convolution", "oneDNN"}

    text = capsys.readouterr().out
    assert "| ratio of times |" in text
    assert text.count("\n| timm vit_tiny_patch16_224@32 |") == 4
    assert report["machine"]["torch"] == torch.__version__


def test_both_sides_name_their_matrix_library(models):
    options = ["--linear", "onednn", "--against", "timm:vit_tiny_patch16_224@32"]
    ours, other = run("--variant", models / "classifier", *options)["networks"]
    assert ours["matrix library"] == "oneDNN, 1x1 convolution"
    assert other["matrix library"] == benchmark.name_library("cpu", "float32") != ours["matrix library"]
    assert get_linear_backend() == "auto"


def test_training_is_measured_with_and_without_checkpointing(models):
    options = ["--task", "training", "--checkpointing", "no", "yes", "--dtype", "float32", "bfloat16", "--against"]
    report = run("--variant", models / "backbone", *options)
    assert [(row["dtype"], row["checkpointing"]) for row in report["networks"]] == [
        ("float32", "no"),
        ("float32", "yes"),
        ("bfloat16", "no"),
        ("bfloat16", "yes"),
    ]
    with_checkpointing = [pair for pair in report["comparisons"] if pair["measured"]["checkpointing"] == "yes"]
    assert any(pair["beside"]["checkpointing"] == "no" for pair in with_checkpointing)


def test_training_step_changes_the_weights_and_leaves_no_gradients(models):
    config = benchmark.load_config(str(models / "classifier"))
    model = benchmark.get_model_class(config)(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = model.classifiers[0].linear.weight.clone()
    benchmark.run_training(model, torch.randn(1, 3, 32, 32), "default", optimizer, torch.float32)
    assert not torch.equal(model.classifiers[0].linear.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_deformable_attention_is_measured_at_the_shapes_of_the_network(models, capsys):
    report = run("--variant", models / "backbone", "--ops", "--batch_size", 2)
    shapes = {(row["queries"], row["maps"], row["heads"], row["points"]) for row in report["operators"]}
    # 8 x 8 tokens look at 4 x 4 and the other way round; values of half the width
    assert shapes == {(64, "4x4", "2x4", 2), (16, "8x8", "2x8", 2)}
    assert [pair["measured"]["implementation"] for pair in report["comparisons"]] == ["ours"] * 4
    assert [pair["beside"]["implementation"] for pair in report["comparisons"]] == ["Transformers"] * 4
    assert "ms of Transformers" in capsys.readouterr().out


def test_both_implementations_of_deformable_attention_compute_the_same():
    torch.manual_seed(0)
    shapes, logits = [(2, 3), (3, 4)], torch.randn(2, 5, 2, 2, 3)
    inputs = {
        "value": torch.randn(2, 6 + 12, 2, 4),
        "spatial_shapes": shapes,
        "reference_points": torch.rand(1, 5, 2, 2),
        "sampling_offsets": torch.randn(*logits.shape, 2),
        "attention_logits": logits,
    }
    expected = benchmark.attend_transformers(**inputs)
    torch.testing.assert_close(benchmark.attend_around_references(**inputs), expected)


def test_profile_shows_where_the_time_goes(models, capsys):
    report = run("--variant", models / "classifier", "--against", "single@16", "--linear", "default", "--profile")
    ours, single = (row["profile"] for row in report["networks"])
    assert list(ours["seconds"]) == list(benchmark.OPERATOR_KINDS)
    kinds = ("matrix products", "attention", "convolutions", "norms", "GELU", "sampling", "copies", "other")
    assert min(ours["seconds"][kind] for kind in kinds) > 0
    # one branch has nobody to look at, and inference no optimizer
    assert single["seconds"]["sampling"] == ours["seconds"]["optimizer"] == 0
    assert ours["operators"] > 2 * single["operators"]
    assert "| matrix products, ms |" in capsys.readouterr().out


def test_compiled_networks_run_beside_eager_ones(models, monkeypatch):
    # without the compilation, which takes minutes
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    report = run("--variant", models / "classifier", "--mode", "eager", "compiled", "--against", "single@16")
    assert [row["mode"] for row in report["networks"]] == ["eager", "compiled"] * 2
    assert len(compiled) == 2
    for pair in report["comparisons"]:
        assert pair["measured"]["mode"] == pair["beside"]["mode"]


def test_files_hold_all_numbers_the_tables_and_a_picture(models, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- small -->\nMeasured in 1999.\n<!-- end of small -->\n\nAfter.\n")
    files = ["--json", tmp_path / "new" / "all.json", "--markdown", f"{page}#small", "--plot", tmp_path / "bars.png"]
    report = run("--variant", models / "classifier", "--against", "single@16", *files)

    assert json.loads((tmp_path / "new" / "all.json").read_text()) == report
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- small -->\n`python scripts/benchmark.py --variant")
    assert text.endswith("<!-- end of small -->\n\nAfter.\n")
    assert "1999" not in text and "| single@16 |" in text
    with Image.open(tmp_path / "bars.png") as picture:
        assert min(picture.size) > 100
    assert {path.name for path in tmp_path.iterdir()} == {"new", "bars.png", "page.md"}

    run("--variant", models / "backbone", "--ops", "--markdown", tmp_path / "ops.md", "--plot", tmp_path / "ops.png")
    assert "ms of Transformers" in (tmp_path / "ops.md").read_text()


def test_bars_are_named_by_what_tells_them_apart():
    rows = [
        {"network": network, "batch size": size, "dtype": dtype, "mode": "eager"}
        for network in ("ours", "other")
        for size, dtype in ((1, "float32"), (8, "bfloat16"))
    ]
    names = ["batch size 1, float32", "batch size 8, bfloat16"]
    assert benchmark.name_rows(rows, ("batch size", "dtype", "mode", "task")) == 2 * names
    assert benchmark.name_rows(rows, ("network", "linear")) == ["ours", "ours", "other", "other"]
    assert benchmark.name_rows(rows[:1], ("network", "dtype")) == ["ours, float32"]


def test_image_sizes_are_those_that_the_names_ask_for(models):
    report = run("--variant", f"{models / 'backbone'}@48", "--against", f"{models / 'backbone'}@32")
    large, small = report["networks"]
    assert (large["network"], small["network"]) == ("backbone@48", "backbone@32")
    assert large["multiply_adds"] > 2 * small["multiply_adds"]


@pytest.mark.parametrize(
    "variant, opponents",
    [
        ("piip-tsb-368-192-128-in1k", ["single@224", "timm:deit_base_patch16_224"]),
        ("piip-sbl-384-192-128-in1k", ["single@224", "timm:vit_large_patch16_224"]),
        ("piip-tsb-1120-896-448-mask-rcnn-coco", ["vit-b-1024-mask-rcnn-coco"]),
        ("piip-sbl-1568-1120-672-mask-rcnn-coco", ["vit-l-1024-mask-rcnn-coco"]),
    ],
)
def test_opponents_of_published_variants_are_single_networks_of_their_largest_branch(variant, opponents):
    config = benchmark.load_config(variant)
    assert benchmark.choose_opponents(config) == opponents
    networks = [benchmark.find_opponent(name, config) for name in opponents]
    assert all(0.5 < network.multiply_adds / networks[0].multiply_adds < 2 for network in networks)


def test_single_branch_is_the_largest_one_and_leaves_the_configuration_alone(models):
    config = benchmark.load_config(str(models / "backbone"))
    before = config.to_dict()
    single = benchmark.to_single_branch(config)
    assert [branch.hidden_size for branch in single.branches] == [32]
    assert config.to_dict() == before


def test_multiply_adds_of_timm_are_those_of_its_matrices():
    network = benchmark.find_timm("timm:vit_tiny_patch16_224@32")
    # 4 patches and the class token through 12 layers of width 192: projections and MLP, attention; patches; classes
    expected = 12 * (5 * 12 * 192**2 + 2 * 5 * 5 * 192) + 4 * 768 * 192 + 1000 * 192
    assert network.multiply_adds == expected
    assert isinstance(network.build(), timm.models.VisionTransformer)


def test_shapes_of_linear_layers_are_those_that_the_network_runs(models):
    config = benchmark.load_config(str(models / "classifier"))
    expected, model = {}, benchmark.get_model_class(config)(config)

    def add(module, inputs, output):
        rows = inputs[0].flatten(0, -2).shape[0]
        key = (rows, module.in_features, module.out_features)
        expected[key] = expected.get(key, 0) + rows * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add)
    model(torch.randn(2, 3, 32, 32))
    assert benchmark.find_linear_shapes(config, 32, batch_size=2) == expected


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory of processes is measured on Linux")
def test_memory_is_what_a_step_takes_at_its_peak():
    megabytes = 64

    def step():
        for _ in range(2):
            torch.ones(megabytes * 2**18)

    memory = benchmark.measure_memory(step, torch.device("cpu"))
    # once, not twice: the peak
    assert 0.8 * megabytes < memory / 2**20 < 1.5 * megabytes


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--variant", "piip-tsb-368"], "Unknown variant 'piip-tsb-368'"),
        (["--variant", "piip-tsb-368-192-128-in1k@big"], "side of the images in pixels"),
        (["--variant", "BACKBONE", "--against", "timm:no_such_model"], "no model 'no_such_model'"),
        (["--variant", "CROSS", "--ops"], "no deformable attention"),
        (["--variant", "BACKBONE", "--markdown", "PAGE#name"], "must hold <!-- name -->"),
        (["--variant", "BACKBONE@4"], "too small"),
    ],
)
def test_what_cannot_be_measured_ends_with_the_reason(options, reason, models, tmp_path):
    (tmp_path / "page.md").write_text("nothing to replace")
    places = {"BACKBONE": models / "backbone", "CROSS": models / "cross", "PAGE": tmp_path / "page.md"}
    for name, place in places.items():
        options = [option.replace(name, str(place)) for option in options]
    with pytest.raises(SystemExit, match=reason):
        run(*options)


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--batch_size", "0"], ["--dtype", "float8"]])
def test_impossible_options_end_before_anything_is_measured(options, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--variant", "piip-tsb-368-192-128-in1k", *options])
    assert "usage:" in capsys.readouterr().err
