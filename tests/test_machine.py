"""Facts of the machine: launches that went wrong, and what one process meets alone."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from modeling_vit_scratch.data import loading
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import machine


@pytest.mark.parametrize(
    "by_launcher, around, is_refused",
    [({"ACCELERATE_MIXED_PRECISION": "no"}, {}, True),  # accelerate was asked for several and started one
     ({"ACCELERATE_MIXED_PRECISION": "no"}, {"MASTER_ADDR": "node-7"}, False),  # a cluster's shell named it
     ({}, {"MASTER_ADDR": "node-7"}, False)],
)  # fmt: skip
def test_an_address_that_the_shell_names_is_no_launch_of_several(monkeypatch, by_launcher, around, is_refused):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", **by_launcher}.items():
        monkeypatch.setenv(name, value)
    parent = SimpleNamespace(environ=lambda: around)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    if is_refused:
        with pytest.raises(UserError, match="Several processes were asked for, but the launcher started one"):
            machine.check_launch(1)
    else:
        machine.check_launch(1)


def test_what_one_process_meets_alone_is_raised_in_all(monkeypatch):
    """Three processes of one node; the Hub refuses the last one."""
    met = [None, None, "the server answered 429"]
    monkeypatch.setattr(machine, "gather_object", lambda own: met)

    def act(rank):
        if met[rank] is not None:
            raise UserError(met[rank])
        return rank

    for rank in range(3):
        accelerator = SimpleNamespace(is_local_main_process=rank == 0, num_processes=3, wait_for_everyone=lambda: None)
        with pytest.raises(UserError, match="429"):
            machine.first_on_each_node(accelerator, lambda rank=rank: act(rank))
    met[2] = None
    assert machine.first_on_each_node(accelerator, lambda: act(2)) == 2


@pytest.mark.parametrize("gigabytes, kept", [(8, 0.5), (16, 1), (80, 2)])
def test_a_small_gpu_keeps_smaller_splits(monkeypatch, gigabytes, kept):
    assert loading.resident_bytes() == 2 * 1024**3 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = SimpleNamespace(total_memory=gigabytes * 1024**3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert loading.resident_bytes() == kept * 1024**3
