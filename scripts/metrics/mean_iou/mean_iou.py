# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Mean IoU for `evaluate.load("scripts/metrics/mean_iou", num_labels=...)`; works without the Hub."""

import datasets
import evaluate
import numpy as np
import torch


class MeanIoU(evaluate.Metric):
    """
    Intersection over union of semantic segmentation, as published results define it: pixels of the whole data set are
    counted in one confusion matrix. Batches are counted when they are added and not kept, so that memory does not grow
    with the data set.

    Args:
        num_labels (`int`):
            Number of classes.
        ignore_index (`int`, *optional*, defaults to 255):
            Reference that does not count. Negative references, as Transformers pads batches with, do not count either.
        predictions (`torch.Tensor`, `numpy.ndarray`, or list of these):
            Maps of class ids.
        references (`torch.Tensor`, `numpy.ndarray`, or list of these):
            The true maps, of the same shapes.

    Returns:
        `dict[str, float | list[float]]`: `mean_iou`, `mean_accuracy` (both over the classes that occur) and
        `overall_accuracy` (over pixels); `per_category_iou` and `per_category_accuracy`, which are `nan` for a class
        that does not occur.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs):
        super().__init__(**kwargs)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        class_ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Mean intersection over union of maps of class ids.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": class_ids, "references": class_ids}),
        )

    def reset(self):
        # a row per true and a column per predicted class
        self.confusion_matrix = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)

    def add_batch(self, *, predictions, references):
        """Counts the pixels of several maps."""
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = torch.as_tensor(prediction), torch.as_tensor(reference)
            if prediction.shape != reference.shape:
                raise ValueError(
                    f"A predicted map has the shape {tuple(prediction.shape)}, its reference "
                    f"{tuple(reference.shape)}: resize the logits to the reference first."
                )
            valid = (reference != self.ignore_index) & (reference >= 0)
            prediction, reference = prediction[valid].long(), reference[valid].long()
            for name, class_ids in (("prediction", prediction), ("reference", reference)):
                if len(class_ids) > 0 and not 0 <= class_ids.min() <= class_ids.max() < self.num_labels:
                    raise ValueError(
                        f"A {name} has class ids from {class_ids.min()} to {class_ids.max()}, but there are "
                        f"{self.num_labels} classes."
                    )
            counts = torch.bincount(self.num_labels * reference + prediction, minlength=self.num_labels**2)
            self.confusion_matrix += counts.view_as(self.confusion_matrix).cpu()

    def add(self, *, prediction, reference):
        """Counts the pixels of one map."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions=None, references=None) -> dict[str, float | list[float]]:
        """Results of all maps since the last call, and of those that are passed."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        confusion_matrix = self.confusion_matrix.double().numpy()
        self.reset()
        hits = confusion_matrix.diagonal()
        truth, predicted = confusion_matrix.sum(axis=1), confusion_matrix.sum(axis=0)
        # classes that do not occur are 0 / 0
        with np.errstate(divide="ignore", invalid="ignore"):
            iou, accuracy = hits / (truth + predicted - hits), hits / truth
            return {
                "mean_iou": mean_of_occurring(iou),
                "mean_accuracy": mean_of_occurring(accuracy),
                "overall_accuracy": float(hits.sum() / truth.sum()),
                "per_category_iou": iou.tolist(),
                "per_category_accuracy": accuracy.tolist(),
            }


def mean_of_occurring(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) > 0 else float("nan")
