"""train(recipe) -> results: one run from top to bottom.

Every random draw is a function of (seed, purpose, step): a run that is killed and started again repeats none and
misses none. The batch is global; a rank computes its part, and losses are sums over samples divided by the global
batch, so that 1 and 8 processes take the same steps.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import set_seed

from ..data.augmentation import Draws, Mixing, normalise, send
from ..data.decoding import Decoder, normalisation
from ..data.loading import Batch, EvaluationData, TrainingData
from ..data.order import derived_seed
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import effects
from .averaging import AveragedWeights, check_decay
from .bad_images import leave_out_bad_images
from .batch_parts import BatchParts
from .clipping import clip_gradients
from .distillation import distillation_of
from .evaluation import Evaluation, EvaluationStopped, evaluate
from .features import HeadOnFeatures, cache_features, can_cache_features, start_from_ridge
from .finetuning import head_rate_scale, prepare_finetuning, refuse_idle_rates, set_train_mode
from .guard import FiniteGuard, poisoned
from .interruptions import Interruptions
from .machine import (
    agree,
    first_on_each_node,
    gather_batch,
    num_cores,
    num_decoding_workers,
    refuse_precision,
    start_accelerator,
)
from .network import build_augmentation, build_network, source_of, split_as_asked, whole_source_of
from .objectives import objective_of
from .optimization import build_optimizer, optimizer_warning, parameter_groups
from .overrides import checkpoint_overrides
from .publishing import checkpoint_documents, collect_results, final_scores, publish, save_model
from .pushing import PushedSaves, open_destination, push_at_end
from .recipe import Recipe
from .recording import (
    DataWait,
    MetricsFile,
    Progress,
    announce,
    check_scaled,
    last_checkpoint,
    record_evaluation,
    resolve_trackers,
    score_table,
    start_trackers,
    training_row,
)
from .resolution import resolution_of
from .run_folder import data_facts, how_to_go_on, keep_positions, names_checkpoint, open_run, remove_later
from .schedules import check_patience, check_schedule, evaluation_interval, in_steps, learning_rate_at
from .sharding import (
    check_recipe,
    check_shares,
    is_sharded,
    prepare,
    shard_like_the_trained,
    whole_network,
)
from .state import TrainingState
from .time_budget import rehearse, seconds_of


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""


def train(recipe: Recipe, chosen: frozenset[str] = frozenset(), began: float | None = None) -> dict[str, Any]:
    """Trains, evaluates and saves as the recipe says, or goes on where the output folder's run stopped.

    chosen: the fields that a person set; one that could not change this run is an error. began: the time.time() from
    which --time_budget counts; else now. Returns what results.json holds. Raises UserError for what a person can mend
    and Interrupted after a signal.
    """
    began = time.time() if began is None else began
    output_dir = Path(recipe.output_dir or f"outputs/{recipe.recipe}")
    effects.check_recipe(recipe, chosen)
    trackers = resolve_trackers(recipe.report_to)
    accelerator = start_accelerator(trackers, output_dir, recipe.cpu_threads, trains=True)
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    refuse_precision(accelerator, recipe)
    check_recipe(accelerator, recipe)

    # --- data, and the network that fits it
    facts = {"mixed_precision": accelerator.mixed_precision, "num_processes": world_size}
    run, skipped = None, {}
    is_scanned = recipe.bad_images == "skip"
    open_images = partial(whole_source_of if is_scanned else source_of, recipe)
    source = first_on_each_node(accelerator, open_images)  # one download a node
    # a wrong token is found before anything is trained, and no repository is made for data that is not there
    repository = agree(accelerator, lambda: open_destination(recipe, output_dir)) if recipe.push_to_hub else None
    if is_scanned:  # before a validation split is held out: as if bad images had never been there
        run = agree(accelerator, lambda: open_run(output_dir, recipe, facts, data_facts(source)))  # keeps what is found
        skipped = leave_out_bad_images(accelerator, source, output_dir, recipe.max_bad_images)
        split_as_asked(recipe, source)
    set_seed(derived_seed(recipe.seed, "initialisation") % 2**32)
    model, processor, loading_report = first_on_each_node(accelerator, lambda: build_network(recipe, chosen, source))
    num_parameters, finetuning = model.num_parameters(), prepare_finetuning(model, recipe)
    if recipe.model_name_or_path is not None:
        refuse_idle_rates(model, checkpoint_overrides(recipe, chosen), recipe.finetune)
    decoder, augment = build_augmentation(recipe, processor)
    batch_size, num_samples, num_labels = recipe.train_batch_size, len(source.splits["train"]), len(source.class_names)
    check_shares(recipe, world_size, num_samples)
    effects.check_source(recipe, chosen, source, decoder)
    resolution = resolution_of(recipe, chosen, model.config, num_samples)

    # --- the folder: a new run, one to go on with, or a finished one
    run = run or agree(accelerator, lambda: open_run(output_dir, recipe, facts, data_facts(source)))
    if run.note is not None:
        accelerator.print(f"note: {run.note}")
    if run.results is not None:
        if accelerator.is_main_process and not (output_dir / "report.html").exists():
            publish(output_dir, run.results, source)  # the run ended between its scores and its report
        accelerator.print(f"{output_dir} holds this run, finished:\n{score_table(final_scores(run.results))}")
        if repository is not None and accelerator.is_main_process:
            print(push_at_end(output_dir, repository), flush=True)
        return run.results
    keep_positions(model.config, run.checkpoint)
    workers = num_decoding_workers(decoder, device, recipe.dataloader_num_workers)
    common = (rank, world_size, workers, device)
    threads = torch.get_num_threads()
    data = TrainingData(
        source, decoder, batch_size, recipe.seed, *common, recipe.stream_lanes, recipe.stream_window, threads,
        recipe.balanced_sampler, recipe.aug_repeats,
    )  # fmt: skip
    plain_decoder = Decoder(processor)
    held = {
        name: EvaluationData(source, split, plain_decoder, recipe.eval_batch_size, *common, threads)
        for name, split in source.splits.items()
        if name != "train"
    }
    pixels = normalisation(processor, device)
    mixing = Mixing(recipe.mixup_alpha, recipe.cutmix_alpha, recipe.mixup_prob, recipe.mixup_switch_prob)

    # --- a frozen backbone sees each image once: from here on its features stand where images were
    # what is sharded goes to the GPU a layer at a time: whole, it may not fit
    model.to(device="cpu" if is_sharded(accelerator) else device, dtype=getattr(torch, recipe.dtype))
    objective = objective_of(recipe, source, device, model.dtype)
    teach = partial(distillation_of, recipe, source, pixels, model.dtype, accelerator.autocast)
    distillation = first_on_each_node(accelerator, teach)
    baseline, trained_part = None, _whole
    if can_cache_features(recipe, num_samples, model.config.hidden_size):
        cached = cache_features(model, data, held, pixels, recipe.horizontal_flip_prob, accelerator)
        data, held, augment, pixels = cached.training, cached.held, cached.augment, cached.pixels
        trained_part = HeadOnFeatures

    def scored(network: ViTScratchForImageClassification, split: str, is_stopped=None) -> Evaluation:
        return evaluate(trained_part(network), held[split], pixels, accelerator, objective, model.dtype, is_stopped)

    if trained_part is HeadOnFeatures and (ridge := start_from_ridge(model, data, recipe.bce_loss)) is not None:
        baseline = {"ridge_penalty": ridge.penalty, "left_out_accuracy": ridge.accuracy}
        text = f"ridge on the frozen features: accuracy {ridge.accuracy:.4f} leaving out each training image in turn"
        if "validation" in held:
            baseline["validation_accuracy"] = scored(model, "validation").scores["accuracy"]
            text += f", {baseline['validation_accuracy']:.4f} on validation"
        accelerator.print(f"{text} (penalty {ridge.penalty:g}); training goes on from it", flush=True)

    # --- optimizer and state
    averaged = AveragedWeights(model, recipe.ema_decay) if recipe.ema_decay is not None else None
    if recipe.gradient_checkpointing:
        # transformers 5.23 calls it otherwise, and warns of the name that all versions before it have
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    head_scale = head_rate_scale(recipe, loading_report)
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay, recipe.optim == "muon", head_scale)
    if recipe.torch_compile:
        model.compile()  # in place: parameter names stay as they are
    names = [name for group in groups for name in group.names]
    optimizer = build_optimizer(groups, recipe, accelerator.mixed_precision)
    network, optimizer = prepare(accelerator, trained_part(model), optimizer)
    del groups  # where parameters are sharded, theirs are the whole ones
    if averaged is not None:
        shard_like_the_trained(accelerator, averaged.model)
    guard = FiniteGuard(optimizer.optimizer, device, may_wait=device.type == "cpu")

    def describe(step: int) -> dict[str, dict[str, Any]]:
        rate = resolution.published_rate(step, position.total_steps)
        return checkpoint_documents(model.config, processor, recipe, rate)

    checkpoints = output_dir / "checkpoints"
    state = TrainingState(
        accelerator, model, optimizer, names, averaged, checkpoints, recipe.save_total_limit, describe
    )
    if run.checkpoint is not None:
        state.restore(run.checkpoint)
        if names_checkpoint(recipe):  # and it could be taken
            agree(accelerator, lambda: remove_later(checkpoints, run.checkpoint))
    position, where_to_go_on = state.position, partial(last_checkpoint, state)
    is_pushed = recipe.hub_strategy == "every_save" and accelerator.is_main_process
    saves = PushedSaves(output_dir, repository if is_pushed else None)
    start_trackers(accelerator, trackers, recipe.to_dict(), output_dir.resolve().name, position.step)

    # --- one step
    parts = BatchParts(recipe, accelerator, network, partial(resolution.flops, model.config))

    def backward(step: int, batch: Batch, is_mixed: bool, is_initial: bool) -> torch.Tensor:
        """The norm of the global batch's gradient, which then lies, clipped, in the parameters."""
        torch.manual_seed(derived_seed(recipe.seed, "dropout", step, rank))
        batch = batch.to(device)
        draws = Draws(recipe.seed, step, batch_size, batch.positions, world_size, data.is_interleaved(step))
        images = normalise(augment(batch.images, draws), *pixels, model.dtype)
        images, targets = augment.erase(images, draws), batch.labels
        inputs, options = {}, {}
        resolution.set_patch_dropout(model, is_initial)
        if (noise := resolution.noise(draws, model.config, is_initial)) is not None:
            inputs["noise"] = send(noise, device)
        if is_initial and resolution.initial_size is not None:
            images, options = resolution.shrink(images), {"interpolate_pos_encoding": True}
        if is_mixed:
            images, targets = mixing(images, targets, draws, num_labels, lambda *own: gather_batch(accelerator, *own))
        inputs["pixel_values"] = images

        def compute(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            logits = network(**{name: of[part] for name, of in inputs.items()}, **options).logits.to(model.dtype)
            loss_sum = objective.loss_sum(logits, targets[part])
            if distillation is not None:
                loss_sum = distillation.joined(loss_sum, logits, images[part])
            counts = torch.stack((loss_sum.detach(), objective.num_correct(logits, targets[part])))
            # gradients are averaged over ranks: times their number makes it the mean over the global batch
            return poisoned(loss_sum) * (world_size / batch_size), counts

        for counts in parts.sum_gradients(len(images), compute, is_initial):
            state.window.sums += counts
        return clip_gradients(accelerator, model, network, recipe)

    def set_rate(rate: float):
        for settings in optimizer.param_groups:
            settings["lr"] = rate * settings["rate_scale"]

    def score(split: str) -> Evaluation:
        return scored(state.published, split)

    # --- how many steps
    epoch_steps = math.ceil(num_samples / batch_size)
    position.evaluates_each_epoch |= run.checkpoint is None and recipe.early_stopping_patience is not None
    interval = partial(evaluation_interval, recipe, epoch_steps, position.evaluates_each_epoch)
    if position.total_steps is None or recipe.time_budget is None:
        position.total_steps = recipe.max_steps
        if recipe.num_train_epochs is not None:
            position.total_steps = math.ceil(recipe.num_train_epochs * num_samples / batch_size)
        if recipe.time_budget is not None:

            def rehearse_steps(count: int, is_initial: bool = False):
                set_rate(0.0)  # the weights stay as they are, bit for bit
                for step, batch in enumerate(data.batches(0, count)):
                    grad_norm = backward(step, batch, mixing.is_on, is_initial)
                    if accelerator.scaler is None and not guard.watch(grad_norm, step):
                        guard.check(0.0, where_to_go_on)
                    optimizer.step()
                    optimizer.zero_grad()

            set_train_mode(network)
            budget = seconds_of(recipe.time_budget)
            initial = partial(rehearse_steps, is_initial=True) if resolution.is_progressive else None
            scorings = {name: partial(score, name) for name in held}
            rehearsal = rehearse(accelerator, rehearse_steps, scorings, budget, initial)
            optimizer.optimizer.state.clear()
            state.window = state.new_window()
            left = budget - (time.time() - began)
            counts = (lambda n: -(-n // interval(n)), resolution.num_initial_steps)
            position.total_steps = agree(accelerator, lambda: rehearsal.steps_within(left, *counts))
            accelerator.print(f"{position.total_steps:,} steps of {rehearsal.each_step} fit into {recipe.time_budget}")
    total_steps = position.total_steps
    if position.step > total_steps:
        raise UserError(f"{output_dir} is at step {position.step} already: {total_steps} steps are fewer.")
    (output_dir / "results.json").unlink(missing_ok=True)  # of a run that is made longer
    check_schedule(recipe, total_steps)
    full_size_begins = resolution.num_initial_steps(total_steps)
    eval_every = interval(total_steps)
    if run.checkpoint is None and "validation" in held:
        check_patience(recipe.early_stopping_patience, eval_every, total_steps, full_size_begins)
    resolution.check_length(total_steps)
    check_decay(recipe.ema_decay, total_steps)
    mixing_ends = total_steps if recipe.mixup_off_step is None else in_steps(recipe.mixup_off_step, total_steps)
    if recipe.time_budget is not None and position.step == 0:
        guard.check(0.0, where_to_go_on)
        state.save()  # the number of steps is never measured again
    lines = [] if loading_report is None else [str(loading_report), str(finetuning)]
    lines += [] if distillation is None else distillation.lines(recipe.finetune)
    lines += parts.lines() + resolution.stages(total_steps, model.config)
    save_every = epoch_steps if recipe.save_strategy == "epoch" else in_steps(recipe.save_steps, total_steps)
    scored_every = eval_every if "validation" in held else None
    announce(accelerator, source, num_parameters, lines, total_steps, batch_size, data, workers, scored_every)
    if warning := optimizer_warning(recipe, total_steps):
        accelerator.print(warning)

    # --- the steps
    metrics = MetricsFile(
        output_dir / "metrics.jsonl", accelerator.is_main_process, position.step, position.owes_evaluation
    )
    data_wait = DataWait(workers, num_cores()) if data.resident is None else None
    work = partial(resolution.work, total_steps=total_steps, config=model.config)
    progress = Progress(total_steps, position.step, accelerator.is_main_process, data_wait, work)
    latest: Evaluation | None = None

    def validate() -> Evaluation | None:
        """The scores of the position and what follows from them; None, and they are owed, where a signal came."""
        try:
            evaluation = scored(state.published, "validation", interruptions.among_batches())
        except EvaluationStopped:
            position.owes_evaluation = True
            return None
        position.owes_evaluation = False
        record_evaluation(evaluation, position, recipe, metrics, accelerator, progress)
        patience = recipe.early_stopping_patience
        if position.step <= full_size_begins:  # trained on less of its images, a network may stand still
            position.evaluations_since_best = 0
        position.has_stopped_early = patience is not None and position.evaluations_since_best >= patience
        return evaluation

    def final(split: str) -> Evaluation:
        try:
            return scored(state.published, split, interruptions.among_batches())
        except EvaluationStopped:
            stop()

    def stop(folder: Path | None = None) -> NoReturn:
        progress.close()
        done = "all steps are saved" if folder is None else f"saved {folder}"
        raise Interrupted(f"stopped by a signal; {done}. {how_to_go_on(recipe)}")

    with Interruptions(accelerator, recipe.save_minutes, position.step) as interruptions:
        position.owes_evaluation &= "validation" in held
        if position.owes_evaluation:
            paused = time.perf_counter()
            latest = validate()
            folder = state.save(paused)
            if latest is None:
                stop(folder)
            state.window.started += time.perf_counter() - paused
        first_step = position.step if not position.has_stopped_early else total_steps
        clock = time.perf_counter()
        set_train_mode(network)
        batches = iter(data.batches(first_step, total_steps))
        for step in range(first_step, total_steps):
            waiting_since = time.perf_counter()
            batch = next(batches)
            state.window.waited += time.perf_counter() - waiting_since

            rate = learning_rate_at(step, total_steps, recipe)
            set_rate(rate)
            grad_norm = backward(step, batch, mixing.is_on and step < mixing_ends, step < full_size_begins)
            if accelerator.scaler is None and not guard.watch(grad_norm, step):
                guard.check(rate, where_to_go_on)
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else None
            optimizer.step()
            optimizer.zero_grad()
            if scale is not None:  # optimizer.step_was_skipped does not notice what fused kernels skip
                state.window.skipped_steps += accelerator.scaler.get_scale() < scale
            if averaged is not None:
                averaged.update(model)
            state.window.images += batch_size
            position.step = step + 1
            progress.advance()

            last = position.step == total_steps
            is_evaluated = "validation" in held and (position.step % eval_every == 0 or last)
            is_saved = position.step % save_every == 0 or last
            if position.step % recipe.logging_steps == 0 or is_evaluated or is_saved:
                guard.check(rate, where_to_go_on)
            if position.step % recipe.logging_steps == 0 or last:
                row = training_row(accelerator, state.window, position.step, batch_size, num_samples, rate, grad_norm)
                check_scaled(accelerator, row, where_to_go_on)
                metrics.append(row)
                accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=position.step)
                progress.show(row)
                state.window = state.new_window()

            paused = time.perf_counter()
            position.train_seconds += paused - clock
            latest = validate() if is_evaluated else None
            last |= position.has_stopped_early
            is_best = recipe.load_best_model_at_end and position.best_step == position.step
            stopping, minutes_are_up = interruptions.after(position.step)
            stopping |= position.owes_evaluation  # given up for a signal, which the others may not have looked for
            if is_best or is_saved or minutes_are_up or last or stopping:
                guard.check(rate, where_to_go_on)  # what it found must not be lost with it
                folder = state.save(paused)
                interruptions.saved()
                if stopping:  # after the last step too: what is left are scores, which the same command computes
                    stop(folder)
                if not last:
                    saves.push(folder, position.step, total_steps)
            clock = time.perf_counter()
            state.window.started += clock - paused
            if last:
                break
        progress.close()
        if interruptions.now():  # since the last step that looked
            stop()
        if first_step == total_steps and run.checkpoint is not None and run.checkpoint.parent != checkpoints:
            state.save()  # the other run's last step was taken over, and nothing is here yet
        if position.has_stopped_early:
            than = "that is a number" if position.best_step is None else f"better than at step {position.best_step}"
            accelerator.print(
                f"stopped early at step {position.step}: {position.evaluations_since_best} evaluations without a "
                f"{recipe.metric_for_best_model} {than}"
            )

        # --- final scores, once, of the weights that are published
        weights, published_step = "last" if averaged is None else "last, averaged", position.step
        if recipe.load_best_model_at_end and position.best_step is not None and state.has_best():
            if position.best_step != position.step:
                latest = None
            published_step = state.use_best()
            weights = f"best at step {published_step}" + ("" if averaged is None else ", averaged")
        if pending := [name for name in held if name != "validation" or latest is None]:
            sizes = ", ".join(f"{len(source.splits[name]):,} {name}" for name in pending)
            accelerator.print(f"scoring {sizes} images", flush=True)
        finals = {name: latest if name == "validation" and latest is not None else final(name) for name in held}
    learned = {"num_parameters": num_parameters, "trainable_parameters": finetuning.num_trained, "baseline": baseline}
    learned["teacher"] = None if distillation is None else distillation.teacher.told
    if finetuning.num_trained == num_parameters and distillation is None:  # else there is other work
        learned["train_pflop"] = resolution.pflop(model.config, position.step, total_steps, batch_size)
    results = {**collect_results(recipe, chosen, accelerator, source, state, finals, weights), **learned, **skipped}
    # under autocast the weights are float32 all along; DDP and compile leave `model` itself as it was
    published = whole_network(state.published, accelerator.is_main_process)
    if accelerator.is_main_process:
        if recipe.finetune != "head":  # whose backbone is as it was
            published.config.patch_drop_rate = resolution.published_rate(published_step, total_steps)
        save_model(output_dir, published, processor, (recipe.model_name_or_path, recipe.model_revision))
        publish(output_dir, results, source)
    where = "" if recipe.specimen else f", {output_dir}/model the model"
    accelerator.print(f"{score_table(final_scores(results))}\n{output_dir} holds the run{where}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if repository is not None and accelerator.is_main_process:  # nobody waits for it: an upload may take long
        saves.finish()
        print(push_at_end(output_dir, repository), flush=True)
    return results


# ---------------------------------------------------------------- the parts of a run


def _whole(model: ViTScratchForImageClassification) -> torch.nn.Module:
    return model
