# Copyright 2026 The PIIP for Transformers authors. MIT license.
"""
What the training scripts share: arguments, loading of models, parameter groups with layer-wise learning rates, the
moving average of the weights, previews, and the [`~transformers.Trainer`] around them. Needs the `train` extra.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType
from transformers.utils import ModelOutput, logging

from .configuration_piip import PiipConfig
from .data import ImageDataArguments
from .image_processing_piip import PiipImageProcessor


logger = logging.get_logger(__name__)


# Arguments


@dataclass
class ModelArguments:
    """Which PIIP model is trained or evaluated."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Saved folder or Hub id of any PIIP checkpoint to start from or to evaluate."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch: a config.json or a folder with one, such as configuration/<variant>."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the Hub checkpoint."})
    drop_path_rate: list[float] | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth of the branches instead of the configured one: one rate, or one per branch from "
            "the highest to the lowest resolution."
        },
    )
    interaction_drop_path_rate: float | None = field(
        default=None, metadata={"help": "Stochastic depth of the interactions instead of the configured one."}
    )

    def __post_init__(self):
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError(
                "Say which model: either --model_name_or_path (a checkpoint) or --config_name (from scratch), got "
                f"--model_name_or_path {self.model_name_or_path} and --config_name {self.config_name}."
            )


@dataclass
class OptimizationArguments:
    """Learning rates of the parts of a PIIP model, and the moving average of its weights."""

    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Factor of the learning rate per layer of a branch, from the last down to the patches."},
    )
    new_module_lr_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of what pretrained branches do not bring (interactions, merge, heads), relative to "
            "--learning_rate (official classification: 10)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save a moving average of the weights with this decay, for example 0.9999."},
    )
    lr_drops: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Shares of the training after which the learning rate falls to a tenth. Used with "
            "--lr_scheduler_type constant_with_warmup."
        },
    )

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay must be above 0 and at most 1 (no decay), got {self.layer_decay}.")
        if self.new_module_lr_ratio <= 0:
            raise ValueError(f"--new_module_lr_ratio must be positive, got {self.new_module_lr_ratio}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be between 0 and 1, got {self.ema_decay}.")
        if not all(0 < share <= 1 for share in self.lr_drops):
            raise ValueError(f"--lr_drops needs shares above 0 and up to 1, got {self.lr_drops}.")


@dataclass
class PiipTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the defaults of the scripts of this repository."""

    output_dir: str = field(default="outputs", metadata={"help": "Folder for the model, checkpoints, logs, results."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of AdamW, without biases and one-dimensional parameters."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: 'no', 'steps' or 'epoch'."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint: 'no', 'steps', 'epoch' or 'best'."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep this many checkpoints; the best and the last one always stay."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Save the best model by --metric_for_best_model, not the last one."}
    )
    logging_steps: float = field(default=20, metadata={"help": "Log every so many steps; below 1, a share of all."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where the logs go, for example 'tensorboard', 'wandb' or 'none'."}
    )

    def __post_init__(self):
        super().__post_init__()
        # columns mean nothing to data that is processed on the fly
        self.remove_unused_columns = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.label_smoothing_factor != 0:
            raise ValueError("Use --smoothing of the classification scripts instead of --label_smoothing_factor.")
        if not self.do_train and not self.do_eval:
            raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
        if self.do_predict:
            raise ValueError("--do_predict is not for this script: use `transformers.pipeline` on the saved model.")


def parse_args(argument_classes: tuple, argv: list[str] | None = None, description: str | None = None) -> tuple:
    """
    Parses a command line. A JSON or YAML file of options may come first; options after it take precedence.

    Args:
        argument_classes (`tuple`):
            Dataclasses of options.
        argv (`list[str]`, *optional*):
            Defaults to the command line of the script.
        description (`str`, *optional*):
            First lines of `--help`.

    Returns:
        `tuple`: one object per class.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = read_options(argv[0]) + argv[1:]
    parser = HfArgumentParser(argument_classes, description=description)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def read_options(file: str) -> list[str]:
    """The options of a JSON or YAML file as they would stand on a command line."""
    text = Path(file).read_text(encoding="utf-8")
    options = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"{file} must hold options and values, like {{'learning_rate': 1e-4}}, got {options!r}.")
    argv = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            argv += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return argv


# Models


def load_config(args: ModelArguments) -> PiipConfig:
    """The configuration of the checkpoint, or of the model to train from scratch, with the drop path of `args`."""
    source = args.model_name_or_path or args.config_name
    model_type = PiipConfig.get_config_dict(source, revision=args.model_revision)[0].get("model_type")
    if model_type != PiipConfig.model_type:
        raise ValueError(f"{source} is the configuration of a model of type '{model_type}', not of a PIIP model.")
    config = PiipConfig.from_pretrained(source, revision=args.model_revision)
    if args.drop_path_rate is not None:
        rates = args.drop_path_rate * len(config.branches) if len(args.drop_path_rate) == 1 else args.drop_path_rate
        if len(rates) != len(config.branches) or not all(0 <= rate < 1 for rate in rates):
            raise ValueError(
                f"--drop_path_rate needs one rate from 0 to below 1, or {len(config.branches)} of them (one per "
                f"branch), got {args.drop_path_rate}."
            )
        for branch, rate in zip(config.branches, rates):
            branch.drop_path_rate = rate
    if args.interaction_drop_path_rate is not None:
        if not 0 <= args.interaction_drop_path_rate < 1:
            raise ValueError(
                f"--interaction_drop_path_rate must be from 0 to below 1, got {args.interaction_drop_path_rate}."
            )
        config.interaction_drop_path_rate = args.interaction_drop_path_rate
    return config


def get_model_labels(args: ModelArguments, config: PiipConfig) -> list[str] | None:
    """Class names of a checkpoint in the order of its ids; `None` for a model from scratch."""
    if args.model_name_or_path is None:
        return None
    return [config.id2label[class_id] for class_id in range(config.num_labels)]


def load_model(
    model_class: type[PreTrainedModel],
    args: ModelArguments,
    config: PiipConfig,
    label_names: list[str],
    training: bool,
) -> PreTrainedModel:
    """
    The model of `args` for the classes of the data.

    Args:
        model_class (`type`):
            For example [`PiipForImageClassification`].
        args ([`ModelArguments`]):
            The checkpoint, if there is one.
        config ([`PiipConfig`]):
            From [`load_config`]; gets the class names.
        label_names (`list[str]`):
            Names of the classes in the order of their ids.
        training (`bool`):
            Whether the classifier may be made anew for another number of classes.
    """
    model_labels = get_model_labels(args, config)
    same_number = model_labels is not None and len(model_labels) == len(label_names)
    if not training and not same_number:
        raise ValueError(
            f"The model has {config.num_labels} classes, the data {len(label_names)} others "
            f"({', '.join(label_names[:5])}, ...): fine-tune it with --do_train first."
        )
    if same_number and model_labels != label_names:
        logger.warning(
            f"The classes of the data ({', '.join(label_names[:5])}, ...) have other names than those of the model "
            f"({', '.join(model_labels[:5])}, ...): they are taken to be the same in this order."
        )
    if training:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: class_id for class_id, name in enumerate(label_names)}
    if args.model_name_or_path is None:
        return model_class(config)
    return model_class.from_pretrained(
        args.model_name_or_path, config=config, revision=args.model_revision, ignore_mismatched_sizes=training
    )


def load_image_processor(
    args: ModelArguments,
    config: PiipConfig,
    processor_class: type[PiipImageProcessor] = PiipImageProcessor,
    **kwargs,
) -> PiipImageProcessor:
    """The processor saved beside the model or its configuration, else one of the image size of the model."""
    source = args.model_name_or_path or args.config_name
    if args.model_name_or_path is not None or os.path.isfile(os.path.join(source, "preprocessor_config.json")):
        return processor_class.from_pretrained(source, revision=args.model_revision, **kwargs)
    size = config.image_size
    return processor_class(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **kwargs)


def synchronize_batch_norm(model: nn.Module, device: torch.device, num_processes: int) -> nn.Module:
    """Lets batch norm see the images of all GPUs, as in the official training of heads that have it."""
    if num_processes > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# Learning rates


def get_lr_scale(name: str, config: PiipConfig, layer_decay: float = 1.0, new_module_lr_ratio: float = 1.0) -> float:
    r"""
    Learning rate of a parameter relative to the learning rate of the run, by the official rule: `layer_decay` to the
    power of the distance from the top. Embeddings are as far away as the largest network is deep, and one more; layer
    `k` of a branch with fewer layers counts as the layer of the largest network at the same relative depth.

    Args:
        name (`str`):
            Name of the parameter in any PIIP model.
        config ([`PiipConfig`]):
            Architecture of the model.
        layer_decay (`float`, *optional*, defaults to 1.0):
            Factor per layer.
        new_module_lr_ratio (`float`, *optional*, defaults to 1.0):
            Scale of every parameter outside the branches.
    """
    # the merges have modules called "branches" too, but not right below the model
    match = re.search(r"(?:^|\bpiip\.)branches\.(\d+)\.(?:layers\.(\d+)\.)?", name)
    if match is None:
        return new_module_lr_ratio
    depths = [sum(branch.stages) for branch in config.branches]
    layer_id = 0 if match[2] is None else (int(match[2]) + 1) * depths[-1] // depths[int(match[1])]
    return layer_decay ** (depths[-1] + 1 - layer_id)


def get_parameter_groups(
    model: nn.Module, args: OptimizationArguments, learning_rate: float, weight_decay: float
) -> list[dict]:
    """
    Parameter groups for any optimizer: one per learning rate (see [`get_lr_scale`]), with and without weight decay.
    Biases and one-dimensional parameters do not decay; the scalar weights of the merge do, as in the official code.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = get_lr_scale(name, model.config, args.layer_decay, args.new_module_lr_ratio)
        decays = not name.endswith(".bias") and (parameter.ndim > 1 or parameter.numel() == 1)
        group = {"params": [], "lr": learning_rate * scale, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    # progress bars and logs show the rate of the first group: that of the top of the branches
    return [groups[key] for key in sorted(groups, key=lambda key: (abs(key[0] - args.layer_decay), key))]


def build_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_drops: list[float],
    scheduler_specific_kwargs: dict | None = None,
) -> torch.optim.lr_scheduler.LRScheduler:
    """`get_scheduler` of Transformers, and "constant_with_warmup" in steps, which it does not have."""
    if name != SchedulerType.CONSTANT_WITH_WARMUP or not lr_drops:
        return get_scheduler(name, optimizer, num_warmup_steps, num_training_steps, scheduler_specific_kwargs)

    def get_factor(step: int) -> float:
        num_drops = sum(step >= share * num_training_steps for share in lr_drops)
        warmup = min(step / num_warmup_steps, 1) if num_warmup_steps else 1
        return warmup * 0.1**num_drops

    return torch.optim.lr_scheduler.LambdaLR(optimizer, get_factor)


# Terms of the loss


class LossMeter:
    """Means of the loss and of its terms (`loss_dict`) over several batches."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sums = {}
        self.num_batches = 0

    def add(self, outputs: ModelOutput):
        """Takes the output of a model for a batch."""
        for name, value in ({"loss": outputs.loss} | (outputs.get("loss_dict") or {})).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.num_batches += 1

    def compute(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Means over the batches since the last call, of all processes. `gather` gets a tensor `(num_terms,)` and returns
        those of all processes in one dimension.
        """
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.num_batches for name in names])
        self.reset()
        return dict(zip(names, gather(means).view(-1, len(names)).mean(dim=0).tolist()))


# Moving average of the weights


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """
    Exponential moving average of the weights of a model; call `update_parameters(model)` after every step. It forgets
    faster in the beginning, so that it is of use in short trainings too.
    """

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor):
        step = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averaged, current, num_averaged)

    return AveragedModel(model, multi_avg_fn=average)


class EMACallback(TrainerCallback):
    r"""
    Evaluates and saves a moving average of the weights in [`~transformers.Trainer`]. The weights of the training
    itself lie beside it in every checkpoint, so that training resumes exactly.

    Args:
        decay (`float`):
            Share of the old average that a step keeps.
        resume_from_checkpoint (`str`, *optional*):
            The checkpoint that is also given to `Trainer.train`.
    """

    training_weights_name = "training_weights.pt"

    def __init__(self, decay: float, resume_from_checkpoint: str | None = None):
        self.decay = decay
        self.resume_from_checkpoint = resume_from_checkpoint
        self.ema = None
        # whether the model holds the average, and `ema` the weights of the training
        self.swapped = False

    @torch.no_grad()
    def swap(self, model: nn.Module):
        for weight, other in zip(model.parameters(), self.ema.module.parameters()):
            held = weight.clone()
            weight.copy_(other)
            other.copy_(held)
        self.swapped = not self.swapped

    def on_train_begin(self, args, state, control, model, **kwargs):
        if args.fsdp or args.deepspeed:
            raise ValueError("--ema_decay works with whole models only: leave it out with FSDP and DeepSpeed.")
        self.ema = build_ema(model, self.decay)
        if self.resume_from_checkpoint is not None:
            file = os.path.join(self.resume_from_checkpoint, self.training_weights_name)
            if not os.path.exists(file):
                raise ValueError(f"{file} is missing: the checkpoint was written without --ema_decay.")
            # the model of the checkpoint is the average
            self.ema.n_averaged.fill_(state.global_step)
            model.load_state_dict(torch.load(file, map_location=args.device, weights_only=True))

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.swapped:
            self.swap(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.ema.update_parameters(model)
        self.swap_for_use(control, model)

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.swap_for_use(control, model)

    def swap_for_use(self, control, model: nn.Module):
        if (control.should_evaluate or control.should_save) and not self.swapped:
            self.swap(model)

    def on_save(self, args, state, control, **kwargs):
        if self.swapped and args.should_save:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            # under its name only when it is whole: it tells that the checkpoint is complete
            unfinished = folder / f".{self.training_weights_name}"
            torch.save(self.ema.module.state_dict(), unfinished)
            unfinished.replace(folder / self.training_weights_name)

    def on_train_end(self, args, state, control, model, **kwargs):
        best_is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not self.swapped and not best_is_loaded:
            self.swap(model)


def seed_step(seed: int, step: int, process_index: int = 0, num_processes: int = 1):
    """
    Seeds what is random inside the model, at the beginning of a step. So it depends on the place in the training only,
    and a resumed run repeats it whatever data loaders and evaluations have drawn meanwhile.
    """
    set_seed(seed + step * num_processes + process_index)


class SeedCallback(TrainerCallback):
    """Makes random choices in model and data depend on the place in the training only; see [`seed_step`]."""

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        seed_step(args.seed, state.global_step, args.process_index, args.world_size)


class PreviewCallback(TrainerCallback):
    r"""
    Draws a picture after every evaluation: as `previews/step-<step>.png` in the output folder, and for TensorBoard.

    Args:
        trainer (`Trainer`):
            The trainer that the callback is for; one of its callbacks writes for TensorBoard.
        draw (`Callable`):
            Takes the model in evaluation mode and returns the picture.
    """

    def __init__(self, trainer: Trainer, draw: Callable[[nn.Module], PIL.Image.Image]):
        self.trainer = trainer
        self.draw = draw

    def on_evaluate(self, args, state, control, model, **kwargs):
        if not state.is_world_process_zero:
            return
        picture = save_preview(self.draw(model.eval()), args.output_dir, state.global_step)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("previews", pil_to_tensor(picture), state.global_step)


def save_preview(picture: PIL.Image.Image, output_dir: str | Path, step: int) -> PIL.Image.Image:
    folder = Path(output_dir, "previews")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"step-{step}.png")
    return picture


# Checkpoints


def find_last_checkpoint(output_dir: str, complete: Callable[[Path], bool] = Path.is_dir) -> str | None:
    """
    The folder `checkpoint-<step>` with the highest step for which `complete` holds. A run that was killed while saving
    leaves a folder that is not complete.
    """
    folders = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdigit() and complete(folder)
    }
    return str(folders[max(folders)]) if folders else None


def get_checkpoint(training_args: PiipTrainingArguments, optimization_args: OptimizationArguments) -> str | None:
    """The checkpoint to go on from: the one that was asked for, else the last one in the output folder."""
    if training_args.resume_from_checkpoint is not None:
        return training_args.resume_from_checkpoint
    names = ["trainer_state.json", *([EMACallback.training_weights_name] if optimization_args.ema_decay else [])]
    checkpoint = find_last_checkpoint(
        training_args.output_dir, lambda folder: all((folder / name).is_file() for name in names)
    )
    if checkpoint is not None:
        logger.warning(f"Resuming from {checkpoint}. To start anew, remove it or name another --output_dir.")
    return checkpoint


# Trainer


def check_splits(splits: dict, training_args: PiipTrainingArguments):
    if training_args.do_train and "train" not in splits:
        raise ValueError("The data has no split to train on: name it with --train_split.")
    if training_args.do_eval and "validation" not in splits:
        raise ValueError(
            "The data has no split to evaluate on: hold out a part of the training split with --train_val_split 0.1, "
            "name one with --eval_split, or switch evaluation off with --eval_strategy no --load_best_model_at_end no."
        )


class PiipTrainer(Trainer):
    r"""
    [`~transformers.Trainer`] with the learning rates and the moving average of [`OptimizationArguments`], that goes on
    from the last checkpoint in its output folder.

    Args:
        model (`PreTrainedModel`):
            Any PIIP model.
        args ([`PiipTrainingArguments`]):
            Options of the run.
        optimization_args ([`OptimizationArguments`]):
            Learning rates and moving average.
        draw_previews (`Callable`, *optional*):
            Makes a picture of predictions after every evaluation, see [`PreviewCallback`].
        kwargs:
            As for [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PiipTrainingArguments,
        optimization_args: OptimizationArguments,
        draw_previews: Callable[[nn.Module], PIL.Image.Image] | None = None,
        **kwargs,
    ):
        optimizer_class, optimizer_options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer_options["params"] = get_parameter_groups(
            model, optimization_args, args.learning_rate, args.weight_decay
        )
        self.lr_drops = optimization_args.lr_drops
        self.checkpoint = get_checkpoint(args, optimization_args) if args.do_train else None
        callbacks = [SeedCallback()]
        if optimization_args.ema_decay is not None:
            callbacks.append(EMACallback(optimization_args.ema_decay, self.checkpoint))
        super().__init__(
            model=model,
            args=args,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=(optimizer_class, optimizer_options),
            **kwargs,
        )
        if draw_previews is not None:
            self.add_callback(PreviewCallback(self, draw_previews))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and not args.do_train:
                # it would write to the current folder
                callback.logging_dir = os.path.join(args.output_dir, "runs", "evaluation")

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.lr_drops:
            self.lr_scheduler = build_scheduler(
                self.args.lr_scheduler_type,
                optimizer or self.optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                self.lr_drops,
                self.args.lr_scheduler_kwargs,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def run(self) -> dict[str, float]:
        """Trains and evaluates as `--do_train` and `--do_eval` say, writes model and results, returns the latter."""
        metrics = {}
        if self.args.do_train:
            metrics = self.train(resume_from_checkpoint=self.checkpoint).metrics
            self.save_model()
            self.log_metrics("train", metrics)
            self.save_metrics("train", metrics)
            self.save_state()
        if self.args.do_eval:
            metrics = self.evaluate()
            self.log_metrics("eval", metrics)
            self.save_metrics("eval", metrics)
        return metrics

    def write_model_card(self, task: str, model_args: ModelArguments, data_args: ImageDataArguments):
        """Writes README.md with the results, and pushes the folder to the Hub if that was asked for."""
        dataset = data_args.dataset_name or Path(data_args.data_dir).resolve().name
        card = {
            "tasks": task,
            "tags": [task, "piip"],
            "dataset": dataset,
            "dataset_tags": dataset,
            "dataset_args": data_args.dataset_config_name or "default",
        }
        # only a Hub id is a model to link to
        source = model_args.model_name_or_path
        self.model.config._name_or_path = self.args.output_dir if source is None or Path(source).exists() else source
        if self.args.push_to_hub:
            self.push_to_hub(**card)
        else:
            self.create_model_card(**card)
