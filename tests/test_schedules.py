"""Learning rates against transformers' and torch's schedulers."""

import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.recipe import CONSTANT, FIELDS
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.schedules import (
    SCHEDULES,
    check_schedule,
    in_steps,
    learning_rate_at,
    num_warmup_steps,
)


def recipe_of(schedule, **fields):
    return RECIPES["digits"].replace(**{"lr_scheduler_type": schedule, "learning_rate": 0.3, **fields})


def assert_equal_after_warmup(recipe, total_steps, scheduler_of):
    """transformers starts warmup at a rate of 0, a step that learns nothing; ours at 1 / warmup, so only the rest
    compares. The tolerance is for the order of products."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    scheduler = scheduler_of(optimizer)
    for step in range(total_steps):
        if step >= num_warmup_steps(recipe.warmup_steps, total_steps):
            theirs = optimizer.param_groups[0]["lr"]
            assert learning_rate_at(step, total_steps, recipe) == pytest.approx(theirs, rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    "name, theirs", [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_schedules_equal_transformers_after_warmup(name, theirs, warmup):
    assert_equal_after_warmup(recipe_of(name, warmup_steps=warmup), 50, lambda o: theirs(o, warmup, 50))


@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_with_a_floor_equals_transformers(warmup):
    assert_equal_after_warmup(
        recipe_of("cosine", warmup_steps=warmup, min_lr_rate=0.1),
        50,
        lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, warmup, 50, min_lr_rate=0.1),
    )


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("cycles", [1, 3])
def test_restarts_equal_transformers(cycles, warmup):
    assert_equal_after_warmup(
        recipe_of("cosine_with_restarts", warmup_steps=warmup, lr_num_cycles=cycles),
        50,
        lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, warmup, 50, num_cycles=cycles),
    )


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("power, floor", [(1.0, 0.0), (2.0, 0.0), (0.5, 0.1)])
def test_polynomial_equals_transformers(power, floor, warmup):
    assert_equal_after_warmup(
        recipe_of("polynomial", warmup_steps=warmup, lr_power=power, min_lr_rate=floor),
        50,
        lambda o: get_polynomial_decay_schedule_with_warmup(o, warmup, 50, lr_end=0.3 * floor, power=power),
    )


@pytest.mark.parametrize("warmup", [0, 7])
def test_a_constant_rate_with_warmup_equals_transformers(warmup):
    recipe = recipe_of("constant_with_warmup", warmup_steps=warmup)
    assert_equal_after_warmup(recipe, 50, lambda o: get_constant_schedule_with_warmup(o, warmup))


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("warmup, decay", [(0, 10), (7, 10), (7, 0.2), (10, 40), (0, 50)])
def test_warmup_stable_decay_equals_transformers(warmup, decay, floor):
    assert_equal_after_warmup(
        recipe_of("warmup_stable_decay", warmup_steps=warmup, lr_decay_steps=decay, min_lr_rate=floor),
        50,
        lambda o: get_wsd_schedule(o, warmup, in_steps(decay, 50), 50, decay_type="linear", min_lr_ratio=floor),
    )


@pytest.mark.parametrize("given, steps", [((20, 30, 41), [20, 30, 41]), ((0.4, 0.6, 0.82), [20, 30, 41])])
@pytest.mark.parametrize("warmup", [0, 7, 25])
def test_multi_step_equals_torch_with_milestones_in_steps_or_shares(given, steps, warmup):
    recipe = recipe_of("multi_step", warmup_steps=warmup, lr_milestones=given, lr_gamma=0.3)
    assert_equal_after_warmup(recipe, 50, lambda o: torch.optim.lr_scheduler.MultiStepLR(o, steps, gamma=0.3))


def test_multi_step_stops_at_the_floor():
    recipe = recipe_of("multi_step", warmup_steps=0, lr_milestones=(2, 4, 6), learning_rate=1.0, min_lr_rate=0.05)
    rates = [learning_rate_at(step, 8, recipe) for step in range(8)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])


def test_without_a_floor_the_rates_are_those_of_the_plain_formulas_bit_for_bit():
    plain = {
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda progress: 1 - progress,
        "constant": lambda progress: 1.0,
    }
    for name, share in plain.items():
        recipe = recipe_of(name, warmup_steps=0.1, learning_rate=4e-3)
        for step in range(10, 97):
            assert learning_rate_at(step, 97, recipe) == 4e-3 * share((step - 10) / 87)


def test_warmup_rises_in_a_line_to_the_highest_rate():
    recipe = recipe_of("constant", warmup_steps=4, learning_rate=1.0)
    assert [learning_rate_at(step, 100, recipe) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_run_shorter_than_its_warmup_only_rises(name):
    recipe = recipe_of(name, warmup_steps=10_000)
    check_schedule(recipe, 10)
    rates = [learning_rate_at(step, 10, recipe) for step in range(10)]
    assert rates == pytest.approx([0.3 * (step + 1) / 10_000 for step in range(10)])


@pytest.mark.parametrize("given, steps", [(0, 0), (0.1, 20), (0.001, 1), (1, 1), (30, 30)])
def test_warmup_under_one_is_a_share_of_all_steps(given, steps):
    assert num_warmup_steps(given, 200) == steps


@pytest.mark.parametrize("given, steps", [(0.001, 1), (0.29, 58), (0.5, 100), (1, 1), (300, 300)])
def test_an_interval_under_one_is_a_share_of_all_steps_and_at_least_one(given, steps):
    assert in_steps(given, 200) == steps


def test_every_schedule_is_a_choice_of_its_flag_and_every_choice_a_schedule():
    assert set(SCHEDULES) == set(FIELDS["lr_scheduler_type"].metadata["choices"])


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 97])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_stays_between_floor_and_highest_and_never_rises_after_warmup(name, total_steps):
    recipe = recipe_of(name, warmup_steps=0.1, learning_rate=1.0, min_lr_rate=0.02)
    check_schedule(recipe, total_steps)  # the default shares fit a run of any length
    warmup = num_warmup_steps(0.1, total_steps)
    rates = [learning_rate_at(step, total_steps, recipe) for step in range(total_steps)]
    assert max(rates) <= 1.0 and min(rates) >= 0.02
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {*CONSTANT, "multi_step"}))
def test_a_falling_schedule_would_reach_its_floor_one_step_after_the_last(name):
    recipe = recipe_of(name, warmup_steps=5, learning_rate=1.0, min_lr_rate=0.02)
    assert learning_rate_at(50, 50, recipe) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lr_milestones": ()}, "needs --lr_milestones, such as 0.5,0.75"),
        ({"lr_milestones": (60, 30)}, "--lr_milestones 60,30 must ascend: in a run of 100 steps they are 60, 30"),
        ({"lr_milestones": (0.5, 50)}, "--lr_milestones 0.5,50 must ascend: in a run of 100 steps they are 50, 50"),
        ({"lr_milestones": (30, 100)}, "--lr_milestones 30,100: a run of 100 steps ends before step 100"),
    ],
)
def test_milestones_that_make_no_sense_are_errors(fields, message):
    with pytest.raises(UserError, match=message):
        check_schedule(recipe_of("multi_step", **fields), 100)
    check_schedule(recipe_of("cosine", **fields), 100)  # that reads no milestones


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lr_decay_steps": 101}, "--lr_decay_steps 101 does not fit a run of 100 steps"),
        (
            {"lr_decay_steps": 60, "warmup_steps": 0.5},
            r"--warmup_steps 0.5 and --lr_decay_steps 60 do not fit together: 50 \+ 60 of 100 steps",
        ),
    ],
)
def test_a_decay_that_does_not_fit_is_an_error(fields, message):
    with pytest.raises(UserError, match=message):
        check_schedule(recipe_of("warmup_stable_decay", **fields), 100)
    check_schedule(recipe_of("cosine", **fields), 100)


def test_shares_that_fill_a_run_fit_it_however_they_round():
    for total_steps in range(1, 30):
        recipe = recipe_of("warmup_stable_decay", warmup_steps=0.5, lr_decay_steps=0.5, learning_rate=1.0)
        check_schedule(recipe, total_steps)
        assert max(learning_rate_at(step, total_steps, recipe) for step in range(total_steps)) == 1.0
