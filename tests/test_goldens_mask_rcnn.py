"""Our Mask R-CNN against the official one: every step on given feature maps, and end to end."""

import math

import pytest
import torch

from modeling_piip import (
    PiipConfig,
    PiipForInstanceSegmentation,
    PiipInstanceSegmentationImageProcessor,
)
from modeling_piip.conversion import convert_config, convert_mask_rcnn, convert_state_dict, rename_key
from modeling_piip.image_processing_piip_instance_segmentation import decode_rle, paste_mask
from modeling_piip.modeling_piip_instance_segmentation import (
    BACKGROUND,
    IGNORED,
    Objects,
    PiipInstanceSegmentationOutput,
    crop_masks,
    decode_boxes,
    encode_boxes,
    match_boxes,
    pool_regions,
)

from .common import tiny_branch
from .fixtures.inputs_rule import feature_map, image
from .goldens import FIXTURES, read_manifest
from .head_goldens import assert_matches_head, build_weight, read_case, read_tensors


CASES = ["maskrcnn_c5_384ch_b1", "maskrcnn_c80_b2"]
GRADIENTS, GRADIENT_CASE = "maskrcnn_c5_384ch_b1_grads", "maskrcnn_c5_384ch_b1"
END_TO_END = "e2e_maskrcnn_tiny"
HEAD_NAMES = read_manifest(FIXTURES / "head_manifests" / "mask_rcnn_deit_vit_b_fpn_1x_coco_bs16.json.gz")["state_dict"]
every_case = pytest.mark.parametrize("name", CASES)

# The official numbers move by as much when their input moves in the seventh digit
BOX_TOLERANCE = 3e-3  # pixels
SCORE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


class Case:
    """Model with official weights, inputs and stored tensors of a case with given maps."""

    def __init__(self, name: str):
        self.name = name
        self.metas = read_case(name)["metas"]
        self.model = build_model(name)
        self.maps = build_given_maps(name)
        self.image_sizes = get_image_sizes(self.metas)
        self.strides = self.model.config.level_strides

    def read(self, step: str, tensor: str) -> list[torch.Tensor]:
        """A tensor of every image."""
        stored = read_tensors(self.name, step)
        return [stored[tensor.format(f"img{index}")] for index in range(len(self.metas))]

    def compute_levels(self) -> tuple[torch.Tensor, ...]:
        return self.model.neck(tuple(self.maps))

    def build_objects(self) -> list[Objects]:
        height, width, _ = self.metas[0]["pad_shape"]
        return [
            Objects(boxes, labels, draw_ellipses(boxes, height, width))
            for boxes, labels in zip(
                self.read("loss_targets", "gt_boxes_{}"), self.read("loss_targets", "gt_labels_{}"), strict=True
            )
        ]


def build_model(name: str) -> PiipForInstanceSegmentation:
    case = read_case(name)
    branches = [tiny_branch(hidden_size=case["in_channels"][0], patch_size=16)]
    model = PiipForInstanceSegmentation(PiipConfig(branches=branches, **convert_mask_rcnn(case["model"])))
    weights = model.state_dict()
    for official_name in HEAD_NAMES:
        weight = weights[rename_key(official_name, model.config)]
        weight.copy_(build_weight(official_name, weight.shape))
    return model.eval()


def build_given_maps(name: str) -> list[torch.Tensor]:
    case, maps = read_case(name)["case"], []
    for level, (stride, block) in enumerate(zip(case["strides"], case["block"], strict=True)):
        channels = read_case(name)["in_channels"][level]
        shape = (len(case["metas"]), channels, case["pad"][0] // stride, case["pad"][1] // stride)
        maps.append(torch.from_numpy(feature_map(case["seed"] + level, shape, block, case["coarse"], case["fine"])))
    return maps


def get_image_sizes(metas: list[dict]) -> torch.Tensor:
    sides = [meta["img_shape"][:2] for meta in metas]
    return torch.tensor([[width, height, width, height] for height, width in sides]).float()


def draw_ellipses(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The rule of the stored targets: a mask fills the ellipse in its box."""
    left, top, right, bottom = boxes.double()[:, :, None, None].unbind(1)
    x = (torch.arange(width)[None, None] + 0.5 - (left + right) / 2) / ((right - left) / 2)
    y = (torch.arange(height)[None, :, None] + 0.5 - (top + bottom) / 2) / ((bottom - top) / 2)
    return x**2 + y**2 <= 1


@pytest.fixture
def case(name):
    return Case(name)


def read_detections(outputs: PiipInstanceSegmentationOutput, sizes: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x1, y1, x2, y2, score) and classes of the detections of every image, in pixels of images of `sizes`."""
    detections = PiipInstanceSegmentationImageProcessor().post_process_object_detection(outputs, 0, sizes)
    return [(torch.cat((d["boxes"], d["scores"][:, None]), dim=1), d["labels"]) for d in detections]


def assert_same_detections(found: torch.Tensor, class_ids: torch.Tensor, expected: torch.Tensor, labels: torch.Tensor):
    """Neighbours with nearly the same score may swap places."""
    assert found.shape == expected.shape
    assert (found[:, 4] - expected[:, 4]).abs().max() < SCORE_TOLERANCE
    distances = (found[:, None, :4] - expected[None, :, :4]).abs().amax(dim=-1)
    is_same = (distances < BOX_TOLERANCE) & (class_ids[:, None] == labels[None])
    is_same &= (found[:, None, 4] - expected[None, :, 4]).abs() < SCORE_TOLERANCE
    assert is_same.any(dim=0).all() and is_same.any(dim=1).all()


def assert_same_boxes(found: torch.Tensor, expected: torch.Tensor):
    """As sets: rows with equal scores have no order."""
    assert found.shape == expected.shape
    distances = torch.cdist(found, expected, p=math.inf, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.amin(dim=0).max() < BOX_TOLERANCE
    assert distances.amin(dim=1).max() < BOX_TOLERANCE


@every_case
@torch.no_grad()
def test_neck_and_region_proposal_network(name, case):
    levels = case.compute_levels()
    logits, deltas, anchors = case.model.rpn_head(levels)
    stored = read_tensors(name, "anchors")
    for k, level in enumerate(levels):
        assert_matches_head(level, name, "fpn", f"P{k + 2}")
        height, width = level.shape[2:]
        as_maps = [part.reshape(len(level), height, width, -1).permute(0, 3, 1, 2) for part in (logits[k], deltas[k])]
        assert_matches_head(as_maps[0], name, "rpn", f"cls_{k}")
        assert_matches_head(as_maps[1], name, "rpn", f"bbox_{k}")
        assert len(anchors[k]) == stored["count"][k]
        torch.testing.assert_close(anchors[k][:20], stored[f"first20_{k}"], rtol=0, atol=1e-4)
        torch.testing.assert_close(anchors[k][-20:], stored[f"last20_{k}"], rtol=0, atol=1e-4)


@every_case
@pytest.mark.parametrize("mode", ["train", "test"])
@torch.no_grad()
def test_proposals(name, case, mode):
    rpn_head = case.model.rpn_head.train(mode == "train")
    proposals = rpn_head.get_proposals(*rpn_head(case.compute_levels()), case.image_sizes)
    for found, expected in zip(proposals, case.read("proposals", f"{mode}_{{}}"), strict=True):
        assert_same_boxes(found, expected[:, :4])


def split_by_image(regions: torch.Tensor) -> list[torch.Tensor]:
    """(image index, box) -> boxes of every image"""
    return [regions[regions[:, 0] == index, 1:] for index in range(int(regions[:, 0].max()) + 1)]


@every_case
@torch.no_grad()
def test_pooled_features_and_box_head(name, case):
    levels = case.compute_levels()[:4]
    regions = read_tensors(name, "roi")["rois"]
    assert torch.equal(regions[:, 0], regions[:, 0].sort().values)
    boxes = split_by_image(regions)
    for size in (7, 14):
        assert_matches_head(pool_regions(levels, case.strides, boxes, size), name, "roi", f"feat{size}")

    box_head = case.model.roi_head.box_head
    logits, deltas = box_head(levels, boxes)
    stds = torch.tensor(box_head.options.box_coder_stds)
    assert_matches_head(logits, name, "bbox_head", "cls_score")
    assert_matches_head((deltas / stds).flatten(1), name, "bbox_head", "bbox_pred")
    logits, deltas = logits[: len(boxes[0])], deltas[: len(boxes[0])]
    decoded = decode_boxes(boxes[0][:, None], deltas, case.image_sizes[0]).flatten(1)
    assert_matches_head(decoded, name, "bbox_head", "decoded_img0")
    assert_matches_head(logits.softmax(dim=1), name, "bbox_head", "scores_img0")


@every_case
@pytest.mark.parametrize("source", ["rpn", "given"])
@torch.no_grad()
def test_detections(name, case, source):
    levels = case.compute_levels()
    if source == "given":
        proposals = case.read("detections", "given_proposals_{}")
    else:
        proposals = case.model.rpn_head.get_proposals(*case.model.rpn_head(levels), case.image_sizes)
    outputs = case.model.roi_head.predict(levels[:4], proposals, case.image_sizes)
    outputs = PiipInstanceSegmentationOutput(**outputs)
    for space, shape in (("net", "img_shape"), ("rescaled", "ori_shape")):
        found = read_detections(outputs, [meta[shape][:2] for meta in case.metas])
        boxes = case.read("detections", f"{source}_{space}_{{}}_boxes")
        labels = case.read("detections", f"{source}_{space}_{{}}_labels")
        for index in range(len(case.metas)):
            assert_same_detections(*found[index], boxes[index], labels[index])


def read_pasted_masks(name: str, index: int, size: list[int]) -> torch.Tensor:
    stored = read_tensors(name, "masks")
    offsets = stored[f"pasted_rle_offsets_img{index}"].tolist()
    counts = stored[f"pasted_rle_counts_img{index}"].tolist()
    rles = [{"size": size, "counts": counts[start:end]} for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack([torch.from_numpy(decode_rle(rle, *size, "golden").copy()) for rle in rles])


def paste_on_image(mask: torch.Tensor, box: torch.Tensor, height: int, width: int) -> torch.Tensor:
    image = torch.zeros(height, width)
    place, values = paste_mask(mask, box, height, width)
    image[place] = values
    return image


def assert_same_masks(found: torch.Tensor, expected: torch.Tensor):
    assert found.shape == expected.shape
    overlaps, unions = (found & expected).sum(dim=(1, 2)), (found | expected).sum(dim=(1, 2))
    assert (overlaps >= 0.999 * unions).all(), (overlaps / unions).tolist()


@every_case
@torch.no_grad()
def test_masks(name, case):
    boxes, labels = case.read("masks", "boxes_{}"), case.read("masks", "labels_{}")
    factors = [torch.tensor(meta["scale_factor"]) for meta in case.metas]
    input_boxes = [rows[:, :4] * factor for rows, factor in zip(boxes, factors, strict=True)]
    logits = case.model.roi_head.mask_head(case.compute_levels()[:4], input_boxes, torch.cat(labels))
    assert_matches_head(logits, name, "masks", "logits_selected")
    probabilities = logits.sigmoid().split([len(rows) for rows in boxes])
    for index, meta in enumerate(case.metas):
        size = meta["ori_shape"][:2]
        instances = zip(probabilities[index], boxes[index][:, :4], strict=True)
        pasted = torch.stack([paste_on_image(mask, box, *size) >= 0.5 for mask, box in instances])
        assert_same_masks(pasted, read_pasted_masks(name, index, size))


@every_case
def test_pasted_probabilities(name):
    stored = read_tensors(name, "paste")
    size = read_case(name)["steps"]["paste"]["notes"]["image_hw"]
    instances = zip(stored["masks28"].squeeze(1), stored["boxes"], strict=True)
    soft = torch.stack([paste_on_image(mask, box, *size) for mask, box in instances])
    assert_matches_head(soft, name, "paste", "soft")
    assert torch.equal((soft >= 0.5).sum(dim=(1, 2)), stored["area_ge_0.5"])


@every_case
@torch.no_grad()
def test_matches_of_anchors(name, case):
    anchors = torch.cat(case.model.rpn_head(case.compute_levels())[2])
    stored = read_tensors(name, "rpn_loss")
    for index, objects in enumerate(case.build_objects()):
        matches = match_boxes(anchors, objects.boxes, 0.7, 0.3)
        counts = [(matches >= 0).sum(), (matches == BACKGROUND).sum(), (matches == IGNORED).sum()]
        assert stored[f"assigned_counts_pos_neg_ignored_img{index}"].tolist() == [count.item() for count in counts]
        positives = (matches >= 0).nonzero().squeeze(1)
        assert torch.equal(positives, stored[f"assigned_positive_anchor_img{index}"])
        assert torch.equal(matches[positives], stored[f"assigned_gt_img{index}"])


def compute_rpn_losses(case: Case, levels: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    # with the same seed torch draws the official sample
    torch.manual_seed(read_case(case.name)["steps"]["rpn_loss"]["notes"]["torch_seed"])
    return case.model.rpn_head.compute_loss(*case.model.rpn_head(levels), case.build_objects())


def compute_region_losses(case: Case, levels: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(read_case(case.name)["steps"]["roi_loss"]["notes"]["torch_seed"])
    proposals = case.read("loss_targets", "train_proposals_{}")
    return case.model.roi_head.compute_loss(levels[:4], proposals, case.build_objects())


@every_case
@torch.no_grad()
def test_losses(name, case):
    levels = case.compute_levels()
    losses = compute_rpn_losses(case, levels)
    stored = read_tensors(name, "rpn_loss")
    assert losses["loss_objectness"].item() == pytest.approx(stored["loss_cls_per_level"].sum().item(), rel=2e-5)
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(stored["loss_bbox_per_level"].sum().item(), rel=2e-5)
    losses = compute_region_losses(case, levels)
    stored = read_tensors(name, "roi_loss")
    for ours, official in (
        ("loss_classifier", "loss_cls"),
        ("loss_box_reg", "loss_bbox"),
        ("loss_mask", "loss_mask"),
    ):
        assert losses[ours].item() == pytest.approx(stored[official].item(), rel=2e-5), ours


@every_case
@torch.no_grad()
def test_sampled_regions_and_their_targets(name, case):
    torch.manual_seed(read_case(name)["steps"]["roi_loss"]["notes"]["torch_seed"])
    stored = read_tensors(name, "roi_loss")
    box_head = case.model.roi_head.box_head
    labels, box_targets, mask_targets = [], [], []
    for index, (proposals, objects) in enumerate(
        zip(case.read("loss_targets", "train_proposals_{}"), case.build_objects(), strict=True)
    ):
        matches = match_boxes(proposals, objects.boxes, 0.5, 0.5)
        assert torch.equal(matches + 1, stored[f"assigned_gt_plus1_img{index}"])
        regions = box_head.sample_regions(proposals, objects)
        candidates = torch.cat((objects.boxes, proposals))
        sample = torch.cat((stored[f"sampled_pos_img{index}"], stored[f"sampled_neg_img{index}"]))
        assert torch.equal(regions.boxes, candidates[sample])
        assert torch.equal(regions.matches, stored[f"pos_gt_img{index}"])
        labels.append(regions.class_labels)
        targets = encode_boxes(regions.positive_boxes, objects.boxes[regions.matches])
        targets = targets / torch.tensor(box_head.options.box_coder_stds)
        box_targets.append(torch.nn.functional.pad(targets, (0, 0, 0, len(sample) - len(targets))))
        mask_targets.append(crop_masks(objects.masks, regions.positive_boxes, regions.matches, 28))
    assert torch.equal(torch.cat(labels), stored["labels"])
    torch.testing.assert_close(torch.cat(box_targets), stored["bbox_targets"], rtol=1e-5, atol=1e-5)
    assert_matches_head(torch.cat(mask_targets), name, "roi_loss", "mask_targets")
    assert torch.equal(torch.cat(mask_targets).sum(dim=(1, 2)).long(), stored["mask_targets_area"])


def test_gradients():
    case = Case(GRADIENT_CASE)
    for level in case.maps:
        level.requires_grad_()
    levels = case.compute_levels()
    loss = sum((compute_rpn_losses(case, levels) | compute_region_losses(case, levels)).values())
    loss.backward()
    stored = read_tensors(GRADIENTS, "grads")
    assert loss.item() == pytest.approx(stored["total_loss"].item(), rel=2e-5)
    assert stored["has_grad"].all()
    names = read_case(GRADIENTS)["steps"]["grads"]["notes"]["parameter_names"]
    for official_name, expected in zip(names, stored["param_grad_l2"].tolist(), strict=True):
        gradient = case.model.get_parameter(rename_key(official_name, case.model.config)).grad
        assert gradient.double().norm().item() == pytest.approx(expected, rel=GRADIENT_TOLERANCE), official_name
    for k, level in enumerate(case.maps):
        assert_matches_head(level.grad, GRADIENTS, "grads", f"input_grad_level{k}")


def build_end_to_end_input() -> tuple[torch.Tensor, torch.Tensor]:
    case = read_case(END_TO_END)
    pixel_values = torch.from_numpy(image(case["case"]["seed"], (len(case["metas"]), 3, *case["case"]["pad"])))
    pixel_mask = torch.zeros(len(pixel_values), *pixel_values.shape[2:], dtype=torch.bool)
    for mask, meta in zip(pixel_mask, case["metas"], strict=True):
        mask[: meta["img_shape"][0], : meta["img_shape"][1]] = True
    return pixel_values * pixel_mask[:, None], pixel_mask


@torch.no_grad()
def test_end_to_end():
    case = read_case(END_TO_END)
    config, model_class = convert_config(case["model"] | {"backbone": case["backbone"]})
    with torch.device("meta"):
        model = model_class(config)
    # only the weights of the backbone are listed
    shapes = {name: model.get_parameter(rename_key(name, config)).shape for name in HEAD_NAMES} | case["state_dict"]
    weights = {name.removeprefix("backbone."): build_weight(name, shape) for name, shape in shapes.items()}
    converted, left_out = convert_state_dict(weights, model)
    assert not left_out
    model.load_state_dict(converted, assign=True)
    model.eval()

    pixel_values, pixel_mask = build_end_to_end_input()
    feature_maps = model.feature_pyramid(model.piip(pixel_values).merged_feature_maps)
    for k, level in enumerate(feature_maps):
        assert_matches_head(level, END_TO_END, "backbone", f"out{k}")
    proposals = model.rpn_head.get_proposals(*model.rpn_head(model.neck(feature_maps)), get_image_sizes(case["metas"]))
    outputs = model(pixel_values, pixel_mask)
    sizes = [meta["ori_shape"][:2] for meta in case["metas"]]
    results = PiipInstanceSegmentationImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0, target_sizes=sizes, return_binary_maps=True
    )
    detections, stored = read_detections(outputs, sizes), read_tensors(END_TO_END, "detections")
    for index, (size, result) in enumerate(zip(sizes, results, strict=True)):
        assert_same_boxes(proposals[index], read_tensors(END_TO_END, "rpn")[f"proposals_img{index}"][:, :4])
        assert_same_detections(*detections[index], stored[f"boxes_img{index}"], stored[f"labels_img{index}"])
        expected = read_pasted_masks(END_TO_END, index, size)
        assert_same_masks(result["segmentation"][: len(expected)], expected)
