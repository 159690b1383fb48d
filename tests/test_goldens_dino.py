"""Our DINO against the official one: on given feature maps and end to end, forward, losses and gradients."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from modeling_piip import PiipConfig, PiipForObjectDetection, PiipImageProcessor, PiipModelOutput
from modeling_piip.conversion import (
    convert_config,
    convert_dino,
    rename_key,
    split_attention_projections,
)
from modeling_piip.modeling_piip_object_detection import PiipDinoDenoising, PiipDinoNoise, match_objects
from scripts.convert_official_checkpoint import main

from .common import tiny_branch
from .fixtures.inputs_rule import feature_map, image
from .goldens import FIXTURES, TOLERANCE, read_manifest
from .head_goldens import assert_matches_head, build_weight, read_case, read_tensors


HEAD_CASES = ["dino_q30_b1", "dino_q30_padded_b2", "dino_6layers_c80_b2"]
# Names of the parameters outside the backbone; the cases have fewer layers, queries and classes
MANIFEST = read_manifest(
    FIXTURES / "head_manifests" / "dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms.json.gz"
)
# Gradient norms move in the fourth digit with the order of sums
GRADIENT_TOLERANCE = 1e-3


class GivenMaps(nn.Module):
    """Instead of the network below the head: the same maps for every image."""

    def __init__(self, feature_maps: list[torch.Tensor]):
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: torch.Tensor) -> PiipModelOutput:
        return PiipModelOutput(merged_feature_maps=tuple(self.feature_maps))


def get_head_names(config: PiipConfig) -> list[str]:
    """Official names of the parameters outside the backbone."""
    limits = {
        "encoder.layers": config.dino.encoder_layers,
        "decoder.layers": config.dino.decoder_layers,
        "cls_branches": config.dino.decoder_layers + 1,
        "reg_branches": config.dino.decoder_layers + 1,
    }

    def exists(name: str) -> bool:
        match = re.search(rf"({'|'.join(limits)})\.(\d+)\.", name)
        return match is None or int(match[2]) < limits[match[1]]

    return [name for name in MANIFEST["state_dict"] if exists(name)]


def get_parameters(official_name: str, model: PiipForObjectDetection) -> list[nn.Parameter]:
    """Our parameters that together are the official one."""
    pieces = split_attention_projections({official_name: torch.zeros(3)})
    return [model.get_parameter(rename_key(piece, model.config)) for piece in pieces]


@functools.cache
def build_cached_weight(official_name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return build_weight(official_name, shape)


def build_head_weights(model: PiipForObjectDetection) -> dict[str, torch.Tensor]:
    """Weights of the head under the official names."""
    weights = {}
    for name in get_head_names(model.config):
        shapes = [parameter.shape for parameter in get_parameters(name, model)]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        weights[name] = build_cached_weight(name, shape).clone()
    return weights


def build_given_maps(name: str) -> list[torch.Tensor]:
    case = read_case(name)["case"]
    maps = []
    for level, (size, stride, block) in enumerate(zip(case["in_channels"], case["strides"], case["block"])):
        shape = (len(case["metas"]), size, *(side // stride for side in case["pad"]))
        maps.append(torch.from_numpy(feature_map(case["seed"] + level, shape, block, case["coarse"], case["fine"])))
    return maps


def build_head(name: str) -> PiipForObjectDetection:
    """The head of a case with its official weights on given maps."""
    case = read_case(name)
    config = PiipConfig(
        branches=[tiny_branch(hidden_size=case["in_channels"][0])],
        out_features=["p3", "p4", "p5"],
        **convert_dino(case["model"]),
    )
    with torch.device("meta"):
        model = PiipForObjectDetection(config)
    weights = {}
    for official_name, weight in split_attention_projections(build_head_weights(model)).items():
        weights[rename_key(official_name, config)] = weight
    model.piip, model.feature_pyramid = GivenMaps(build_given_maps(name)), nn.Identity()
    model.load_state_dict(weights, assign=True)
    return model.eval()


def build_inputs(name: str) -> dict[str, torch.Tensor]:
    case = read_case(name)
    height, width = case["case"]["pad"]
    pixel_mask = torch.zeros(len(case["metas"]), height, width, dtype=torch.long)
    for mask, meta in zip(pixel_mask, case["metas"]):
        mask[: meta["img_shape"][0], : meta["img_shape"][1]] = 1
    return {"pixel_values": torch.zeros(len(case["metas"]), 3, height, width), "pixel_mask": pixel_mask}


def build_labels(name: str) -> list[dict[str, torch.Tensor]]:
    """Official boxes are absolute corners in the padded image."""
    case, targets = read_case(name), read_tensors(name, "targets")
    labels = []
    for k, meta in enumerate(case["metas"]):
        height, width, _ = meta["img_shape"]
        corners = targets[f"gt_boxes_img{k}"] / torch.tensor([width, height, width, height])
        boxes = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
        labels.append({"class_labels": targets[f"gt_labels_img{k}"], "boxes": boxes})
    return labels


def build_noise(name: str) -> PiipDinoNoise:
    stored = read_tensors(name, "dn_queries")
    scores = stored["rand_label_p"]
    # the official code draws a new class only for the rows that get one
    class_labels = torch.zeros_like(scores, dtype=torch.long)
    class_labels[scores < 0.25] = stored["rand_new_label"]
    return PiipDinoNoise(scores, class_labels, 2 * stored["rand_sign_01"] - 1, stored["rand_part"])


def capture_outputs(module: nn.Module) -> list:
    """Filled with what the module returns whenever it runs."""
    captured = []
    module.register_forward_hook(lambda module, inputs, outputs: captured.append(outputs))
    return captured


@pytest.mark.parametrize("name", HEAD_CASES)
def test_neck_and_encoder_equal_the_official_ones(name):
    model = build_head(name)
    levels = capture_outputs(model.neck)
    positions = capture_outputs(model.encoder.positions)
    layers = [capture_outputs(layer) for layer in model.encoder.layers]
    with torch.no_grad():
        outputs = model(**build_inputs(name))
    for k, level in enumerate(levels[0]):
        assert_matches_head(level, name, "neck", f"level{k}")
    assert_matches_head(positions[0], name, "encoder", "pos_plus_level_embed")
    for k, layer in enumerate(layers[:-1]):
        assert_matches_head(layer[0], name, "encoder", f"layer{k}")
    assert_matches_head(outputs.encoder_last_hidden_state, name, "encoder", "memory")


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", HEAD_CASES)
def test_selected_proposals_equal_the_official_ones(name):
    model, stored = build_head(name), read_tensors(name, "two_stage")
    states = capture_outputs(model.query_selection.norm)
    logits = capture_outputs(model.query_selection.head.classifier)
    with torch.no_grad():
        outputs = model(**build_inputs(name))
    assert_matches_head(states[0], name, "two_stage", "output_memory")
    assert_matches_head(logits[0].amax(dim=-1), name, "two_stage", "enc_max_logit")

    # as sets: of two cells with equal scores either may come first
    cells, order = logits[0].amax(dim=-1).topk(model.config.dino.num_queries).indices.sort(dim=1)
    official_cells, official_order = stored["topk_indices"].sort(dim=1)
    assert torch.equal(cells, official_cells)
    for k, (ours, official) in enumerate(zip(order, official_order)):
        error = relative_error(outputs.encoder_pred_boxes[k][ours], stored["topk_boxes_sigmoid"][k][official])
        assert error < TOLERANCE
        if "topk_logits" in stored:
            assert relative_error(outputs.encoder_logits[k][ours], stored["topk_logits"][k][official]) < TOLERANCE


@pytest.mark.parametrize("name", HEAD_CASES)
def test_every_decoder_layer_equals_the_official_one(name):
    model = build_head(name)
    with torch.no_grad():
        outputs = model(**build_inputs(name))
    layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    assert_matches_head(torch.stack([layer["logits"] for layer in layers]), name, "decoder", "class_logits")
    assert_matches_head(torch.stack([layer["pred_boxes"] for layer in layers]), name, "decoder", "boxes_cxcywh")


def assert_same_detections(detections: dict, boxes: torch.Tensor, labels: torch.Tensor):
    """As sets: of two with nearly the same score either may come first. `boxes` hold (x1, y1, x2, y2, score)."""
    assert len(detections["scores"]) == len(boxes)
    assert relative_error(detections["scores"], boxes[:, 4]) < TOLERANCE
    ours = torch.cat((detections["boxes"], detections["scores"][:, None]), dim=1)
    is_same = (ours[:, None] - boxes).abs().amax(dim=2) < TOLERANCE * boxes[:, :4].max()
    is_same &= detections["labels"][:, None] == labels
    assert is_same.any(dim=0).all() and is_same.any(dim=1).all()


@pytest.mark.parametrize("name", HEAD_CASES)
def test_detections_equal_the_official_ones(name):
    model, case, stored = build_head(name), read_case(name), read_tensors(name, "detections")
    with torch.no_grad():
        outputs = model(**build_inputs(name))
    for kind, shape in (("net", "img_shape"), ("rescaled", "ori_shape")):
        sizes = [meta[shape][:2] for meta in case["metas"]]
        detections = PiipImageProcessor().post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes, top_k=case["case"]["max_per_img"]
        )
        for k, image_detections in enumerate(detections):
            boxes, labels = stored[f"{kind}_boxes_img{k}"], stored[f"{kind}_labels_img{k}"]
            assert_same_detections(image_detections, boxes, labels)


def rename_loss(name: str) -> str:
    """d0.dn_loss_cls -> loss_class_denoising_0"""
    layer, part, kind = re.fullmatch(r"(?:d(\d)\.)?(interm_|dn_)?loss_(cls|bbox|iou)", name).groups()
    term = {"cls": "loss_class", "bbox": "loss_bbox", "iou": "loss_giou"}[kind]
    suffix = {"interm_": "_encoder", "dn_": "_denoising", None: ""}[part]
    return term + suffix + (f"_{layer}" if layer else "")


def assert_same_losses(outputs, name: str, step: str):
    expected = {rename_loss(key): value.item() for key, value in read_tensors(name, step).items() if "loss" in key}
    losses = {key: value.item() for key, value in outputs.loss_dict.items()}
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert outputs.loss.item() == pytest.approx(sum(expected.values()), rel=TOLERANCE)


@pytest.mark.parametrize("name", HEAD_CASES)
def test_losses_without_denoising_equal_the_official_ones(name, monkeypatch):
    all_matches = []

    def match(*args):
        all_matches.append(match_objects(*args))
        return all_matches[-1]

    monkeypatch.setattr("modeling_piip.modeling_piip_object_detection.match_objects", match)
    model, labels = build_head(name), build_labels(name)
    with torch.no_grad():
        outputs = model(**build_inputs(name), labels=labels)
    assert_same_losses(outputs, name, "loss_no_dn")

    stored, counts = read_tensors(name, "loss_no_dn"), [len(label["class_labels"]) for label in labels]
    layers = ["interm", *(f"layer{k}" for k in range(model.config.dino.decoder_layers))]
    for layer, matches in zip(layers, all_matches, strict=True):
        for k in range(len(labels)):
            queries, objects = matches.queries[matches.images == k], matches.objects[matches.images == k]
            expected = torch.zeros(outputs.logits.shape[1], dtype=torch.long)
            expected[queries] = objects - sum(counts[:k]) + 1
            if layer != "interm":
                assert torch.equal(expected, stored[f"match_{layer}_img{k}"]), (layer, k)
            else:
                # proposals with equal scores may have changed places
                assert (expected > 0).sum() == (stored[f"match_{layer}_img{k}"] > 0).sum()


def build_training_head(name: str, monkeypatch) -> PiipForObjectDetection:
    monkeypatch.setattr(PiipDinoDenoising, "draw_noise", lambda self, objects: build_noise(name))
    return build_head(name).train()


@pytest.mark.parametrize("name", HEAD_CASES)
def test_denoising_queries_equal_the_official_ones(name, monkeypatch):
    model, stored = build_training_head(name, monkeypatch), read_tensors(name, "dn_queries")
    queries, predictions = capture_outputs(model.denoising), capture_outputs(model.decoder)
    with torch.no_grad():
        outputs = model(**build_inputs(name), labels=build_labels(name))
    queries = queries[0]
    num_queries = model.config.dino.num_queries
    assert queries.contents.shape[1] == stored["pad_size"].item()
    assert queries.groups.max() + 1 == stored["num_groups"].item()
    assert_matches_head(queries.contents, name, "dn_queries", "label_query")
    boxes = (queries.boxes / (1 - queries.boxes)).log()
    assert_matches_head(boxes, name, "dn_queries", "bbox_query_unsigmoided")
    is_hidden = queries.build_attention_mask(num_queries)[0, 0] < 0
    assert torch.equal(is_hidden, stored["attn_mask"].bool())
    all_logits, all_boxes, _ = predictions[0]
    assert_matches_head(torch.stack(all_logits), name, "dn_forward", "class_logits")
    assert_matches_head(torch.stack(all_boxes), name, "dn_forward", "boxes_cxcywh")
    assert outputs.logits.shape[1] == num_queries


@pytest.mark.parametrize("name", HEAD_CASES)
def test_losses_with_denoising_equal_the_official_ones(name, monkeypatch):
    model = build_training_head(name, monkeypatch)
    with torch.no_grad():
        outputs = model(**build_inputs(name), labels=build_labels(name))
    assert_same_losses(outputs, name, "loss_dn")


@pytest.mark.parametrize("name", ["dino_q30_b1", "dino_q30_padded_b2"])
def test_gradients_equal_the_official_ones(name, monkeypatch):
    model = build_training_head(name, monkeypatch)
    for given_map in model.piip.feature_maps:
        given_map.requires_grad_()
    model(**build_inputs(name), labels=build_labels(name)).loss.backward()
    stored, step = read_tensors(f"{name}_grads", "grads"), read_case(f"{name}_grads")["steps"]["grads"]
    for official_name, expected in zip(step["notes"]["parameter_names"], stored["param_grad_l2"], strict=True):
        gradients = [parameter.grad for parameter in get_parameters(official_name, model)]
        norm = torch.cat([gradient.flatten().double() for gradient in gradients]).norm().item()
        assert norm == pytest.approx(expected.item(), rel=GRADIENT_TOLERANCE, abs=1e-6), official_name
    for level, given_map in enumerate(model.piip.feature_maps):
        output = given_map.grad.flatten()[stored[f"input_grad_level{level}#idx"].long()]
        entry = step["tensors"][f"input_grad_level{level}"]
        largest = entry["absmax"]
        error = (output - stored[f"input_grad_level{level}#val"]).abs().max().item() / largest
        # so much does the official gradient move when the maps change by a millionth
        tolerance = max(TOLERANCE, entry["perturb_max_abs_diff"] / largest)
        assert error < tolerance, f"level {level}: {error:.1e} of the largest value"


def convert_end_to_end(case: dict, folder: Path):
    """Writes the official files of a case and converts them as users do."""
    official = case["model"] | {"backbone": case["backbone"]}
    config, _ = convert_config(official)
    with torch.device("meta"):
        model = PiipForObjectDetection(config)
    weights = {name: build_weight(name, shape) for name, shape in case["state_dict"].items()}
    torch.save({"state_dict": weights | build_head_weights(model)}, folder / "official.pth")
    (folder / "official.json").write_text(json.dumps(official))
    files = ["--official_config", str(folder / "official.json"), "--checkpoint", str(folder / "official.pth")]
    main([*files, "--output_dir", str(folder / "converted")])


def test_converted_detector_equals_the_official_one_end_to_end(tmp_path):
    name = "e2e_dino_tiny"
    case = read_case(name)
    convert_end_to_end(case, tmp_path)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "converted").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (200, 333)

    inputs = build_inputs(name)
    pixel_values = torch.from_numpy(image(case["case"]["seed"], inputs["pixel_values"].shape))
    inputs["pixel_values"] = pixel_values * inputs["pixel_mask"].unsqueeze(1)
    maps = capture_outputs(model.feature_pyramid)
    with torch.no_grad():
        outputs = model(**inputs)
    for k, output in enumerate(maps[0]):
        assert_matches_head(output, name, "backbone", f"out{k}")
    layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    assert_matches_head(torch.stack([layer["logits"] for layer in layers]), name, "head", "class_logits")
    assert_matches_head(torch.stack([layer["pred_boxes"] for layer in layers]), name, "head", "boxes_cxcywh")
    assert_matches_head(outputs.encoder_logits, name, "head", "topk_logits")
    assert_matches_head(outputs.encoder_pred_boxes, name, "head", "topk_boxes_sigmoid")

    sizes = [meta["ori_shape"][:2] for meta in case["metas"]]
    detections = processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes, top_k=case["case"]["max_per_img"]
    )
    stored = read_tensors(name, "detections")
    for k, image_detections in enumerate(detections):
        assert_same_detections(image_detections, stored[f"boxes_img{k}"], stored[f"labels_img{k}"])
