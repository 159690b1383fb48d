"""Fine-tune a PIIP image classifier, or train one from scratch, or evaluate one, with the Transformers Trainer.

    python scripts/run_image_classification.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir FOLDER \\
        --output_dir outputs/my_model --do_train --do_eval

The options may also stand in a JSON or YAML file that is the first argument. A run that was interrupted goes on from
its last checkpoint when the same command is given again. The results are in OUTPUT_DIR/all_results.json, the logs for
TensorBoard in OUTPUT_DIR/runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from transformers import EvalPrediction, set_seed

from modeling_piip import PiipForImageClassification
from modeling_piip.data import (
    AugmentationArguments,
    ImageDataArguments,
    build_collator,
    build_datasets,
    load_image_classification_data,
)
from modeling_piip.training import (
    ModelArguments,
    OptimizationArguments,
    PiipTrainer,
    PiipTrainingArguments,
    check_splits,
    get_model_labels,
    load_config,
    load_image_processor,
    load_model,
    parse_args,
)


METRIC = Path(__file__).parent / "metrics" / "accuracy"


@dataclass
class ClassificationTrainingArguments(PiipTrainingArguments):
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "What the best model is best at."})


def rank_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Ids of the five most likely classes, so that evaluation does not keep the logits of all images."""
    return logits.topk(min(5, logits.shape[-1])).indices


def build_compute_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return lambda results: metric.compute(predictions=results.predictions, references=results.label_ids)


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        ImageDataArguments,
        AugmentationArguments,
        OptimizationArguments,
        ClassificationTrainingArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, training_args = parse_args(
        argument_classes, argv, description=__doc__
    )
    set_seed(training_args.seed)
    training = training_args.do_train
    config = load_config(model_args)
    splits, label_names = load_image_classification_data(
        data_args, training_args.seed, get_model_labels(model_args, config), training
    )
    check_splits(splits, training_args)
    # class probabilities, as mixup makes them, are then one label too
    config.problem_type = "single_label_classification"
    model = load_model(PiipForImageClassification, model_args, config, label_names, training)
    image_processor = load_image_processor(model_args, config)
    train_dataset, eval_dataset = build_datasets(splits, image_processor, augmentation_args, training_args.seed)

    trainer = PiipTrainer(
        model=model,
        args=training_args,
        optimization_args=optimization_args,
        data_collator=build_collator(augmentation_args, len(label_names)),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=build_compute_metrics(),
        preprocess_logits_for_metrics=rank_classes,
        processing_class=image_processor,
    )
    metrics = trainer.run()
    if training:
        trainer.write_model_card("image-classification", model_args, data_args)
    return metrics


if __name__ == "__main__":
    main()
