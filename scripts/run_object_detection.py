"""Fine-tune a PIIP detector, or train one from scratch, or evaluate one, with the Transformers Trainer.

    python scripts/run_object_detection.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir FOLDER \\
        --output_dir outputs/my_model --do_train --do_eval

FOLDER holds images/{train,validation}/*.jpg and annotations/{train,validation}.json in COCO format. COCO itself fits
as it is published, with --train_split train2017 --eval_split val2017; so do Hub data sets (--dataset_name) with a
column "objects". The model may be any PIIP checkpoint; heads that it does not have are new.

The options may also stand in a JSON or YAML file that is the first argument. A run that was interrupted goes on from
its last checkpoint when the same command is given again. The results are in OUTPUT_DIR/all_results.json, the
detections of the last evaluation as COCO results in OUTPUT_DIR/predictions.json, the logs for TensorBoard in
OUTPUT_DIR/runs, pictures of predictions in OUTPUT_DIR/previews.
"""

from pathlib import Path

from transformers import set_seed

from modeling_piip import PiipForObjectDetection, PiipImageProcessor
from modeling_piip.training import (
    ModelArguments,
    check_splits,
    get_model_labels,
    load_config,
    load_model,
    parse_args,
    synchronize_batch_norm,
)
from modeling_piip.training_detection import (
    DetectionAugmentationArguments,
    DetectionCollator,
    DetectionDataArguments,
    DetectionEvaluator,
    DetectionOptimizationArguments,
    DetectionTrainer,
    DetectionTrainingArguments,
    build_detection_datasets,
    build_detection_previews,
    load_detection_image_processor,
    load_object_detection_data,
)
from modeling_piip.visualization import draw_detection_previews


METRIC = Path(__file__).parent / "metrics" / "mean_ap"


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        DetectionDataArguments,
        DetectionAugmentationArguments,
        DetectionOptimizationArguments,
        DetectionTrainingArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, training_args = parse_args(
        argument_classes, argv, description=__doc__
    )
    set_seed(training_args.seed)
    training = training_args.do_train
    config = load_config(model_args)
    model_labels = get_model_labels(model_args, config)
    splits, label_names, category_ids = load_object_detection_data(
        data_args, training_args.seed, model_labels, training
    )
    check_splits(splits, training_args)
    model = load_model(PiipForObjectDetection, model_args, config, label_names, training)
    model = synchronize_batch_norm(model, training_args.device, training_args.world_size)
    image_processor = load_detection_image_processor(model_args, config, PiipImageProcessor)
    train_dataset, eval_dataset = build_detection_datasets(
        splits, image_processor, config, data_args, augmentation_args, training_args.seed
    )

    trainer = DetectionTrainer(
        model=model,
        args=training_args,
        optimization_args=optimization_args,
        evaluator=eval_dataset and DetectionEvaluator(eval_dataset, METRIC, label_names, category_ids),
        draw_previews=build_detection_previews(eval_dataset, data_args.num_previews, draw_detection_previews),
        data_collator=DetectionCollator(image_processor, augmentation_args.pad_to),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
    )
    metrics = trainer.run()
    if training:
        trainer.write_model_card("object-detection", model_args, data_args)
    return metrics


if __name__ == "__main__":
    main()
