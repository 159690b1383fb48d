"""Fine-tune a PIIP image classifier, or train one from scratch, in a plain loop on Accelerate.

    accelerate launch scripts/run_image_classification_no_trainer.py --model_name_or_path FOLDER_OR_HUB_ID \\
        --data_dir FOLDER --output_dir outputs/my_model

Data, augmentation and learning rates are those of run_image_classification.py; this script is for people who want to
change the loop, which is in modeling_piip/training_loop.py. A run that was interrupted goes on from its last
checkpoint when the same command is given again.
"""

from functools import partial
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed

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
    get_model_labels,
    load_config,
    load_image_processor,
    load_model,
    parse_args,
)
from modeling_piip.training_loop import LoopArguments, build_accelerator, check_both_splits, run_training_loop


METRIC = Path(__file__).parent / "metrics" / "accuracy"


def evaluate_model(accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader) -> dict[str, float]:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    for batch in tqdm(dataloader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        ranked = logits.topk(min(5, logits.shape[-1])).indices
        ranked, labels = accelerator.gather_for_metrics((ranked, batch["labels"]))
        metric.add_batch(predictions=ranked, references=labels)
    return metric.compute()


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, augmentation_args, optimization_args, args = parse_args(
        (ModelArguments, ImageDataArguments, AugmentationArguments, OptimizationArguments, LoopArguments),
        argv,
        description=__doc__,
    )
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    config = load_config(model_args)
    splits, label_names = load_image_classification_data(data_args, args.seed, get_model_labels(model_args, config))
    check_both_splits(splits)
    config.problem_type = "single_label_classification"
    model = load_model(PiipForImageClassification, model_args, config, label_names, training=True)
    image_processor = load_image_processor(model_args, config)
    train_dataset, eval_dataset = build_datasets(splits, image_processor, augmentation_args, args.seed)
    return run_training_loop(
        accelerator,
        args,
        optimization_args,
        model,
        train_dataset,
        eval_dataset,
        build_collator(augmentation_args, len(label_names)),
        image_processor,
        partial(evaluate_model, accelerator),
        metric_for_best_model="accuracy",
    )


if __name__ == "__main__":
    main()
