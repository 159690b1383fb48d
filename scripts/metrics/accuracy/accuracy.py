# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""Top-1 and top-5 accuracy for `evaluate.load("scripts/metrics/accuracy")`; works without the Hub."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """
    Share of images whose class is the first, or among the first five, of the predicted classes.

    Args:
        predictions (`list[list[int]]`):
            Class ids per image, the most likely first. Five or more are needed for `top5_accuracy`.
        references (`list[int]`):
            The true class ids.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy of ranked classes.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        results = {"accuracy": float(hits[:, 0].mean())}
        if hits.shape[1] >= 5:
            results["top5_accuracy"] = float(hits[:, :5].any(axis=1).mean())
        return results
