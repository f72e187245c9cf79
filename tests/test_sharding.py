"""Parameters in shards: the same weights, checkpoints and model/ as of one process, and what is refused in one line.

accelerate shards on GPUs alone. Here it is told that two processes on the CPU are GPUs: its own FSDP2 then works over
gloo, from the launcher's variables to the last file of a run.
"""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from small_vit import build, images
from test_run_train import TINY, run
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageClassification

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import loop, sharding
from modeling_vit_scratch.training.clipping import clip_gradients
from modeling_vit_scratch.training.flags import main, parse_arguments
from modeling_vit_scratch.training.guard import FiniteGuard, poisoned
from modeling_vit_scratch.training.optimization import OPTIMIZERS, parameter_groups
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.recording import read_metrics

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what --use_fsdp --fsdp_version 2 exports
# float64: where a gradient is nothing but rounding, as that of the keys' bias is, AdamW makes a step of it.
# Two processes take two parts each; the last evaluation batch has one image, so that the second process has none.
COMMON = [
    "--recipe", "digits", "--dtype", "float64", "--train_batch_size", 21, "--gradient_accumulation_steps", 4,
    "--ema_decay", 0.6, "--max_grad_norm", 0.5, "--lr_scheduler_type", "constant", "--warmup_steps", 0,
    "--logging_steps", 1, "--eval_steps", 3, "--save_steps", 3, "--eval_batch_size", 359,
    "--gradient_checkpointing", "true", "--load_best_model_at_end", "true",
    "--config_overrides", f"{TINY},patch_drop_rate=0.25",
]  # fmt: skip
FILES = ("model", "optimizer", "averaged")


def short(output_dir, max_steps):
    return [output_dir, *COMMON, "--max_steps", max_steps]


def train_as_one_of_two(rank, port, runs, log):
    """What a process does: the runs in turn, in shards, and then a step with a loss that is not finite."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", **ASKED}
    place["FORK_LAUNCHED"] = 1  # as in a sweep: the processes stay connected from run to run
    os.environ.update({name: str(value) for name, value in place.items()})
    descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for arguments in runs:
        run(*arguments)
    for optim in sorted(set(OPTIMIZERS) - {"muon"}):
        for clip_mode in ("norm", "value", "agc"):
            take_a_clipped_step(optim, clip_mode)
    skip_a_step()


def take_a_clipped_step(optim, clip_mode):
    """As one process would: of whole parameters and of shards the weights after it are the same."""
    recipe = RECIPES["digits"].replace(optim=optim, clip_mode=clip_mode, max_grad_norm=1e-3, weight_decay=0.1)
    after = {}
    for is_sharded in (False, True):
        accelerator, model = Accelerator(), build().double()
        network = model
        if is_sharded:
            network = sharding.prepare(accelerator, model, torch.optim.SGD(model.parameters()))[0]
        optimizer = OPTIMIZERS[optim](parameter_groups(model, recipe.weight_decay), recipe)
        network(pixel_values=images().double()).logits.square().sum().backward()
        clip_gradients(accelerator, model, network, recipe)
        optimizer.step()
        after[is_sharded] = sharding.gathered(model.state_dict(), is_kept=True)
    for name, expected in after[False].items():
        if not name.endswith("k_proj.bias"):  # whose gradient is rounding alone
            torch.testing.assert_close(
                after[True][name], expected, rtol=1e-6, atol=1e-9, msg=f"{optim} {clip_mode} {name}"
            )


def skip_a_step():
    """As a GPU would: the guard does not wait, and the fused kernel skips the step itself."""
    accelerator, rank = Accelerator(), PartialState().process_index
    model = build()
    network, optimizer = sharding.prepare(accelerator, model, torch.optim.AdamW(model.parameters(), fused=True))
    guard = FiniteGuard(optimizer.optimizer, torch.device("cpu"), may_wait=False)
    before = sharding.gathered(model.state_dict(), is_kept=True)
    loss = network(pixel_values=images()).logits.sum()
    accelerator.backward(poisoned(loss * (torch.inf if rank else 1)))  # on one process alone
    norm = sharding.full_tensor(accelerator.clip_grad_norm_(network.parameters(), torch.inf))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()) and guard.watch(norm, 0)
    optimizer.step()
    after = sharding.gathered(model.state_dict(), is_kept=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="not finite at step 1"):
        guard.check(0.1, str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of six steps: whole; in shards; three steps in shards and three whole; and the other way round."""
    folder = tmp_path_factory.mktemp("runs")
    run(*short(folder / "whole_then_shards", 3))
    run(*short(folder / "whole", 6))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_vit_scratch.training.loop", "modeling_vit_scratch.results.report"])
    lengths = {"shards": 6, "shards_then_whole": 3, "whole_then_shards": 6}
    runs = [short(folder / name, max_steps) for name, max_steps in lengths.items()]
    ranks = [context.Process(target=train_as_one_of_two, args=(rank, port, runs, folder / "log")) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    logs = "\n".join(Path(f"{folder}/log.{rank}").read_text() for rank in (0, 1))
    assert [process.exitcode for process in ranks] == [0, 0], logs
    run(*short(folder / "shards_then_whole", 6))
    return folder


def tensors(checkpoint):
    return {(file, name): t for file in FILES for name, t in load_file(checkpoint / f"{file}.safetensors").items()}


@pytest.mark.parametrize("name", ["shards", "shards_then_whole", "whole_then_shards"])
def test_a_checkpoint_is_the_same_however_the_run_was_sharded(folder, name):
    for step in ("step-000003", "step-000006"):
        expected, found = (tensors(folder / run_name / "checkpoints" / step) for run_name in ("whole", name))
        assert expected.keys() == found.keys() and len(expected) > 100
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key} {text}")


@pytest.mark.parametrize("name", ["shards", "shards_then_whole", "whole_then_shards"])
def test_scores_and_rows_are_those_of_a_run_without_shards(folder, name):
    one, two = (json.loads((folder / run_name / "results.json").read_text()) for run_name in ("whole", name))
    assert one["confusion"] == two["confusion"] and two["steps"] == 6
    pairs = zip(*(read_metrics(folder / run_name / "metrics.jsonl") for run_name in ("whole", name)), strict=True)
    for expected, found in pairs:
        for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
            assert found.get(key) == pytest.approx(expected.get(key), abs=1e-9)


def test_the_model_folder_of_a_sharded_run_is_complete(folder):
    published = load_file(folder / "shards" / "model" / "model.safetensors")
    best_step = json.loads((folder / "shards" / "results.json").read_text())["best_step"]
    averages = load_file(folder / "shards" / "checkpoints" / f"step-{best_step:06d}" / "averaged.safetensors")
    assert published.keys() == averages.keys() and all(torch.equal(published[n], averages[n]) for n in averages)
    model, report = AutoModelForImageClassification.from_pretrained(
        folder / "shards" / "model", trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model(torch.zeros(1, model.config.num_channels, 8, 8, dtype=model.dtype)).logits.shape == (1, 10)
    files = {name: {path.name for path in (folder / name / "model").iterdir()} for name in ("whole", "shards")}
    assert files["whole"] == files["shards"]
    configs = [(folder / name / "model" / "config.json").read_text() for name in ("whole", "shards")]
    assert configs[0] == configs[1]


def test_a_sharded_run_says_so_and_its_command_repeats_it(folder):
    assert "2 process(es) on cpu, parameters sharded over them (FSDP2)" in (folder / "log.0").read_text()
    command = json.loads((folder / "shards" / "results.json").read_text())["command"]
    assert "--num_processes 2 --use_fsdp --fsdp_version 2 run_train.py" in command


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def asked(monkeypatch):
    """The launcher's variables; those that the run completes are taken back."""
    for name in (*sharding.WORKING, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(os.environ, name, "")
        del os.environ[name]
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)


def test_on_a_cpu_the_launch_is_refused_in_one_line(asked, tmp_path, capsys):
    assert main(["--output_dir", str(tmp_path / "run"), "--max_steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --use_fsdp has no effect here: accelerate does not shard on a device of type cpu")
    assert "\n" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("FSDP_VERSION", "1", "add --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "leave out --fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--gradient_checkpointing true"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "layer by layer"),
    ],
)
def test_settings_of_fsdp_that_do_not_work_are_refused(asked, monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"does not work here with {name}={value}: .*{remedy}"):
        loop.train(*parse_arguments(["--max_steps", "1"]))


def test_without_a_version_accelerate_would_take_the_first(asked, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION")
    with pytest.raises(UserError, match="FSDP_VERSION=1: add --fsdp_version 2"):
        loop.train(*parse_arguments(["--max_steps", "1"]))


def test_scoring_does_not_shard_and_says_so(asked, tmp_path, capsys):
    from modeling_vit_scratch.training import scoring

    assert scoring.main([str(tmp_path), "--test_dir", str(tmp_path)]) == 2
    assert "only training shards a network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"optim": "muon"}, "--optim muon .* whole matrices"),
        ({"torch_compile": True}, "--torch_compile true"),
        ({"finetune": "lora"}, "--finetune lora"),
        ({"finetune": "head"}, "--finetune head"),
        ({"specimen": "no_scale"}, "--specimen"),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 7}, "use 8 or more"),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 7, "streaming": True}, "use 16 or more"),
    ],
)
def test_recipes_that_cannot_be_sharded_are_refused(fields, text):
    recipe = RECIPES["digits"].replace(**fields)
    sharding.check_recipe(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=2), recipe)
    with pytest.raises(UserError, match=text):
        sharding.check_recipe(SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2), recipe)


def test_bf16_adds_up_in_float32_and_fp16_is_refused():
    state = SimpleNamespace(dynamo_plugin=AcceleratorState().dynamo_plugin, fsdp_plugin=SimpleNamespace())
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, mixed_precision="bf16", state=state)
    sharding.check_launch(accelerator)
    policy = state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    accelerator.mixed_precision = "fp16"
    with pytest.raises(UserError, match="fp16: use bf16 or no"):
        sharding.check_launch(accelerator)
