"""--initial_image_size: which images are small, how they became so, and that a run stays exact through the change."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from small_vit import SMALL, images
from test_run_options import assert_killed_runs_end_alike
from test_run_train import TINY, equal, metrics, run, weights
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as tvF

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data.augmentation import Mixing
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchEmbeddings
from modeling_vit_scratch.training import loop, time_budget
from modeling_vit_scratch.training.recipe import COUNTED_LENGTHS
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.resolution import Resolution, resolution_of
from modeling_vit_scratch.training.run_folder import may_change_on_resume
from modeling_vit_scratch.training.time_budget import NUM_MEASURED_STEPS, Rehearsal, rehearse

SMALLER = ["--initial_image_size", 4]  # digits have 8 pixels, in patches of 2
GIVEN = frozenset({"initial_image_size"})
LEARNED = f"{TINY},position_embedding_type=learned"


# ---------------------------------------------------------------- which images, and how


@pytest.mark.parametrize("size", [24, 20, 8])
def test_a_shrunk_batch_is_each_image_resized_by_torchvision_and_by_pillow(size):
    batch = images(5, 3, 32, 32)
    shrunk = Resolution(size, 0.6).shrink(batch)
    for image, found in zip(batch, shrunk, strict=True):
        assert torch.equal(found, tvF.resize(image, [size, size], antialias=True))
        for channel, values in zip(image, found, strict=True):
            pillow = Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(values.numpy(), np.asarray(pillow), atol=1e-5)  # float32 sums of 25 products


@pytest.fixture
def seen() -> Iterator[list[tuple[bool, int]]]:
    """Of each batch that networks see from here on: whether they train on it, and the side of its images."""
    found = []

    def look(module, arguments):
        if isinstance(module, ViTScratchEmbeddings) and not arguments[0].is_meta:  # none that only counts operations
            found.append((module.training, arguments[0].shape[-1]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield found
    hook.remove()


@pytest.mark.parametrize("step, num_small", [([], 6), (["--full_size_step", 0.25], 2), (["--full_size_step", 7], 7)])
def test_the_first_steps_see_small_images_the_others_and_evaluation_full_ones(tmp_path, seen, step, num_small):
    parts = ["--gradient_accumulation_steps", 1]
    run(tmp_path / "run", "--max_steps", 10, "--eval_steps", 2, *parts, *SMALLER, *step)
    assert [side for is_training, side in seen if is_training] == [4] * num_small + [8] * (10 - num_small)
    assert {side for is_training, side in seen if not is_training} == {8}


def test_without_the_flag_the_network_sees_one_size_and_is_called_as_ever(tmp_path, seen, monkeypatch):
    forward, asked = loop.ViTScratchForImageClassification.forward, []

    def watched(self, *arguments, **options):
        asked.extend(options if self.training else ())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(loop.ViTScratchForImageClassification, "forward", watched)
    run(tmp_path / "run", "--max_steps", 3)
    assert {side for _, side in seen} == {8} and set(asked) == {"pixel_values"}


def test_images_are_mixed_after_they_are_shrunk(tmp_path, monkeypatch):
    """So a box of CutMix is whole pixels of what the network sees: the labels' shares are the pixels' to the last."""
    mix, shares = Mixing.__call__, []

    def watched(self, batch, labels, draws, *rest):
        # each image of one colour, its own: what is left of it can be counted
        colours = torch.arange(float(len(batch)))[:, None, None, None].expand(batch.shape)
        mixed, targets = mix(self, colours, torch.arange(len(batch)), draws, len(batch))
        kept = (mixed == colours).flatten(1).float().mean(dim=1)
        shares.append((batch.shape[-1], torch.equal(kept, targets.diagonal())))
        return mix(self, batch, labels, draws, *rest)

    monkeypatch.setattr(Mixing, "__call__", watched)
    run(tmp_path / "run", "--max_steps", 4, "--cutmix_alpha", 1.0, "--full_size_step", 2, *SMALLER)
    assert shares == [(4, True), (4, True), (8, True), (8, True)]


# ---------------------------------------------------------------- a run stays exact


EVERYTHING = [
    "--horizontal_flip_prob", 0.5, "--random_erasing_prob", 0.25, "--mixup_alpha", 0.8, "--cutmix_alpha", 1.0,
    "--ema_decay", 0.5, "--config_overrides", f"{LEARNED},hidden_dropout_prob=0.1,drop_path_rate=0.2",
]  # fmt: skip


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_killed_in_either_stage_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, streaming):
    arguments = [*SMALLER, *EVERYTHING, "--streaming", streaming, "--max_steps", 10, "--save_steps", 2,
                 "--logging_steps", 3, "--train_batch_size", 48]  # fmt: skip
    assert_killed_runs_end_alike(tmp_path, monkeypatch, arguments, 3, 9)  # the images are full from step 6 on


@pytest.mark.parametrize("overrides", [TINY, LEARNED])
def test_accumulated_parts_take_the_steps_of_one_batch(tmp_path, overrides):
    for parts in (1, 2):
        run(tmp_path / str(parts), *SMALLER, "--max_steps", 10, "--train_batch_size", 50, "--dtype", "float64",
            "--mixup_alpha", 0.8, "--gradient_accumulation_steps", parts, "--logging_steps", 1,
            "--config_overrides", overrides)  # fmt: skip
    whole, parts = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-9) for name in whole)
    rows = zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True)
    assert all(one["loss"] == pytest.approx(two["loss"], abs=1e-9) for one, two in rows if "loss" in one)


def test_results_count_the_operations_at_each_size(tmp_path):
    results = run(tmp_path / "run", "--max_steps", 5, "--train_batch_size", 50, *SMALLER)
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")

    def flops(side):
        batch = torch.zeros(50, 1, side, side, requires_grad=True)  # torch counts no gradient that nobody asks for
        with FlopCounterMode(display=False) as counter:
            model(batch, interpolate_pos_encoding=True).logits.sum().backward()
        return counter.get_total_flops()

    assert results["train_pflop"] == pytest.approx((3 * flops(4) + 2 * flops(8)) / 1e15, rel=1e-6)


def test_patience_is_counted_from_the_full_size_on(tmp_path):
    still = ["--learning_rate", 1e-9, "--early_stopping_patience", 2, "--eval_steps", 1, "--max_steps", 10]
    assert run(tmp_path / "full", *still)["steps"] == 3
    assert run(tmp_path / "small", *still, *SMALLER)["steps"] == 6 + 2


def test_photographs_are_shrunk_too(image_folder, tmp_path, seen):
    train = image_folder("train", size=(40, 120), cat=8, dog=8)
    run(tmp_path / "run", "--train_dir", train, "--image_size", 16, "--config_overrides", f"{TINY},patch_size=4",
        "--initial_image_size", 12, "--max_steps", 5, "--train_batch_size", 8)  # fmt: skip
    assert [side for is_training, side in seen if is_training] == [12] * 3 + [16] * 2


def test_a_length_may_change_on_resume_only_where_the_change_of_size_is_a_step_and_no_share():
    constant = RECIPES["digits"].replace(lr_scheduler_type="constant", warmup_steps=2)
    assert may_change_on_resume(constant) >= {*COUNTED_LENGTHS}
    assert not may_change_on_resume(constant.replace(initial_image_size=4)) & {*COUNTED_LENGTHS}
    assert may_change_on_resume(constant.replace(initial_image_size=4, full_size_step=50)) >= {*COUNTED_LENGTHS}


# ---------------------------------------------------------------- the time budget


@pytest.mark.parametrize("step", [0.6, 0.05, 700])
@pytest.mark.parametrize("seconds", [11, 30, 61, 600])
def test_a_budget_is_filled_by_both_kinds_of_steps_and_not_by_one_more(seconds, step):
    rehearsal = Rehearsal(0.05, {"validation": 0.2, "test": 4.0}, initial_step_seconds=0.02)

    def cost(steps):
        initial = min(steps, step) if step >= 1 else round(step * steps)
        return initial * 0.02 + (steps - initial) * 0.05 + (steps // 100) * 0.2 + 4.2 + 4.0

    steps = rehearsal.steps_within(seconds, lambda n: n // 100, Resolution(24, step).num_initial_steps)
    assert time_budget.SECONDS_FOR_PUBLISHING == 4.0
    assert cost(steps) <= seconds < cost(steps + 1)


def test_both_sizes_are_rehearsed_in_the_order_of_the_run_and_the_first_steps_not_counted(monkeypatch):
    now, taken = [0.0], []

    def steps_of(name, seconds):
        def take(count):
            now[0] += count * seconds if name in dict(taken) else 60.0  # the first ones compile
            taken.append((name, count))

        return take

    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now[0])
    accelerator = Accelerator(cpu=True)
    found = rehearse(accelerator, steps_of("full", 0.02), {}, 100, steps_of("small", 0.01))
    assert found.step_seconds == pytest.approx(0.02) and found.initial_step_seconds == pytest.approx(0.01)
    assert [name for name, _ in taken] == ["small"] * 3 + ["full"] * 3
    assert taken[1] == ("small", NUM_MEASURED_STEPS) and taken[2][1] == pytest.approx(180, abs=1)  # a fiftieth of 100 s


def test_a_budgeted_run_equals_the_run_of_that_many_steps_and_rehearses_both_sizes(tmp_path, monkeypatch, seen, capsys):
    monkeypatch.setattr(Rehearsal, "steps_within", lambda *_: 9)
    budgeted = run(tmp_path / "budgeted", "--time_budget", "2s", *SMALLER)
    sides = [side for is_training, side in seen if is_training]
    rehearsed, trained = sides[: -9 * 2], sides[-9 * 2 :]  # in two parts a step
    assert trained == [4] * 10 + [8] * 8  # round(0.6 * 9) steps of two parts
    assert rehearsed == sorted(rehearsed) and {4, 8} == set(rehearsed)
    out = capsys.readouterr().out
    assert "s fit into 2s" in out and " s and then " in out and "5 steps at 4 pixels, then 4 at full size" in out
    counted = run(tmp_path / "counted", "--max_steps", 9, *SMALLER)
    assert equal(weights(tmp_path / "budgeted"), weights(tmp_path / "counted"))
    assert loop.final_scores(budgeted) == loop.final_scores(counted)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--full_size_step", "0.5"], "--full_size_step has no effect here: it goes with --initial_image_size"),
        ([*SMALLER, "--full_size_step", "0"], "--full_size_step must be above 0, got 0"),
        ([*SMALLER, "--full_size_step", "5"], "--full_size_step 5: a run of 5 steps ends before it. Lower it"),
        (["--initial_image_size", "8"], "8 must be smaller than the image size, which is 8 pixels"),
        (
            ["--initial_image_size", "5"],
            "--initial_image_size 5: a height of 5 is not filled by patches of 2 .* 4 and 6",
        ),
        (["--initial_image_size", "0"], "--initial_image_size must be at least 1, got 0"),
    ],
)
def test_values_that_make_no_sense_are_errors_in_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", "--max_steps", 5, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, network, message",
    [
        ({}, {"image_size": (32, 64)}, "24 is the side of a square, the network sees 32 x 64 pixels: leave it out"),
        ({}, {"image_size": 40, "patch_size": 10, "patch_stride": 6}, "patches of 10 every 6 pixels.* 22 and 28"),
        ({"specimen": "patches_by_reshape"}, {}, "does not work with --specimen"),
        ({"finetune": "head"}, {}, "has no effect here: the frozen backbone sees each image once"),
    ],
)
def test_networks_that_cannot_see_another_size_are_errors_in_one_line(fields, network, message):
    recipe = RECIPES["finetune"].replace(initial_image_size=24, random_resized_crop_scale=None, **fields)
    with pytest.raises(UserError, match=message) as caught:
        resolution_of(recipe, GIVEN, ViTScratchConfig(**{**SMALL, **network}), num_samples=100)
    assert "\n" not in str(caught.value)


def test_a_head_whose_images_are_cropped_anew_each_time_may_begin_with_small_ones():
    recipe = RECIPES["finetune"].replace(initial_image_size=24, finetune="head", random_resized_crop_scale=0.5)
    assert resolution_of(recipe, GIVEN, ViTScratchConfig(**SMALL), num_samples=100) == Resolution(24, 0.6)


def test_a_share_that_rounds_to_the_end_of_a_short_run_is_no_error():
    for total_steps in range(1, 9):
        Resolution(24, 0.9).check_length(total_steps)
        assert 1 <= Resolution(24, 0.9).num_initial_steps(total_steps) <= total_steps
