"""Facts of the machine: launches that went wrong, and what one process meets alone."""

import os
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch

from modeling_vit_scratch.data import loading
from modeling_vit_scratch.errors import PassingError, UserError
from modeling_vit_scratch.training import machine
from modeling_vit_scratch.training.recipe import Recipe


@pytest.mark.parametrize(
    "by_launcher, around, is_refused",
    [("python /bin/accelerate launch run_train.py", {}, True),  # it was asked for several and started one
     ("python /bin/accelerate launch run_train.py", {"MASTER_ADDR": "node-7"}, False),  # a cluster's shell named it
     ("bash job.sh", {}, False)],
)  # fmt: skip
def test_an_address_that_the_shell_names_is_no_launch_of_several(monkeypatch, by_launcher, around, is_refused):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    parent = SimpleNamespace(environ=lambda: around, cmdline=by_launcher.split)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    if is_refused:
        with pytest.raises(UserError, match="Several processes were asked for, but the launcher started one"):
            machine.check_launch(1)
    else:
        machine.check_launch(1)


def test_what_one_process_meets_alone_is_raised_in_all(monkeypatch):
    """Three processes of one node; the Hub refuses the last one."""
    met: list[UserError | None] = [None, None, PassingError("the server answered 429")]
    told: list = [None] * 3

    def act(rank):
        if met[rank] is not None:
            raise met[rank]
        return rank

    def gathered(rank, own):
        told[rank] = own[0]
        return told

    for rank in (2, 0, 1):  # the one that was refused tells first
        monkeypatch.setattr(machine, "gather_object", partial(gathered, rank))
        accelerator = SimpleNamespace(is_local_main_process=rank == 0, num_processes=3, wait_for_everyone=lambda: None)
        with pytest.raises(PassingError, match="429"):  # of its kind
            machine.first_on_each_node(accelerator, partial(act, rank))
    met[2] = told[2] = None
    monkeypatch.setattr(machine, "gather_object", partial(gathered, 2))
    assert machine.first_on_each_node(accelerator, partial(act, 2)) == 2


def test_deterministic_algorithms_are_for_gpus(monkeypatch):
    recipe = Recipe(full_determinism=True)
    with pytest.raises(
        UserError, match="--full_determinism has no effect here: on a CPU every run gives the same bits"
    ):
        machine.refuse_precision(SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"), recipe)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a person's own choice stays
    try:
        machine.refuse_precision(SimpleNamespace(device=torch.device("cuda"), mixed_precision="no"), recipe)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_split_that_is_large_for_a_gpu_stays_in_main_memory(monkeypatch):
    facts = SimpleNamespace(total_memory=16_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    assert loading.home_of(torch.zeros(1000, dtype=torch.uint8), gpu) == gpu
    assert loading.home_of(torch.zeros(1001, dtype=torch.uint8), gpu) == cpu
    assert loading.home_of(torch.zeros(1001, dtype=torch.uint8), cpu) == cpu


@pytest.mark.parametrize(
    "precision, device, has_units, is_main, expected",
    [("bf16", "cpu", False, True, "take 38.6 times as long. Leave out --mixed_precision bf16."),
     ("bf16", "cpu", True, True, None),
     ("bf16", "cpu", False, False, None),
     ("no", "cpu", False, True, None),
     ("bf16", "cuda", False, True, "Use --mixed_precision fp16."),
     ("bf16", "cuda", True, True, None),
     ("fp16", "cuda", False, True, None)],
)  # fmt: skip
def test_bf16_is_warned_of_where_nothing_computes_it(monkeypatch, precision, device, has_units, is_main, expected):
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: 0.4 if has_units else 38.6)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    facts = SimpleNamespace(is_main_process=is_main, device=torch.device(device), mixed_precision=precision)
    warning = machine.precision_warning(facts)
    assert warning is None if expected is None else warning.endswith(expected)


def test_the_slowdown_of_bf16_is_the_quotient_of_the_fastest_products(monkeypatch):
    bf16, float32 = [9, 3, 4, 5, 8], [7, 8, 5, 2, 6]  # seconds of five turns each
    clock = iter([moment for taken in bf16 + float32 for moment in (0, taken)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    num_threads = torch.get_num_threads()
    assert machine.bf16_slowdown() == 1.5
    assert torch.get_num_threads() == num_threads
