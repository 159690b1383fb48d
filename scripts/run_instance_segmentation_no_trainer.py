"""Fine-tune a PIIP instance segmenter, or train one from scratch, in a plain loop on Accelerate.

    accelerate launch scripts/run_instance_segmentation_no_trainer.py --model_name_or_path FOLDER_OR_HUB_ID \\
        --data_dir FOLDER --output_dir outputs/my_model

Data, augmentation and learning rates are those of run_instance_segmentation.py; this script is for people who want to
change the loop, which is in modeling_piip/training_loop.py. A run that was interrupted goes on from its last
checkpoint when the same command is given again.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import set_seed

from modeling_piip import PiipForInstanceSegmentation, PiipInstanceSegmentationImageProcessor
from modeling_piip.training import ModelArguments, get_model_labels, load_config, load_model, parse_args
from modeling_piip.training_detection import (
    DetectionCollator,
    DetectionDataArguments,
    DetectionEvaluator,
    DetectionLoopArguments,
    DetectionOptimizationArguments,
    InstanceAugmentationArguments,
    build_detection_datasets,
    build_detection_previews,
    evaluate_detector,
    load_detection_image_processor,
    load_object_detection_data,
)
from modeling_piip.training_loop import build_accelerator, check_both_splits, run_training_loop
from modeling_piip.visualization import draw_detection_previews, predict_instances, predict_objects


METRIC = Path(__file__).parent / "metrics" / "mean_ap"


@dataclass
class InstanceLoopArguments(DetectionLoopArguments):
    max_grad_norm: float = field(
        default=0, metadata={"help": "Clip the norm of the gradient to this, 0: do not (official: 0)."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        DetectionDataArguments,
        InstanceAugmentationArguments,
        DetectionOptimizationArguments,
        InstanceLoopArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, args = parse_args(
        argument_classes, argv, description=__doc__
    )
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    config = load_config(model_args)
    with_masks = config.mask_rcnn is None or config.mask_rcnn.with_masks
    model_labels = get_model_labels(model_args, config)
    splits, label_names, category_ids = load_object_detection_data(
        data_args, args.seed, model_labels, with_masks=with_masks
    )
    check_both_splits(splits)
    model = load_model(PiipForInstanceSegmentation, model_args, config, label_names, training=True)
    image_processor = load_detection_image_processor(model_args, config, PiipInstanceSegmentationImageProcessor)
    train_dataset, eval_dataset = build_detection_datasets(
        splits, image_processor, config, data_args, augmentation_args, args.seed
    )
    evaluator = DetectionEvaluator(eval_dataset, METRIC, label_names, category_ids, with_masks)
    draw = partial(draw_detection_previews, predict=predict_instances if with_masks else predict_objects)
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
        draw_previews=build_detection_previews(eval_dataset, data_args.num_previews, draw),
    )


if __name__ == "__main__":
    main()
