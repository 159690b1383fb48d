# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""The training loop of the `*_no_trainer.py` scripts, on Accelerate. Needs the `train` extra."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from .data import ImageDataset, check_at_least
from .training import (
    LossMeter,
    OptimizationArguments,
    build_ema,
    build_scheduler,
    find_last_checkpoint,
    get_parameter_groups,
    save_preview,
    seed_step,
    synchronize_batch_norm,
)


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
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the norm of the gradient to this; 0: do not."})
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

    def __post_init__(self):
        check_at_least(1, self, "num_train_epochs", "max_train_steps", "gradient_accumulation_steps")
        check_at_least(1, self, "per_device_train_batch_size", "per_device_eval_batch_size")
        check_at_least(1, self, "logging_steps", "checkpointing_steps")
        check_at_least(0, self, "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm")
        check_at_least(0, self, "dataloader_num_workers", "seed")


@dataclass
class Progress:
    """Where the training is. Accelerate stores it in every checkpoint."""

    step: int = 0  # optimizer steps so far
    epoch: int = 0  # complete epochs
    batch: int = 0  # batches of the current epoch
    best: float = -1.0  # of the metric that decides
    results: dict = field(default_factory=dict)  # of the last evaluation

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def build_accelerator(args: LoopArguments) -> Accelerator:
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with="tensorboard",
        project_dir=args.output_dir,
    )


def check_both_splits(splits: dict):
    if splits.keys() != {"train", "validation"}:
        raise ValueError("The data has only one split: hold out a part of it with --train_val_split 0.1.")


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


def resume(accelerator: Accelerator, args: LoopArguments, progress: Progress, max_steps: int):
    """Loads the checkpoint that was asked for, or else the last one in the output folder, if there is one."""
    checkpoint = args.resume_from_checkpoint or find_last_checkpoint(args.output_dir)
    if checkpoint is None:
        return
    accelerator.print(f"Resuming from {checkpoint}. To start anew, remove it or name another --output_dir.")
    accelerator.load_state(checkpoint)
    if progress.step > max_steps:
        raise ValueError(
            f"{checkpoint} has done {progress.step} steps already, but the training ends after {max_steps}: raise "
            "--max_train_steps or --num_train_epochs, or name another --output_dir to start anew."
        )


def train_epoch(
    accelerator: Accelerator,
    args: LoopArguments,
    model: nn.Module,
    optimizer,
    scheduler,
    dataloader: DataLoader,
    progress: Progress,
    loss_meter: LossMeter,
) -> Iterator[None]:
    """Trains for an epoch, or for what is left of it, and yields after every optimizer step."""
    model.train()
    dataloader.dataset.set_epoch(progress.epoch)
    dataloader.set_epoch(progress.epoch)
    batches = accelerator.skip_first_batches(dataloader, progress.batch) if progress.batch else dataloader
    for batch in batches:
        place = progress.epoch * len(dataloader) + progress.batch
        seed_step(args.seed, place, accelerator.process_index, accelerator.num_processes)
        with accelerator.accumulate(model):
            outputs = model(**batch)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients and args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss_meter.add(outputs)
        progress.batch += 1
        if accelerator.sync_gradients:
            scheduler.step()
            progress.step += 1
            yield


def run_training_loop(
    accelerator: Accelerator,
    args: LoopArguments,
    optimization_args: OptimizationArguments,
    model: PreTrainedModel,
    train_dataset: ImageDataset,
    eval_dataset: ImageDataset,
    collate_fn: Callable[[list[dict]], dict],
    image_processor: BaseImageProcessor,
    evaluate_model: Callable[[nn.Module, DataLoader], dict[str, float]],
    metric_for_best_model: str,
    draw_previews: Callable[[nn.Module], PIL.Image.Image] | None = None,
) -> dict[str, float]:
    """
    Trains, evaluates after every epoch, keeps the best model, and goes on from the last checkpoint if there is one.

    Args:
        accelerator (`Accelerator`):
            From [`build_accelerator`].
        args ([`LoopArguments`]), optimization_args ([`OptimizationArguments`]):
            Options of the run.
        model (`PreTrainedModel`):
            Any PIIP model.
        train_dataset, eval_dataset ([`ImageDataset`]):
            Model inputs with labels.
        collate_fn (`Callable`):
            Makes a batch out of examples.
        image_processor (`BaseImageProcessor`):
            Saved beside the model.
        evaluate_model (`Callable`):
            Takes the model and the batches of this process and returns the results of all processes.
        metric_for_best_model (`str`):
            Which of the results decides; more is better.
        draw_previews (`Callable`, *optional*):
            Takes the model in evaluation mode and returns a picture of predictions.

    Returns:
        `dict[str, float]`: the last results as `eval_<name>` and the best value of the metric as `best_<name>`.
    """
    output_dir = Path(args.output_dir)
    loading = {"collate_fn": collate_fn, "num_workers": args.dataloader_num_workers}
    train_dataloader = DataLoader(train_dataset, args.per_device_train_batch_size, shuffle=True, **loading)
    eval_dataloader = DataLoader(eval_dataset, args.per_device_eval_batch_size, **loading)

    # Optimizer, schedule and moving average
    model = synchronize_batch_norm(model, accelerator.device, accelerator.num_processes)
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
    scheduler = build_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, max_steps, optimization_args.lr_drops
    )
    progress = Progress()
    accelerator.register_for_checkpointing(scheduler, progress)
    accelerator.init_trackers("runs", {"learning_rate": args.learning_rate, "max_steps": max_steps})
    resume(accelerator, args, progress, max_steps)

    # Training
    show = {"unit": "step", "disable": not accelerator.is_main_process}
    bar = tqdm(total=max_steps, initial=progress.step, desc="Training", **show)
    loss_meter = LossMeter()
    while progress.epoch * steps_per_epoch < max_steps:
        loss_meter.reset()
        steps = train_epoch(accelerator, args, model, optimizer, scheduler, train_dataloader, progress, loss_meter)
        for _ in itertools.islice(steps, max_steps - progress.step):
            bar.update()
            if ema is not None:
                ema.update_parameters(accelerator.unwrap_model(model))
            if progress.step % args.logging_steps == 0 or progress.step == max_steps:
                losses = loss_meter.compute(accelerator.gather)
                bar.set_postfix(loss=f"{losses['loss']:.3f}")
                accelerator.log(losses | {"learning_rate": scheduler.get_last_lr()[0]}, step=progress.step)
            if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, progress.step)
        progress.epoch += 1
        progress.batch = 0

        unwrapped = (accelerator.unwrap_model(model) if ema is None else ema.module).eval()
        # statistics of batch norm differ between processes, where it is not synchronized
        broadcast(list(unwrapped.buffers()))
        with torch.no_grad():
            progress.results = evaluate_model(unwrapped, eval_dataloader)
        accelerator.log(progress.results, step=progress.step)
        result = progress.results[metric_for_best_model]
        accelerator.print(f"Epoch {progress.epoch}: {metric_for_best_model} {result:.4f}")
        if draw_previews is not None and accelerator.is_main_process:
            picture = save_preview(draw_previews(unwrapped), output_dir, progress.step)
            accelerator.get_tracker("tensorboard").log_images(
                {"previews": np.asarray(picture)[None]}, step=progress.step, dataformats="NHWC"
            )
        if result > progress.best:
            progress.best = result
            unwrapped.save_pretrained(output_dir, is_main_process=accelerator.is_main_process)
            if accelerator.is_main_process:
                image_processor.save_pretrained(output_dir)
        if not args.checkpointing_steps:
            save_checkpoint(accelerator, output_dir, progress.step)

    bar.close()
    results = {f"eval_{name}": value for name, value in progress.results.items()}
    results[f"best_{metric_for_best_model}"] = progress.best
    if accelerator.is_main_process:
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    accelerator.end_training()
    return results
