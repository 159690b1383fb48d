"""Fine-tune a PIIP image classifier, or train one from scratch, in a loop of its own with Accelerate.

    accelerate launch scripts/run_image_classification_no_trainer.py --model_name_or_path FOLDER_OR_HUB_ID \\
        --data_dir FOLDER --output_dir outputs/my_model

Data, augmentation and learning rates are those of run_image_classification.py; this script is for people who want to
change the loop. A run that was interrupted goes on from its last checkpoint when the same command is given again.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler, set_seed

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
    build_ema,
    find_last_checkpoint,
    get_model_labels,
    get_parameter_groups,
    load_config,
    load_image_processor,
    load_model,
    parse_args,
    seed_step,
)


METRIC = Path(__file__).parent / "metrics" / "accuracy"


@dataclass
class LoopArguments:
    output_dir: str = field(default="outputs", metadata={"help": "Folder for the model, checkpoints, logs, results."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training images."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Stop after this many optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training images per process and forward."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluation images per process and forward."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, without biases and 1-d parameters."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps until the peak learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the norm of the gradient to this."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "Default: as accelerate is configured.", "choices": ["no", "fp16", "bf16"]}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    logging_steps: int = field(default=20, metadata={"help": "Log the mean loss of every so many optimizer steps."})
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between checkpoints. Default: one after every epoch."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Folder to go on from. Default: the last checkpoint in --output_dir."}
    )
    seed: int = field(default=42, metadata={"help": "Decides everything that is random."})


@dataclass
class Progress:
    """Where the training is. Accelerate stores it in every checkpoint."""

    step: int = 0  # optimizer steps so far
    epoch: int = 0  # complete epochs
    batch: int = 0  # batches of the current epoch
    best_accuracy: float = -1.0
    results: dict = field(default_factory=dict)  # of the last evaluation

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int):
    """Writes the checkpoint under another name first, so that a run killed meanwhile leaves no half checkpoint."""
    unfinished, finished = output_dir / "unfinished", output_dir / f"checkpoint-{step}"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = [folder for folder in output_dir.glob("checkpoint-*") if folder != finished]
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)
        for folder in older:
            shutil.rmtree(folder)
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate_model(accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader) -> dict[str, float]:
    model.eval()
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    for batch in tqdm(dataloader, desc="Evaluating", leave=False, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        ranked = logits.topk(min(5, logits.shape[-1])).indices
        ranked, labels = accelerator.gather_for_metrics((ranked, batch["labels"]))
        metric.add_batch(predictions=ranked, references=labels)
    return metric.compute()


def train_epoch(
    accelerator: Accelerator,
    args: LoopArguments,
    model,
    optimizer,
    scheduler,
    dataloader: DataLoader,
    progress: Progress,
) -> Iterator[torch.Tensor]:
    """Trains for an epoch, or for what is left of it, and yields the mean loss of every optimizer step."""
    model.train()
    dataloader.dataset.set_epoch(progress.epoch)
    dataloader.set_epoch(progress.epoch)
    losses = []
    batches = accelerator.skip_first_batches(dataloader, progress.batch) if progress.batch else dataloader
    for batch in batches:
        place = progress.epoch * len(dataloader) + progress.batch
        seed_step(args.seed, place, accelerator.process_index, accelerator.num_processes)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        progress.batch += 1
        if accelerator.sync_gradients:
            scheduler.step()
            progress.step += 1
            yield torch.stack(losses).mean()
            losses = []


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, augmentation_args, optimization_args, args = parse_args(
        (ModelArguments, ImageDataArguments, AugmentationArguments, OptimizationArguments, LoopArguments),
        argv,
        description=__doc__,
    )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with="tensorboard",
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    output_dir = Path(args.output_dir)

    # Data and model
    config = load_config(model_args)
    splits, label_names = load_image_classification_data(data_args, args.seed, get_model_labels(model_args, config))
    if splits.keys() != {"train", "validation"}:
        raise ValueError("The data has only one split: hold out a part of it with --train_val_split 0.1.")
    config.problem_type = "single_label_classification"
    model = load_model(PiipForImageClassification, model_args, config, label_names, training=True)
    image_processor = load_image_processor(model_args, config)
    train_dataset, eval_dataset = build_datasets(splits, image_processor, augmentation_args, args.seed)
    loading = {
        "collate_fn": build_collator(augmentation_args, len(label_names)),
        "num_workers": args.dataloader_num_workers,
    }
    train_dataloader = DataLoader(train_dataset, args.per_device_train_batch_size, shuffle=True, **loading)
    eval_dataloader = DataLoader(eval_dataset, args.per_device_eval_batch_size, **loading)

    # Optimizer, schedule and moving average
    ema = None
    if optimization_args.ema_decay is not None:
        ema = build_ema(model.to(accelerator.device), optimization_args.ema_decay)
        accelerator.register_for_checkpointing(ema)
    groups = get_parameter_groups(model, optimization_args, args.learning_rate, args.weight_decay)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, torch.optim.AdamW(groups), train_dataloader, eval_dataloader
    )
    steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, max_steps)
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress)
    accelerator.init_trackers("runs", {"learning_rate": args.learning_rate, "max_steps": max_steps})
    checkpoint = args.resume_from_checkpoint or find_last_checkpoint(args.output_dir)
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint}. To start anew, remove it or name another --output_dir.")
        accelerator.load_state(checkpoint)

    # Training
    show = {"unit": "step", "disable": not accelerator.is_main_process}
    bar = tqdm(total=max_steps, initial=progress.step, desc="Training", **show)
    while progress.epoch * steps_per_epoch < max_steps:
        losses = []
        steps = train_epoch(accelerator, args, model, optimizer, scheduler, train_dataloader, progress)
        for loss in itertools.islice(steps, max_steps - progress.step):
            bar.update()
            losses.append(loss)
            if ema is not None:
                ema.update_parameters(accelerator.unwrap_model(model))
            if progress.step % args.logging_steps == 0 or progress.step == max_steps:
                mean_loss = accelerator.gather(torch.stack(losses)).mean().item()
                bar.set_postfix(loss=f"{mean_loss:.3f}")
                accelerator.log({"loss": mean_loss, "learning_rate": scheduler.get_last_lr()[0]}, step=progress.step)
                losses = []
            if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, progress.step)
        progress.epoch += 1
        progress.batch = 0

        unwrapped = accelerator.unwrap_model(model) if ema is None else ema.module
        progress.results = evaluate_model(accelerator, unwrapped, eval_dataloader)
        accelerator.log(progress.results, step=progress.step)
        accelerator.print(f"Epoch {progress.epoch}: accuracy {progress.results['accuracy']:.4f}")
        if progress.results["accuracy"] > progress.best_accuracy:
            progress.best_accuracy = progress.results["accuracy"]
            unwrapped.save_pretrained(output_dir, is_main_process=accelerator.is_main_process)
            image_processor.save_pretrained(output_dir)
        if not args.checkpointing_steps:
            save_checkpoint(accelerator, output_dir, progress.step)

    bar.close()
    results = {f"eval_{name}": value for name, value in progress.results.items()}
    results["best_accuracy"] = progress.best_accuracy
    if accelerator.is_main_process:
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
