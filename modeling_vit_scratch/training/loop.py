"""train(recipe) -> results: one run from top to bottom.

Every random draw is a function of (seed, purpose, step): a run that is killed and started again repeats none and
misses none. The batch is global; a rank computes its part, and losses are sums over samples divided by the global
batch, so that 1 and 8 processes take the same steps.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import set_seed

from ..data.augmentation import Augmentation, batch_draws, normalise
from ..data.decoding import Decoder, normalisation
from ..data.loading import EvaluationData, TrainingData
from ..data.order import derived_seed
from ..data.sources import Source, open_source
from ..errors import UserError
from ..results.model_card import write_model_card
from ..results.model_folder import save_model_folder
from ..results.plots import write_plots
from ..results.report import write_report
from . import effects
from .checkpointing import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
    step_folder,
)
from .evaluation import Evaluation, evaluate
from .machine import agree, command, commit, first_on_each_node, hardware, start_accelerator, versions
from .network import build_network
from .optimization import OPTIMIZERS, learning_rate_at, parameter_groups
from .recipes import Recipe
from .recording import MetricsFile, Progress, resolve_trackers, score_table, start_trackers
from .run_folder import open_run, write_json

EVALUATIONS_PER_RUN = 10  # at most one an epoch, where --eval_steps does not say


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""


@dataclass
class Position:
    """What a run carries from step to step besides tensors; saved with every checkpoint."""

    step: int = 0
    train_seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None


@dataclass
class Window:
    """Sums of loss and of correct answers since the last training row; on the device, so that no step waits."""

    sums: torch.Tensor
    images: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)


def train(recipe: Recipe, chosen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Trains, evaluates and saves as the recipe says, or goes on where the output folder's run stopped.

    chosen: the fields that a person set; one that could not change this run is an error. Returns what results.json
    holds. Raises UserError for what a person can mend and Interrupted after a signal.
    """
    output_dir = Path(recipe.output_dir or f"outputs/{recipe.recipe}")
    effects.check_recipe(recipe, chosen)
    trackers = resolve_trackers(recipe.report_to)
    accelerator = start_accelerator(trackers, output_dir, recipe.cpu_threads)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # --- data, and the network that fits it
    def open_data() -> Source:
        return open_source(
            recipe.dataset_name, recipe.dataset_config_name, recipe.train_dir, recipe.validation_dir, recipe.test_dir,
            recipe.image_column_name, recipe.label_column_name, recipe.streaming, recipe.train_val_split, recipe.seed,
        )  # fmt: skip

    source = first_on_each_node(accelerator, open_data)  # one download a node
    set_seed(derived_seed(recipe.seed, "initialisation") % 2**32)
    model, processor, loading_report = build_network(recipe, chosen, source)
    crop = recipe.random_resized_crop_scale
    decoder = Decoder(processor, recipe.seed, None if crop is None else (crop, 1.0))
    batch_size, num_samples = recipe.train_batch_size, len(source.splits["train"])
    if batch_size < world_size * (2 if recipe.streaming else 1):
        raise UserError(f"--train_batch_size {batch_size} is too small for {world_size} processes.")
    if recipe.streaming and world_size > recipe.stream_lanes:
        lanes = 2 * world_size
        raise UserError(f"{world_size} processes share {recipe.stream_lanes} lanes: set --stream_lanes {lanes}.")
    total_steps = recipe.max_steps or math.ceil(recipe.num_train_epochs * num_samples / batch_size)
    effects.check_source(recipe, chosen, source, decoder)

    # --- the folder: a new run, one to go on with, or a finished one
    facts = {"mixed_precision": accelerator.mixed_precision, "num_processes": world_size}
    run = agree(accelerator, lambda: open_run(output_dir, recipe, facts))
    if run.results is not None:
        if accelerator.is_main_process and not (output_dir / "report.html").exists():
            _publish(output_dir, run.results)  # the run ended between its scores and its report
        accelerator.print(f"{output_dir} holds this run, finished:\n{score_table(final_scores(run.results))}")
        return run.results
    workers = _num_workers(recipe, source, decoder)
    common = (rank, world_size, workers, device)
    threads = torch.get_num_threads()
    data = TrainingData(
        source, decoder, batch_size, recipe.seed, *common, recipe.stream_lanes, recipe.stream_window, threads
    )
    plain_decoder = Decoder(processor)
    held = {
        name: EvaluationData(source, split, plain_decoder, recipe.eval_batch_size, *common, threads)
        for name, split in source.splits.items()
        if name != "train"
    }
    pixels = normalisation(processor, device)
    augment = Augmentation(
        recipe.horizontal_flip_prob,
        recipe.crop_padding,
        recipe.rotation_degrees,
        recipe.translate_pixels,
        recipe.scale_range,
    )

    # --- optimizer and state
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    groups = parameter_groups(model, recipe.weight_decay)
    parameter_names = [name for group in groups for name in group.names]
    if recipe.torch_compile:
        model.compile()  # in place: parameter names stay as they are
    network = accelerator.prepare(model.to(device))
    optimizer = accelerator.prepare(OPTIMIZERS[recipe.optim](groups, recipe))
    position = Position()
    window = Window(torch.zeros(2, device=device))
    if run.checkpoint is not None:
        tensors, optimizer_state, saved = load_checkpoint(run.checkpoint)
        model.load_state_dict(tensors)
        load_optimizer_tensors(optimizer.optimizer, parameter_names, optimizer_state)
        position = Position(**saved["position"])
        if accelerator.scaler is not None and saved.get("scaler"):
            accelerator.scaler.load_state_dict(saved["scaler"])
        accelerator.print(f"going on from {run.checkpoint}")
        if saved["num_processes"] != world_size:
            accelerator.print(f"with {world_size} process(es); it was written by {saved['num_processes']}")
        window = _restored_window(saved["window"], rank, world_size, device)
    metrics = MetricsFile(output_dir / "metrics.jsonl", accelerator.is_main_process, position.step)
    start_trackers(accelerator, trackers, recipe.to_dict())
    _announce(accelerator, source, model, loading_report, total_steps, batch_size, data, workers)

    def save() -> Path:
        sums = accelerator.gather(window.sums[None]).tolist()  # float32 through JSON and back without loss
        if accelerator.is_main_process:
            state = {
                "window": {"sums": sums, "images": window.images},
                "position": vars(position),
                "num_processes": world_size,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            }
            moments = optimizer_tensors(optimizer.optimizer, parameter_names)
            save_checkpoint(output_dir / "checkpoints", position.step, model.state_dict(), moments, state)
            prune(output_dir / "checkpoints", recipe.save_total_limit, position.best_step)
        accelerator.wait_for_everyone()
        return output_dir / "checkpoints" / step_folder(position.step)

    # --- the steps
    # one process with two parts sums the gradients of the same images as two processes with one part each
    num_parts = -(-recipe.gradient_accumulation_steps // world_size)
    default_interval = max(total_steps / EVALUATIONS_PER_RUN, num_samples / batch_size, 1)
    eval_every = _interval(recipe.eval_steps or default_interval, total_steps)
    save_every = _interval(recipe.save_steps, total_steps)
    progress = Progress(total_steps, position.step, accelerator.is_main_process)
    clock = time.perf_counter()
    network.train()
    with _stop_signals() as stop_requested:
        batches = iter(data.batches(position.step, total_steps))
        for step in range(position.step, total_steps):
            waiting_since = time.perf_counter()
            batch = next(batches).to(device)
            window.waited += time.perf_counter() - waiting_since

            rate = learning_rate_at(
                step, total_steps, recipe.learning_rate, recipe.warmup_steps, recipe.lr_scheduler_type
            )
            for settings in optimizer.param_groups:
                settings["lr"] = rate
            torch.manual_seed(derived_seed(recipe.seed, "dropout", step, rank))
            images = augment(batch.images, batch_draws(recipe.seed, step, batch_size, batch.positions))
            images = normalise(images, *pixels)
            parts = [(images[index::num_parts], batch.labels[index::num_parts]) for index in range(num_parts)]
            parts = [part for part in parts if len(part[0])]
            for index, (part, labels) in enumerate(parts):
                with accelerator.no_sync(network) if index + 1 < len(parts) else nullcontext():
                    logits = network(pixel_values=part).logits.float()
                    loss_sum = torch.nn.functional.cross_entropy(
                        logits, labels, reduction="sum", label_smoothing=recipe.label_smoothing_factor
                    )
                    # gradients are averaged over ranks: times their number makes it the mean over the global batch
                    accelerator.backward(loss_sum * (world_size / batch_size))
                window.sums += torch.stack((loss_sum.detach(), (logits.argmax(dim=1) == labels).sum()))
            grad_norm = accelerator.clip_grad_norm_(network.parameters(), recipe.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            window.images += batch_size
            position.step = step + 1
            progress.advance()

            if position.step % recipe.logging_steps == 0 or position.step == total_steps:
                row = _training_row(accelerator, window, position.step, batch_size, num_samples, rate, grad_norm)
                # under fp16 an infinite gradient is the scaler's to skip; NaN and Infinity are no JSON
                if accelerator.scaler is not None and not math.isfinite(row["grad_norm"]):
                    row["grad_norm"] = None
                elif not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                    raise UserError(
                        f"The loss is {row['loss']} and the gradient norm {row['grad_norm']} at step {position.step}, "
                        f"rate {rate:.2e}; earlier checkpoints: {output_dir / 'checkpoints'}. Lower --learning_rate."
                    )
                metrics.append(row)
                accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=position.step)
                progress.show(row)
                window = Window(torch.zeros(2, device=device))

            paused = time.perf_counter()
            position.train_seconds += paused - clock
            last = position.step == total_steps
            if "validation" in held and (position.step % eval_every == 0 or last):
                evaluation = evaluate(network, held["validation"], pixels, accelerator, len(source.class_names))
                _record_evaluation(evaluation, position, recipe, metrics, accelerator, progress)
            is_best = recipe.load_best_model_at_end and position.best_step == position.step
            stopping = _agreed(stop_requested, accelerator, position.step)
            if is_best or position.step % save_every == 0 or last or stopping:
                folder = save()
                if stopping and not last:
                    progress.close()
                    raise Interrupted(f"stopped by a signal; saved {folder}. The same command goes on from there.")
            clock = time.perf_counter()
            window.started += clock - paused
    progress.close()

    # --- final scores, once, of the weights that are published
    weights = "last"
    if recipe.load_best_model_at_end and position.best_step is not None:
        best, _, _ = load_checkpoint(output_dir / "checkpoints" / step_folder(position.best_step))
        model.load_state_dict(best)
        weights = f"best at step {position.best_step}"
    finals = {
        name: evaluate(network, split, pixels, accelerator, len(source.class_names)) for name, split in held.items()
    }
    results = _results(recipe, chosen, accelerator, source, model, finals, position, weights)
    if accelerator.is_main_process:
        # under autocast the weights are float32 all along; DDP and compile leave `model` itself as it was
        save_model_folder(output_dir / "model", model, model.state_dict(), processor)
        _publish(output_dir, results)
    accelerator.print(
        f"{score_table(final_scores(results))}\n{output_dir} holds the run, {output_dir}/model the model."
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


# ---------------------------------------------------------------- the parts of a run


def _num_workers(recipe: Recipe, source: Source, decoder: Decoder) -> int:
    """Processes that decode: as asked; else none for small images, which decode faster than they train, and for
    photographs a share of the cores."""
    if recipe.dataloader_num_workers is not None:
        return recipe.dataloader_num_workers
    if decoder.crop_scale is None and not decoder.processor.do_center_crop:
        return 0
    return min(8, torch.get_num_threads())


def _announce(accelerator, source: Source, model, loading_report, total_steps, batch_size, data, workers):
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in source.splits.items())
    how = "streamed" if source.streaming else "resident" if data.resident is not None else "read at random"
    decoding = "" if data.resident is not None else f", {workers} decoding worker(s)"
    accelerator.print(f"{source.name}: {sizes} images of {len(source.class_names)} classes, {how}{decoding}")
    if loading_report is not None:
        accelerator.print(str(loading_report))
    epochs = total_steps * batch_size / len(source.splits["train"])
    accelerator.print(
        f"{model.num_parameters():,} parameters, {total_steps:,} steps of {batch_size} images: {epochs:.4g} epochs",
        flush=True,
    )


def _interval(steps: float, total_steps: int) -> int:
    """An interval in steps; a number under 1 is a share of all steps."""
    return max(1, round(steps if steps >= 1 else steps * total_steps))


def _restored_window(saved: dict[str, Any], rank: int, world_size: int, device: torch.device) -> Window:
    """The window as this rank left it; with another number of processes, the first one takes all of it."""
    sums = torch.tensor(saved["sums"], device=device)
    whole = sums.sum(dim=0) * (rank == 0)
    return Window(sums[rank] if len(sums) == world_size else whole, saved["images"])


def _training_row(accelerator: Accelerator, window: Window, step, batch_size, num_samples, rate, grad_norm) -> dict:
    """The metrics row of the steps since the last one: means over their images, over all processes."""
    sums = accelerator.reduce(window.sums, reduction="sum")
    loss, correct = (sums / window.images).tolist()
    seconds = time.perf_counter() - window.started
    return {
        "step": step,
        "epoch": round(step * batch_size / num_samples, 4),
        "loss": loss,
        "learning_rate": rate,
        "train_accuracy": correct,
        "grad_norm": float(grad_norm),
        "images_per_second": round(window.images / seconds, 1),
        "data_wait": round(window.waited / seconds, 4),
    }


def _record_evaluation(evaluation: Evaluation, position: Position, recipe: Recipe, metrics, accelerator, progress):
    row = {f"eval_{name}": value for name, value in evaluation.scores.items()}
    metrics.append({"step": position.step, **row})
    accelerator.log(row, step=position.step)
    progress.say(f"step {position.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    value = evaluation.scores[recipe.metric_for_best_model]
    if recipe.metric_for_best_model == "loss":
        value = -value
    if position.best_value is None or value > position.best_value:
        position.best_value, position.best_step = value, position.step


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C add to; a second Ctrl-C is not caught."""
    received: list[int] = []

    def remember(number: int, _frame: Any):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _agreed(received: list[int], accelerator: Accelerator, step: int) -> bool:
    """Whether to stop after this step: processes get a signal at different steps and must leave at the same one."""
    if accelerator.num_processes == 1:
        return bool(received)
    if step % 10:
        return False
    return bool(accelerator.reduce(torch.tensor(len(received), device=accelerator.device), reduction="sum"))


def final_scores(results: dict[str, Any]) -> dict[str, float]:
    """The scores among the fields of results.json: test_accuracy and its like."""
    return {n: v for n, v in results.items() if n.startswith(("test_", "validation_")) and isinstance(v, float)}


def _results(
    recipe: Recipe, chosen: frozenset[str], accelerator: Accelerator, source: Source, model, finals, position, weights
) -> dict[str, Any]:
    scores = {f"{split}_{name}": value for split, e in finals.items() for name, value in e.scores.items()}
    details = {split: evaluation.details(source.class_names) for split, evaluation in finals.items()}
    return {
        **scores,
        "command": command(accelerator, recipe, chosen),
        "recipe": recipe.recipe,
        "seed": recipe.seed,
        "steps": position.step,
        "train_seconds": round(position.train_seconds, 2),
        "images_per_second": round(position.step * recipe.train_batch_size / max(position.train_seconds, 1e-9), 1),
        "weights": weights,
        "best_step": position.best_step,
        "num_parameters": model.num_parameters(),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": hardware(accelerator),
        "versions": versions(),
        "commit": commit(),
        "dataset": {
            "name": source.name,
            "repository": source.repository,
            "splits": {name: len(split) for name, split in source.splits.items()},
        },
        "class_names": source.class_names,
        "per_class": {split: found["per_class"] for split, found in details.items()},
        "confusion": {split: found["confusion"] for split, found in details.items()},
    }


def _publish(output_dir: Path, results: dict[str, Any]):
    write_json(output_dir / "results.json", results)
    write_plots(output_dir)
    write_model_card(output_dir)
    write_report(output_dir)
