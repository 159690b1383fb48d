import contextlib
import io
import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


METRIC = Path(__file__).parents[1] / "scripts" / "metrics" / "mean_ap"
NUM_LABELS = 4


def load_metric(**options):
    return evaluate.load(str(METRIC), num_labels=NUM_LABELS, keep_in_memory=True, **options)


def draw_rectangle(box, height, width):
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    left, top, box_width, box_height = (int(side) for side in box)
    mask[top : top + box_height, left : left + box_width] = 1
    rle = reference_masks.encode(mask)
    return rle | {"counts": rle["counts"].decode()}


def make_example(rng, image_id, num_objects, height=240, width=320):
    """Objects of all sizes, some of them crowds, and detections near some of them, in the wrong places or classes."""
    annotations = []
    for _ in range(num_objects):
        sides = np.exp(rng.uniform(np.log(8), np.log(200), 2))
        corner = rng.uniform(0, np.maximum((width, height) - sides, 1))
        box = [float(round(number)) for number in (*corner, *sides)]
        annotations.append(
            {
                "bbox": box,
                "category_id": int(rng.integers(NUM_LABELS - 1)),  # the last class does not occur
                "area": 0.7 * box[2] * box[3],
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": draw_rectangle(box, height, width),
            }
        )
    boxes = [np.array(item["bbox"]) * rng.normal(1, 0.12, 4) for item in annotations for _ in range(3)]
    boxes += [rng.uniform(4, 120, 4) for _ in range(4)]
    boxes = np.abs(np.array(boxes)).reshape(-1, 4)
    labels = [item["category_id"] for item in annotations for _ in range(3)] + [0, 1, 2, 3]
    labels = np.where(rng.random(len(labels)) < 0.2, rng.integers(0, NUM_LABELS, len(labels)), labels)
    prediction = {
        "image_id": image_id,
        "scores": rng.random(len(labels)).astype(np.float32),
        "labels": labels,
        "boxes": boxes.astype(np.float32),
        "masks": [draw_rectangle(box, height, width) for box in boxes],
    }
    return prediction, {"image_id": image_id, "height": height, "width": width, "annotations": annotations}


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    # one image without objects, ids in no order
    return [make_example(rng, image_id, count) for image_id, count in ((7, 4), (3, 0), (12, 9), (5, 6), (30, 2))]


def evaluate_by_pycocotools(examples, iou_type):
    truth, detected = [], []
    for prediction, reference in examples:
        truth += [item | {"image_id": reference["image_id"]} for item in reference["annotations"]]
        for k, score in enumerate(prediction["scores"].tolist()):
            result = {"image_id": prediction["image_id"], "category_id": int(prediction["labels"][k]), "score": score}
            shape = {"bbox": prediction["boxes"][k].tolist(), "segm": prediction["masks"][k]}[iou_type]
            detected.append(result | {{"bbox": "bbox", "segm": "segmentation"}[iou_type]: shape})
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = {
            "images": [{"id": item["image_id"], "height": 240, "width": 320} for _, item in examples],
            "categories": [{"id": class_id} for class_id in range(NUM_LABELS)],
            "annotations": [item | {"id": number} for number, item in enumerate(truth, start=1)],
        }
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(detected), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_results_equal_those_of_pycocotools(examples):
    metric = load_metric(iou_types=["bbox", "segm"])
    # in batches, as an evaluation adds them
    for start in (0, 2, 4):
        predictions, references = zip(*examples[start : start + 2])
        metric.add_batch(predictions=predictions, references=references)
    results = metric.compute()
    for iou_type in ("bbox", "segm"):
        expected = evaluate_by_pycocotools(examples, iou_type)
        values = [results[f"{iou_type}_{name}"] for name in metric.names]
        assert values == pytest.approx(expected.stats.tolist(), abs=1e-9), iou_type
        assert 0.05 < values[0] < 0.95
        for class_id, ap in enumerate(results[f"{iou_type}_per_class_ap"][:-1]):
            precision = expected.eval["precision"][:, :, class_id, 0, -1]
            assert ap == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
        assert np.isnan(results[f"{iou_type}_per_class_ap"][-1])


def test_an_image_counts_once_and_compute_starts_anew(examples):
    predictions, references = map(list, zip(*examples))
    metric = load_metric()
    expected = metric.compute(predictions=predictions, references=references)
    metric.add_batch(predictions=predictions + predictions[:2], references=references + references[:2])
    assert repr(metric.compute()) == repr(expected)
    with pytest.raises(ValueError, match="no predictions"):
        metric.compute()


def test_perfect_predictions_have_an_average_precision_of_one(examples):
    metric = load_metric(iou_types=["bbox", "segm"])
    for _, reference in examples:
        items = [item for item in reference["annotations"] if not item["iscrowd"]]
        prediction = {
            "image_id": reference["image_id"],
            "scores": np.linspace(1, 0.5, len(items)),
            "labels": np.array([item["category_id"] for item in items], dtype=int),
            "boxes": np.array([item["bbox"] for item in items]).reshape(-1, 4),
            "masks": [item["segmentation"] for item in items],
        }
        metric.add(prediction=prediction, reference=reference)
    results = metric.compute()
    assert results["bbox_ap"] == pytest.approx(1) and results["segm_ap"] == pytest.approx(1)


def test_no_detection_at_all_is_an_average_precision_of_zero(examples):
    metric = load_metric()
    nothing = {"scores": np.zeros(0), "labels": np.zeros(0, dtype=int), "boxes": np.zeros((0, 4))}
    for _, reference in examples:
        metric.add(prediction={"image_id": reference["image_id"]} | nothing, reference=reference)
    results = metric.compute()
    assert results["bbox_ap"] == 0 and results["bbox_per_class_ap"][:3] == [0, 0, 0]


def test_references_without_area_or_crowds_are_enough(examples):
    prediction, reference = examples[0]
    stripped = [{key: item[key] for key in ("bbox", "category_id")} for item in reference["annotations"]]
    json.dumps(stripped)
    metric = load_metric()
    results = metric.compute(predictions=[prediction], references=[reference | {"annotations": stripped}])
    assert 0 <= results["bbox_ap"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 4])}, "class ids from 0 to 4, but there are 4 classes"),
        ({"scores": np.array([0.5, np.nan])}, "image_id 7 has scores or boxes that are NaN"),
        ({"image_id": 8}, "image_id 8 comes with the reference of 7"),
        ({"masks": []}, "2 scores but 0 masks"),
    ],
)
def test_wrong_predictions_are_named(change, message):
    prediction = {
        "image_id": 7,
        "scores": np.array([0.9, 0.8]),
        "labels": np.array([0, 1]),
        "boxes": np.array([[0, 0, 4, 4], [1, 1, 5, 5]]),
        "masks": [draw_rectangle([0, 0, 4, 4], 8, 8)] * 2,
    }
    reference = {"image_id": 7, "height": 8, "width": 8, "annotations": []}
    with pytest.raises(ValueError, match=message):
        load_metric(iou_types=["bbox", "segm"]).add(prediction=prediction | change, reference=reference)


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'bbox' and 'segm'"):
        load_metric(iou_types=["keypoints"])
