"""Fine-tune a PIIP segmenter, or train one from scratch, or evaluate one, with the Transformers Trainer.

    python scripts/run_semantic_segmentation.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir FOLDER \\
        --output_dir outputs/my_model --do_train --do_eval

FOLDER holds images/{train,validation}/*.jpg, labels/{train,validation}/*.png with a class id per pixel under the names
of the images, and classes.txt with a class name per line. The model may be any PIIP checkpoint; heads that it does not
have are new. Images are segmented as config.uper_net.inference_mode says, and results are counted over all pixels of
the images in their own size.

The options may also stand in a JSON or YAML file that is the first argument. A run that was interrupted goes on from
its last checkpoint when the same command is given again. The results are in OUTPUT_DIR/all_results.json, the logs for
TensorBoard in OUTPUT_DIR/runs, pictures of predictions in OUTPUT_DIR/previews.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
from transformers import EvalPrediction, set_seed

from modeling_piip import PiipForSemanticSegmentation
from modeling_piip.training import (
    ModelArguments,
    OptimizationArguments,
    PiipTrainer,
    PiipTrainingArguments,
    check_splits,
    get_model_labels,
    load_config,
    load_model,
    parse_args,
    synchronize_batch_norm,
)
from modeling_piip.training_semantic_segmentation import (
    SegmentationAugmentationArguments,
    SegmentationDataArguments,
    build_previews,
    build_segmentation_datasets,
    check_last_batch,
    collate_maps,
    get_flat_maps,
    load_segmentation_image_processor,
    load_semantic_segmentation_data,
    name_results,
)


METRIC = Path(__file__).parent / "metrics" / "mean_iou"


@dataclass
class SegmentationTrainingArguments(PiipTrainingArguments):
    lr_scheduler_type: str = field(
        default="polynomial", metadata={"help": "Course of the learning rate; --lr_scheduler_kwargs sets its power."}
    )
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "What the best model is best at."})
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Evaluation images per forward; above 1 they must all have the same size."}
    )
    batch_eval_metrics: bool = field(
        default=True, metadata={"help": "Count the pixels of every batch and forget its maps."}
    )


class SegmentationTrainer(PiipTrainer):
    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, *get_flat_maps(self.processing_class, logits, labels)


def build_compute_metrics(label_names: list[str]) -> Callable[[EvalPrediction, bool], dict[str, float]]:
    metric = evaluate.load(str(METRIC), num_labels=len(label_names), keep_in_memory=True)

    def compute_metrics(results: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        metric.add_batch(predictions=results.predictions, references=results.label_ids)
        return name_results(metric.compute(), label_names) if compute_result else {}

    return compute_metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        SegmentationDataArguments,
        SegmentationAugmentationArguments,
        OptimizationArguments,
        SegmentationTrainingArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, training_args = parse_args(
        argument_classes, argv, description=__doc__
    )
    set_seed(training_args.seed)
    training = training_args.do_train
    config = load_config(model_args)
    model_labels = get_model_labels(model_args, config)
    splits, label_names = load_semantic_segmentation_data(data_args, training_args.seed, model_labels, training)
    check_splits(splits, training_args)
    model = load_model(PiipForSemanticSegmentation, model_args, config, label_names, training)
    model = synchronize_batch_norm(model, training_args.device, training_args.world_size)
    image_processor = load_segmentation_image_processor(model_args, config, data_args, model_labels, label_names)
    train_dataset, eval_dataset = build_segmentation_datasets(
        splits, image_processor, config, data_args, augmentation_args, training_args.seed
    )
    if training and training_args.world_size == 1 and not training_args.dataloader_drop_last:
        check_last_batch(train_dataset, training_args.train_batch_size)

    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        optimization_args=optimization_args,
        draw_previews=build_previews(eval_dataset, data_args.num_previews),
        data_collator=collate_maps,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=build_compute_metrics(label_names),
        processing_class=image_processor,
    )
    metrics = trainer.run()
    if training:
        trainer.write_model_card("image-segmentation", model_args, data_args)
    return metrics


if __name__ == "__main__":
    main()
