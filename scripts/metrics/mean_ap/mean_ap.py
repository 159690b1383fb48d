# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""COCO's average precision for `evaluate.load("scripts/metrics/mean_ap", num_labels=...)`; works without the Hub."""

import datasets
import evaluate
import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_masks


class MeanAP(evaluate.Metric):
    """
    Average precision and recall of boxes and masks, as COCO defines them. Of every image its detections are kept, as
    arrays and compressed masks; the images themselves are not needed.

    Args:
        num_labels (`int`):
            Number of classes.
        iou_types (`list[str]`, *optional*, defaults to `["bbox"]`):
            `"bbox"` evaluates boxes, `"segm"` masks.
        predictions (`list[dict]`):
            Per image `image_id`, `scores` `(num_detections,)`, class ids `labels` `(num_detections,)`, `boxes`
            `(num_detections, 4)` as (left, top, width, height) in pixels, and for `"segm"` a list `masks` of
            compressed run-length encodings. An image that was added before does not count again, so that processes may
            share out a data set with repetitions.
        references (`list[dict]`):
            Per image, in the same order, `image_id`, `height`, `width` and `annotations`: its objects in COCO format,
            with the class id as `category_id`.

    Returns:
        `dict[str, float | list[float]]`: for either type, such as `"bbox"`: `bbox_ap` (mean over IoU thresholds from
        0.5 to 0.95 and over classes that occur), `bbox_ap50`, `bbox_ap75`, `bbox_ap_small`, `bbox_ap_medium`,
        `bbox_ap_large` (objects below 32**2, up to 96**2 and above 96**2 pixels), average recall with 1, 10 and 100
        detections per image and class `bbox_ar1`, `bbox_ar10`, `bbox_ar100`, `bbox_ar_small`, `bbox_ar_medium`,
        `bbox_ar_large`, and the list `bbox_per_class_ap`. Values without an object are `nan`.
    """

    names = (
        *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
    )

    def __init__(self, num_labels: int, iou_types: list[str] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.num_labels = num_labels
        self.iou_types = iou_types or ["bbox"]
        unknown = set(self.iou_types) - {"bbox", "segm"}
        if unknown:
            raise ValueError(f"`iou_types` can be 'bbox' and 'segm', got {self.iou_types}.")
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        image_id = {"image_id": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Average precision of detected boxes and masks.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": image_id, "references": image_id}),
        )

    def reset(self):
        # by image_id
        self.predictions = {}
        self.references = {}

    def add_batch(self, *, predictions: list[dict], references: list[dict]):
        """Takes the detections and the true objects of several images."""
        for prediction, reference in zip(predictions, references, strict=True):
            image_id = prediction["image_id"]
            if image_id != reference["image_id"]:
                raise ValueError(
                    f"The prediction for image_id {image_id} comes with the reference of {reference['image_id']}: "
                    "both lists need the same order."
                )
            if image_id in self.references:
                continue
            self.check(prediction)
            self.predictions[image_id] = prediction
            self.references[image_id] = reference

    def add(self, *, prediction: dict, reference: dict):
        """Takes the detections and the true objects of one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def check(self, prediction: dict):
        name = f"The prediction for image_id {prediction['image_id']}"
        scores, class_ids, boxes = (np.asarray(prediction[key]) for key in ("scores", "labels", "boxes"))
        if not np.isfinite(scores).all() or not np.isfinite(boxes).all():
            raise ValueError(f"{name} has scores or boxes that are NaN or infinite.")
        if len(class_ids) > 0 and not 0 <= class_ids.min() <= class_ids.max() < self.num_labels:
            raise ValueError(
                f"{name} has class ids from {class_ids.min()} to {class_ids.max()}, but there are {self.num_labels} "
                "classes."
            )
        if "segm" in self.iou_types and len(prediction.get("masks", [])) != len(scores):
            raise ValueError(f"{name} has {len(scores)} scores but {len(prediction.get('masks', []))} masks.")

    def compute(self, *, predictions=None, references=None) -> dict[str, float | list[float]]:
        """Results of all images since the last call, and of those that are passed."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.references:
            raise ValueError("There are no predictions to evaluate: call `add_batch` first.")
        results = {}
        for iou_type in self.iou_types:
            results |= self.evaluate(iou_type)
        self.reset()
        return results

    def evaluate(self, iou_type: str) -> dict[str, float | list[float]]:
        truth = [
            {"image_id": image_id, "iscrowd": 0, "area": item["bbox"][2] * item["bbox"][3], **item}
            for image_id, reference in self.references.items()
            for item in reference["annotations"]
        ]
        detected = [
            item for prediction in self.predictions.values() for item in self.list_detections(prediction, iou_type)
        ]
        evaluation = COCOeval_faster(self.build_index(truth), self.build_index(detected), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        # (iou thresholds, recalls, classes, sizes, numbers of detections); -1 where there is no object
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        per_class = [mean_of_valid(precision[:, :, class_id]) for class_id in range(self.num_labels)]
        values = [value if value >= 0 else float("nan") for value in map(float, evaluation.stats[: len(self.names)])]
        results = dict(zip(self.names, values)) | {"per_class_ap": per_class}
        return {f"{iou_type}_{name}": value for name, value in results.items()}

    def list_detections(self, prediction: dict, iou_type: str) -> list[dict]:
        arrays = (np.asarray(prediction[name]).tolist() for name in ("labels", "scores", "boxes"))
        items = [
            {"image_id": prediction["image_id"], "category_id": class_id, "score": score, "bbox": box, "iscrowd": 0}
            for class_id, score, box in zip(*arrays, strict=True)
        ]
        if iou_type == "bbox":
            return [item | {"area": item["bbox"][2] * item["bbox"][3]} for item in items]
        areas = coco_masks.area(prediction["masks"]).tolist() if items else []
        return [
            item | {"segmentation": mask, "area": area} for item, mask, area in zip(items, prediction["masks"], areas)
        ]

    def build_index(self, annotations: list[dict]) -> COCO:
        """Annotations of all images with ids from 1 on: 0 would mean that nothing was matched."""
        index = COCO()
        index.dataset = {
            "images": [
                {"id": image_id, "height": reference["height"], "width": reference["width"]}
                for image_id, reference in self.references.items()
            ],
            "categories": [{"id": class_id, "name": str(class_id)} for class_id in range(self.num_labels)],
            "annotations": [item | {"id": number} for number, item in enumerate(annotations, start=1)],
        }
        index.createIndex()
        return index


def mean_of_valid(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if len(values) > 0 else float("nan")
