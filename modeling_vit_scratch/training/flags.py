"""Flags to a Recipe: a named recipe, a file of flags over it, the command line over both."""

import argparse
import errno
import json
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError

from ..errors import UserError, unknown
from .overrides import merged_overrides
from .recipe import COUNTED_LENGTHS, FIELDS, GROUPS, Recipe
from .recipes import FINETUNING, RECIPES

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = ("can't allocate memory", "MPS backend out of memory")  # of torch's plain RuntimeErrors
PEER_IS_GONE = (  # gloo's and NCCL's words where a process waits for one that has ended
    "Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe",
)  # fmt: skip
LENGTHS = (*COUNTED_LENGTHS, "time_budget")
# what timm's train.py and transformers' examples call what has another name here
OTHER_NAMES = {
    "aa": "auto_augment", "batch_size": "train_batch_size", "checkpoint_hist": "save_total_limit",
    "checkpointing_steps": "save_steps", "clip_grad": "max_grad_norm", "cutmix": "cutmix_alpha",
    "data_dir": "train_dir", "dataset": "dataset_name", "decay_milestones": "lr_milestones", "decay_rate": "lr_gamma",
    "distill_loss_weight": "distillation_alpha", "distillation_tau": "distillation_temperature",
    "epochs": "num_train_epochs", "eval_metric": "metric_for_best_model",
    "eval_split_name": "validation_split_name", "evaluation_strategy": "eval_strategy",
    "experiment": "output_dir", "grad_accum_steps": "gradient_accumulation_steps",
    "grad_checkpointing": "gradient_checkpointing", "hflip": "horizontal_flip_prob", "img_size": "image_size",
    "initial_checkpoint": "model_name_or_path", "input_size": "image_size", "kd_model_name": "teacher_name_or_path",
    "kd_temperature": "distillation_temperature", "log_interval": "logging_steps", "logging_dir": "output_dir",
    "lr": "learning_rate", "lr_scheduler": "lr_scheduler_type", "max_train_steps": "max_steps", "mean": "image_mean",
    "mixup": "mixup_alpha", "model_ema": "ema_decay", "model_ema_decay": "ema_decay",
    "num_warmup_steps": "warmup_steps", "opt": "optim", "opt_eps": "adam_epsilon", "output": "output_dir",
    "pretrained": "model_name_or_path", "ratio": "random_resized_crop_ratio", "recovery_interval": "save_steps",
    "reprob": "random_erasing_prob", "resume": "resume_from_checkpoint", "sched": "lr_scheduler_type",
    "smoothing": "label_smoothing_factor", "std": "image_std", "teacher_model": "teacher_name_or_path",
    "teacher_model_name_or_path": "teacher_name_or_path", "teacher_path": "teacher_name_or_path",
    "torchcompile": "torch_compile", "train_split": "train_split_name", "val_split": "validation_split_name",
    "validation_batch_size": "eval_batch_size", "vflip": "vertical_flip_prob",
    "workers": "dataloader_num_workers",
}  # fmt: skip
_FIELD_OF_NETWORK = "a field of the network: use --config_overrides"
_MACHINE = "belongs to the machine"
_TOKEN = "a command line is seen by all users of the machine: set HF_TOKEN or run `hf auth login`"
_GLOBAL = "batches are global, each process takes its share"
_NEW_OR_NOT = "use --preset for a new network, --model_name_or_path for a pretrained one"
REFUSED = {
    **{theirs: f"use --{ours}" for theirs, ours in OTHER_NAMES.items()},
    "amp": f"use `accelerate launch --mixed_precision bf16`: precision {_MACHINE}",
    "auto_find_batch_size": "use --gradient_accumulation_steps: the same steps, in parts that fit",
    "bf16": f"use `accelerate launch --mixed_precision bf16`: precision {_MACHINE}",
    "cache_dir": "set HF_HOME or HF_DATASETS_CACHE",
    "deepspeed": "not supported; `accelerate launch --use_fsdp` shares parameters out",
    "device": f"the launcher chooses it (`accelerate launch --cpu`): it {_MACHINE}",
    "do_eval": "evaluation is part of training; --train_val_split 0 leaves it out",
    "do_train": "training is what this command does",
    "drop": f"{_FIELD_OF_NETWORK} hidden_dropout_prob=0.1, which acts in each layer",
    "drop_path": f"{_FIELD_OF_NETWORK} drop_path_rate=0.1",
    "drop_path_rate": f"{_FIELD_OF_NETWORK} drop_path_rate=0.1",
    "epoch_repeats": "use --num_train_epochs, or --aug_repeats for the same image several times in a batch",
    "fp16": f"use `accelerate launch --mixed_precision fp16`: precision {_MACHINE}",
    "fsdp": f"use `accelerate launch --use_fsdp`: how parameters are shared out {_MACHINE}",
    "gp": f"{_FIELD_OF_NETWORK} pooling=mean",
    "hub_token": _TOKEN,
    "ignore_mismatched_sizes": "not needed: a new head takes the place of one for other classes",
    "in_chans": "the data tell the number of channels",
    "kd_distill_type": "the teacher's logits are learned; --distillation_type says in which way",
    "local_rank": "the launcher sets it",
    "log_wandb": "use --report_to wandb",
    "min_lr": "use --min_lr_rate, a share of the highest rate",
    "model": _NEW_OR_NOT,
    "model_type": _NEW_OR_NOT,
    "no_cuda": "use `accelerate launch --cpu`",
    "num_classes": "the data tell the number of classes",
    "num_labels": "the data tell the number of classes",
    "opt_betas": "use --adam_beta1 and --adam_beta2",
    "patch_size": f"{_FIELD_OF_NETWORK} patch_size=8",
    "per_device_eval_batch_size": f"use --eval_batch_size: {_GLOBAL}",
    "per_device_train_batch_size": f"use --train_batch_size: {_GLOBAL}",
    "remove_unused_columns": "not needed: only the columns of images and labels are read",
    "run_name": "a run is named as the folder of --output_dir, in wandb too",
    "scale": "use --random_resized_crop_scale, the smallest share of an image's area",
    "task_loss_weight": "use --distillation_alpha, the teacher's share of the loss; labels have the rest",
    "token": _TOKEN,
    "trust_remote_code": "not needed: weights are read, no code of a repository is run",
    "use_cpu": "use `accelerate launch --cpu`",
    "val_interval": "use --eval_strategy epoch, or --eval_steps",
    "warmup_epochs": "use --warmup_steps; under 1 it is a share of all steps",
    "warmup_ratio": "use --warmup_steps; under 1 it is a share of all steps",
    "with_tracking": "use --report_to",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line: no usage, no exit of its own."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:] + ". --help lists the flags.")


def build_parser() -> Parser:
    """The parser of every field of Recipe, grouped by subject, without abbreviations and without defaults."""
    parser = Parser(
        prog="run_train.py",
        description="Trains a Vision Transformer, scores it and saves it as a Hub repository.",
        epilog=f"Recipes: {', '.join(RECIPES)}. A flag overrides the recipe; in brackets: the value if none does.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups[GROUPS[0]].add_argument("--config", metavar="FILE", help="YAML or JSON file of these flags")
    for name, item in FIELDS.items():
        text = item.metadata["help"]
        default = "" if item.default is None else f" [{item.default}]"
        options: dict[str, Any] = {"help": text + default, "dest": name, "metavar": _metavar(item)}
        if _base_type(item.type) is bool:
            options |= {"nargs": "?", "const": "true"}  # --streaming alone means true, as in HfArgumentParser
        groups[item.metadata["group"]].add_argument(f"--{name}", **options)
    return parser


def _metavar(item: Any) -> str:
    if "choices" in item.metadata:
        return "{" + ",".join(item.metadata["choices"]) + "}"
    if item.name == "recipe":
        return "{" + ",".join(RECIPES) + "}"
    kind = _base_type(item.type)
    return {bool: "true|false", tuple: "X,Y,Z"}.get(kind, kind.__name__.upper())


def _base_type(annotation: Any) -> type:
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def parse_value(name: str, value: Any) -> Any:
    """The value of field `name`, from a word of the command line or from YAML. Raises UserError if it does not fit."""
    annotation = FIELDS[name].type
    kind = _base_type(annotation)
    optional = isinstance(annotation, types.UnionType)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    is_pair = isinstance(value, (list, tuple)) or "," in str(value)
    try:
        if is_pair and kind is int and tuple[int, int] in typing.get_args(annotation):
            height, width = value if isinstance(value, (list, tuple)) else value.split(",")
            return int(height), int(width)
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if kind is tuple:
            parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
            return tuple(float(part) for part in parts)
        if isinstance(value, (bool, list, dict)) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, OverflowError, TypeError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", tuple: "numbers with commas"}
        two = ", or height,width" if tuple[int, int] in typing.get_args(annotation) else ""
        raise UserError(f"--{name} takes {expected.get(kind, 'text')}{two}, got {value!r}.") from None


def parse_arguments(arguments: list[str]) -> tuple[Recipe, frozenset[str]]:
    """The recipe that the command line asks for, and the names of the fields that a person set.

    Raises UserError for an unknown flag or recipe, a value of the wrong kind or range, and flags that exclude others.
    """
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if argument.startswith("--") and (known := name.replace("-", "_")) in REFUSED:
            raise UserError(f"--{name}: {REFUSED[known]}.")
    values, strangers = build_parser().parse_known_args(arguments)
    if strangers:
        word = strangers[0]
        if word.startswith("--"):
            flags = [f"--{name}" for name in ("config", *FIELDS)]
            raise unknown("flag", word.partition("=")[0], flags, "--help lists the flags.")
        raise UserError(f"{word!r} is not a flag; flags begin with -- and --help lists them.")
    words = dict(vars(values))
    file = words.pop("config", None)
    in_file = _read_config(file) if file else {}
    written = {**in_file, **words}
    _refuse_several_lengths(words, "the command line")
    written = {name: value for name, value in written.items() if name not in LENGTHS or value is not None}
    if any(name in words for name in LENGTHS):  # the command line over the file
        written = {name: value for name, value in written.items() if name not in LENGTHS or name in words}
    chosen = {name: parse_value(name, value) for name, value in written.items()}
    name = "config_overrides"
    if name in in_file and chosen.get(name) is not None:  # a field that both name is the command line's
        chosen[name] = merged_overrides(parse_value(name, in_file[name]), chosen[name])
    if "recipe" not in chosen and chosen.get("model_name_or_path") is not None:
        chosen["recipe"] = "finetune"
    elif "recipe" not in chosen and chosen.get("train_dir") is not None:
        chosen["recipe"] = "folder"
    name = chosen.get("recipe", "digits")
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return combine(RECIPES[name], chosen), frozenset(chosen) - {"recipe"}


def combine(recipe: Recipe, chosen: dict[str, Any]) -> Recipe:
    """The recipe with the chosen fields over it; one kind of data or of length replaces the recipe's other, fields of
    config_overrides join the recipe's unless a checkpoint is fine-tuned, and the recipe finetune takes what goes with
    --finetune."""
    changes = dict(chosen)
    if recipe.recipe == "finetune":
        changes = FINETUNING.get(chosen.get("finetune", recipe.finetune).partition(":")[0], {}) | changes
    if chosen.get("train_dir") is not None:
        if chosen.get("dataset_name") is not None:
            raise UserError("--train_dir and --dataset_name both name the training images: give one of them.")
        changes["dataset_name"] = None
    if chosen.get("config_overrides") is not None and chosen.get("model_name_or_path") is None:
        changes["config_overrides"] = merged_overrides(recipe.config_overrides, chosen["config_overrides"])
    if any(chosen.get(name) is not None for name in LENGTHS):
        changes |= {name: None for name in LENGTHS if chosen.get(name) is None}
    return recipe.replace(**changes)


def _refuse_several_lengths(values: dict[str, Any], where: str):
    given = [f"--{name}" for name in LENGTHS if values.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} ({where}) each say how long to train: give one of them.")


def _read_config(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--config {file}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML or JSON: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} must hold flags and their values, such as `learning_rate: 1e-3`.")
    for name in values:
        if name in REFUSED:
            raise UserError(f"--config {file}: {name}: {REFUSED[name]}.")
        if name not in FIELDS:
            raise unknown(f"flag in {file}", name, FIELDS)
    _refuse_several_lengths(values, f"--config {file}")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Trains as the command line says. The exit code: 0 done, 2 something to mend, 3 stopped by a signal and saved."""
    from .loop import train
    from .time_budget import command_began

    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: train(*parse_arguments(arguments), began=command_began()))


def exit_code(act: Callable[[], object]) -> int:
    """The exit code of a command, its errors said in one line: 0 done, 2 something to mend, 3 stopped by a signal."""
    from ..results.record import TOKEN
    from .loop import Interrupted

    try:
        act()
    except UserError as error:
        if error.met_alone or os.environ.get("LOCAL_RANK", "0") == "0":
            text = TOKEN.sub("hf_***", " ".join(str(error).split()))
            print(f"error: {text}", file=sys.stderr, flush=True)
        return 2
    except (RuntimeError, MemoryError) as error:
        if (known := _known(error)) is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        return 2
    except (OSError, SafetensorError) as error:  # written besides checkpoints: metrics, scores, the report, model/
        if "No space left" not in str(error) and getattr(error, "errno", None) not in FULL:
            raise
        text = " ".join(str(error).split())
        print(f"error: {text}. Make room and start the same command again: it goes on.", file=sys.stderr, flush=True)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        return 3
    except KeyboardInterrupt:  # outside of training's steps
        print("interrupted; a run goes on from its last checkpoint, if there is one.", file=sys.stderr, flush=True)
        return 3
    return 0


def _known(error: RuntimeError | MemoryError) -> UserError | None:
    """What to say where it is clear what the error means, else None."""
    from ..data.loading import lost_worker

    text = str(error)
    if (lacking := out_of_memory(error)) is not None:
        return lacking
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(sign in text for sign in PEER_IS_GONE):
        return UserError(
            "Another process has stopped. Its own message says why; one without was killed, often for memory."
        )
    return lost_worker(error)


def out_of_memory(error: Exception) -> UserError | None:
    """What to say where the error is that an allocation failed, on any device, else None."""
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(sign in text for sign in NO_MEMORY):
        return None
    what = text.rpartition("allocate memory: ")[2].partition(".")[0] or "no more is there"
    return UserError(
        f"Out of memory ({what}). Fewer images at once need less: --gradient_accumulation_steps takes the same steps "
        "in parts; or lower --train_batch_size, --eval_batch_size or predict's --batch_size, or take "
        "--gradient_checkpointing true, smaller images or a smaller network."
    )
