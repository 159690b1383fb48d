"""Fine-tune a PIIP segmenter, or train one from scratch, in a plain loop on Accelerate.

    accelerate launch scripts/run_semantic_segmentation_no_trainer.py --model_name_or_path FOLDER_OR_HUB_ID \\
        --data_dir FOLDER --output_dir outputs/my_model

Data, augmentation and learning rates are those of run_semantic_segmentation.py; this script is for people who want to
change the loop, which is in modeling_piip/training_loop.py. A run that was interrupted goes on from its last
checkpoint when the same command is given again.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed

from modeling_piip import PiipForSemanticSegmentation, PiipImageProcessor
from modeling_piip.training import (
    ModelArguments,
    OptimizationArguments,
    get_model_labels,
    load_config,
    load_model,
    parse_args,
)
from modeling_piip.training_loop import LoopArguments, build_accelerator, check_both_splits, run_training_loop
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
class SegmentationLoopArguments(LoopArguments):
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Course of the learning rate."})
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Evaluation images per forward; above 1 they must all have the same size."}
    )


def evaluate_model(
    accelerator: Accelerator,
    image_processor: PiipImageProcessor,
    label_names: list[str],
    model: torch.nn.Module,
    dataloader: DataLoader,
) -> dict[str, float]:
    metric = evaluate.load(str(METRIC), num_labels=len(label_names), keep_in_memory=True)
    for batch in tqdm(dataloader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        maps = get_flat_maps(image_processor, logits, batch["labels"])
        maps = accelerator.pad_across_processes(maps, dim=1, pad_index=metric.ignore_index)
        predictions, references = accelerator.gather_for_metrics(maps)
        metric.add_batch(predictions=predictions, references=references)
    return name_results(metric.compute(), label_names)


def main(argv: list[str] | None = None) -> dict[str, float]:
    argument_classes = (
        ModelArguments,
        SegmentationDataArguments,
        SegmentationAugmentationArguments,
        OptimizationArguments,
        SegmentationLoopArguments,
    )
    model_args, data_args, augmentation_args, optimization_args, args = parse_args(
        argument_classes, argv, description=__doc__
    )
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    config = load_config(model_args)
    model_labels = get_model_labels(model_args, config)
    splits, label_names = load_semantic_segmentation_data(data_args, args.seed, model_labels)
    check_both_splits(splits)
    model = load_model(PiipForSemanticSegmentation, model_args, config, label_names, training=True)
    image_processor = load_segmentation_image_processor(model_args, config, data_args, model_labels, label_names)
    train_dataset, eval_dataset = build_segmentation_datasets(
        splits, image_processor, config, data_args, augmentation_args, args.seed
    )
    if accelerator.num_processes == 1:
        check_last_batch(train_dataset, args.per_device_train_batch_size)
    return run_training_loop(
        accelerator,
        args,
        optimization_args,
        model,
        train_dataset,
        eval_dataset,
        collate_maps,
        image_processor,
        partial(evaluate_model, accelerator, image_processor, label_names),
        metric_for_best_model="mean_iou",
        draw_previews=build_previews(eval_dataset, data_args.num_previews),
    )


if __name__ == "__main__":
    main()
