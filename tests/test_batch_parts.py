"""Parts of a batch computed at once: the same bits as one after the other, where nothing depends on the order."""

import threading
from types import SimpleNamespace

import pytest
import torch
from small_vit import build, images, threads
from test_run_options import Killed, die_at
from test_run_train import TINY, equal, metrics, run, weights
from torch import nn

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.batch_parts import BatchParts, PartsAtOnce, parts_of
from modeling_vit_scratch.training.features import HeadOnFeatures
from modeling_vit_scratch.training.recipes import RECIPES

LABELS = torch.arange(12) % 5


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever the machine has."""
    with threads(2):
        yield


def losses(model: nn.Module, dtype=torch.float32):
    pixels = images(12, 3, 32, 32).to(dtype)

    def compute(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(pixels[part]).logits
        return nn.functional.cross_entropy(logits, LABELS[part], reduction="sum"), logits.detach().sum()

    return compute


def one_after_the_other(model: nn.Module, parts: list[slice], compute) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    counted = []
    for part in parts:
        loss, counts = compute(part)
        loss.backward()
        counted.append(counts)
    return counted


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("count, num_parts", [(2, 2), (2, 4), (2, 3), (3, 3), (3, 5)])
def test_gradients_have_the_bits_of_parts_one_after_the_other(count, num_parts, autocast):
    torch.set_num_threads(count)
    parts, found = parts_of(12, num_parts), []
    for way in (one_after_the_other, lambda model, *rest: PartsAtOnce(model, count).sum_gradients(*rest)):
        torch.set_num_threads(count)
        model = build().train()
        model.vit.embeddings.requires_grad_(False)  # a part that is not trained
        inner = losses(model)

        def compute(part, inner=inner):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, counts = inner(part)
            return loss, counts

        counted = way(model, parts, compute)
        found.append((torch.stack(counted), gradients(model)))
    (counts, expected), (own_counts, own) = found
    assert torch.equal(counts, own_counts) and expected.keys() == own.keys()
    assert all(torch.equal(expected[name], own[name]) for name in expected)


def test_gradients_are_those_of_the_whole_batch():
    whole, parts = build().double().train(), build().double().train()
    losses(whole, torch.float64)(slice(None))[0].backward()
    for _ in range(2):  # they add up, as backward's do
        PartsAtOnce(parts, 2).sum_gradients(parts_of(12, 2), losses(parts, torch.float64))
    expected = gradients(whole)
    assert len(expected) == len(list(whole.parameters()))
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_images, count, sizes", [(7, 3, [3, 2, 2]), (2, 4, [1, 1]), (5, 1, [5])])
def test_every_image_is_in_one_part(num_images, count, sizes):
    parts = [list(range(num_images))[part] for part in parts_of(num_images, count)]
    assert [len(part) for part in parts] == sizes
    assert sorted(index for part in parts for index in part) == list(range(num_images))


def test_parts_are_computed_at_once_each_with_its_share_of_the_threads():
    torch.set_num_threads(4)
    model, meeting, seen = nn.Linear(2, 1), threading.Barrier(2, timeout=60), []

    def compute(part):
        meeting.wait()  # a part that had to wait for the other would wait forever
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return model(torch.ones(1, 2)).sum(), torch.tensor(0)

    PartsAtOnce(model, 2).sum_gradients(parts_of(8, 4), compute)
    assert sorted(seen) == [(False, 2)] * 2 + [(True, 2)] * 2
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_a_part_comes_out_when_no_part_computes_any_more(broken):
    model, done = nn.Linear(2, 1), []

    def compute(part):
        if part.start == broken:
            raise FloatingPointError("of a part")
        done.append(part.start)
        return model(torch.ones(1, 2)).sum(), torch.tensor(0)

    with pytest.raises(FloatingPointError, match="of a part"):
        PartsAtOnce(model, 2).sum_gradients(parts_of(8, 2), compute)
    assert done == [1 - broken] and torch.get_num_threads() == 2


# ---------------------------------------------------------------- whole runs

RUNS = {
    "plain": [],
    "mixed": ["--mixup_alpha", 0.8, "--mixup_off_step", 0.7, "--ema_decay", 0.5, "--random_erasing_prob", 0.3],
    "patches left out": ["--config_overrides", f"{TINY},patch_drop_rate=0.5", "--full_size_step", 2],
    "accumulated": ["--gradient_accumulation_steps", 3],
    "binary": ["--bce_loss", "true", "--aug_repeats", 2, "--optim", "muon"],
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_has_the_bits_of_the_run_that_accumulates_as_many_parts(flags, tmp_path, capsys):
    accumulated = 3 if "--gradient_accumulation_steps" in flags else 1
    common = ["--max_steps", 4, "--logging_steps", 1, "--gradient_accumulation_steps", accumulated, *flags]
    run(tmp_path / "at once", *common, "--cpu_threads", 2, "--cpu_parts", 2)
    assert "each batch in 2 parts at once, 1 thread(s) each\n" in capsys.readouterr().out
    run(tmp_path / "in turn", *common, "--gradient_accumulation_steps", 2 * accumulated)
    assert "at once" not in capsys.readouterr().out
    assert equal(weights(tmp_path / "at once"), weights(tmp_path / "in turn"))
    assert metrics(tmp_path / "at once") == metrics(tmp_path / "in turn")


def test_a_student_with_adapters_has_them_too(tmp_path):
    """A teacher answers each part, and few of the parameters are trained."""
    teacher = tmp_path / "teacher"
    run(teacher, "--max_steps", 1)
    taught = ["--model_name_or_path", teacher, "--finetune", "lora", "--teacher_name_or_path", teacher]
    taught += ["--recipe", "digits", "--max_steps", 3, "--config_overrides", ""]
    run(tmp_path / "at once", *taught, "--cpu_threads", 2, "--cpu_parts", 2, "--gradient_accumulation_steps", 1)
    run(tmp_path / "in turn", *taught, "--gradient_accumulation_steps", 2)
    assert equal(weights(tmp_path / "at once"), weights(tmp_path / "in turn"))


def test_a_run_may_go_on_in_other_parts(tmp_path, monkeypatch):
    common = ["--max_steps", 4, "--save_steps", 2, "--cpu_threads", 2]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        run(tmp_path, *common, "--cpu_parts", 2)
    assert run(tmp_path, *common, "--cpu_parts", 1)["steps"] == 4


# ---------------------------------------------------------------- whether


def accelerator(**others) -> SimpleNamespace:
    fields = {
        "device": torch.device("cpu"), "num_processes": 1, "mixed_precision": "bf16", "distributed_type": None,
        "unwrap_model": lambda model: model,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **others})


def batch_parts(asked=None, model=None, flops=1e9, kind=None, **recipe) -> BatchParts:
    recipe = RECIPES["cifar10"].replace(cpu_parts=asked, train_batch_size=100, **recipe)
    return BatchParts(
        recipe, accelerator(**(kind or {})), model or build(), lambda is_initial: flops / (1 + is_initial)
    )


def test_long_steps_are_halved_where_there_are_two_threads():
    assert batch_parts().lines() == ["each batch in 2 parts at once, 1 thread(s) each"]
    assert batch_parts(flops=0.1e9).lines() == []
    assert batch_parts(flops=0.1e9, kind={"mixed_precision": "no"}).is_worth == {True: False, False: True}
    some = batch_parts(flops=0.5e9)
    assert some.is_worth == {True: False, False: True} and "where a step is long enough" in some.lines()[0]
    assert batch_parts(asked=2, flops=1).is_worth == {True: True, False: True}
    assert batch_parts(asked=1).lines() == []
    for count in (1, 4):
        torch.set_num_threads(count)
        assert batch_parts().lines() == []
    assert batch_parts(asked=4).at_once.threads_each == 1


DRAWING = ({"hidden_dropout_prob": 0.1}, {"attention_probs_dropout_prob": 0.1}, {"drop_path_rate": 0.1})
OBSTACLES = {
    "on a CPU alone": {"kind": {"device": torch.device("cuda")}},
    "the processes are the parts already": {"kind": {"num_processes": 2}},
    "neither --torch_compile nor --gradient_checkpointing": {"gradient_checkpointing": True},
    "it goes with neither": {"torch_compile": True},
    "the frozen backbone": {"model": HeadOnFeatures(build())},
    "a specimen": {"specimen": "batch_axis"},
    **{f"dropout draws.*{number}": {"model": build(**fields)} for number, fields in enumerate(DRAWING)},
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_computed_at_once_is_not_and_asking_for_it_is_an_error(obstacle):
    fields = OBSTACLES[obstacle]
    assert batch_parts(**fields).lines() == []
    with pytest.raises(UserError, match=f"--cpu_parts 2: .*{obstacle.partition('.*')[0]}"):
        batch_parts(asked=2, **fields)


def test_more_parts_than_threads_are_refused():
    with pytest.raises(UserError, match="--cpu_parts 3: there are 2 threads, and each part needs one"):
        batch_parts(asked=3)


def test_patch_dropout_which_is_given_its_numbers_is_no_obstacle():
    assert batch_parts(model=build(patch_drop_rate=0.5)).lines() != []
