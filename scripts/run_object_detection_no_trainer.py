"""Fine-tune a PIIP detector, or train one from scratch, in a plain loop on Accelerate.

    accelerate launch scripts/run_object_detection_no_trainer.py --model_name_or_path FOLDER_OR_HUB_ID \\
        --data_dir FOLDER --output_dir outputs/my_model

Data, augmentation and learning rates are those of run_object_detection.py; this script is for people who want to
change the loop, which is in modeling_piip/training_loop.py. A run that was interrupted goes on from its last
checkpoint when the same command is given again.
"""

from functools import partial
from pathlib import Path

from transformers import set_seed

from modeling_piip import PiipForObjectDetection, PiipImageProcessor
from modeling_piip.training import ModelArguments, get_model_labels, load_config, load_model, parse_args
from modeling_piip.training_detection import (
    DetectionAugmentationArguments,
    DetectionCollator,
    DetectionDataArguments,
    DetectionEvaluator,
    DetectionLoopArguments,
    DetectionOptimizationArguments,
    build_detection_datasets,
    build_detection_previews,
    evaluate_detector,
    load_detection_image_processor,
    load_object_detection_data,
)
from modeling_piip.training_loop import build_accelerator, check_both_splits, run_training_loop
from modeling_piip.visualization import draw_detection_previews


METRIC = Path(__file__).parent / "metrics" / "mean_ap"


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        DetectionDataArguments,
        DetectionAugmentationArguments,
        DetectionOptimizationArguments,
        DetectionLoopArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, args = parse_args(
        argument_classes, argv, description=__doc__
    )
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    config = load_config(model_args)
    model_labels = get_model_labels(model_args, config)
    splits, label_names, category_ids = load_object_detection_data(data_args, args.seed, model_labels)
    check_both_splits(splits)
    model = load_model(PiipForObjectDetection, model_args, config, label_names, training=True)
    image_processor = load_detection_image_processor(model_args, config, PiipImageProcessor)
    train_dataset, eval_dataset = build_detection_datasets(
        splits, image_processor, config, data_args, augmentation_args, args.seed
    )
    evaluator = DetectionEvaluator(eval_dataset, METRIC, label_names, category_ids)
    return run_training_loop(
        accelerator,
        args,
        optimization_args,
        model,
        train_dataset,
        eval_dataset,
        DetectionCollator(image_processor, augmentation_args.pad_to),
        image_processor,
        partial(evaluate_detector, accelerator, evaluator, Path(args.output_dir, "predictions.json")),
        metric_for_best_model="box_ap",
        draw_previews=build_detection_previews(eval_dataset, data_args.num_previews, draw_detection_previews),
    )


if __name__ == "__main__":
    main()
