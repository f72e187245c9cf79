"""Parameters sharded over GPUs: FSDP2 (2304.11277; torch's fully_shard), by accelerate launch --use_fsdp.

A process keeps a slice of each parameter, of its moments and of its average, and has a layer whole only while that
layer computes. What is written holds tensors whole, so that a checkpoint does not tell how it came about.
"""

import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .recipe import Recipe

LAYER = "ViTScratchLayer"  # what is gathered, computed and given up at a time
# accelerate's variable -> (the values that work here, what else to do)
WORKING: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "add --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "leave out --fsdp_offload_params"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "run_train.py's own --gradient_checkpointing true does it"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "the network is sharded layer by layer; leave it out"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((LAYER.lower(),), "the network is sharded layer by layer; leave it out"),
    "FSDP_IGNORED_MODULES": ((), "leave out --fsdp_ignored_modules"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "leave out --use_parallelism_config"),
}
REMEDY = "accelerate launch --use_fsdp --fsdp_version 2 --num_processes N run_train.py, on GPUs"


def is_asked() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


# ---------------------------------------------------------------- what is refused


def set_up_environment():
    """Completes what the launcher told accelerate, before there is an Accelerator.

    Raises UserError for FSDP's first version and for settings that do not work here.
    """
    environment = os.environ
    environment.setdefault("FSDP_VERSION", "1")  # what accelerate would take
    environment.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    environment.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", LAYER)
    # the launcher's default, and only for networks that are read by one process: here each makes or reads the same one
    environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    for name, (values, remedy) in WORKING.items():
        value = environment.get(name)
        if value is not None and value.lower() not in values:
            raise UserError(f"--use_fsdp does not work here with {name}={value}: {remedy}.")


def check_launch(accelerator: Accelerator):
    """Raises UserError where parameters are not sharded though the launcher was told to, and for fp16 and compilers."""
    if not is_sharded(accelerator):
        raise UserError(
            f"--use_fsdp has no effect here: accelerate does not shard on a device of type {accelerator.device.type}, "
            f"where each process would keep the whole network. Leave it out, or use {REMEDY}."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        precision = accelerator.mixed_precision
        raise UserError(f"--use_fsdp does not work here with --mixed_precision {precision}: use bf16 or no.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError("--use_fsdp does not work here with --dynamo_backend: leave one of them out.")
    if accelerator.mixed_precision == "bf16":
        # accelerate's own policy adds gradients up over processes in bfloat16; without FSDP they are float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def check_recipe(accelerator: Accelerator, recipe: Recipe):
    """Raises UserError for what a sharded run cannot do; nothing for a run that is not sharded."""
    if not is_sharded(accelerator):
        return
    refused = {
        "--optim muon": (recipe.optim == "muon", "it needs whole matrices; use --optim adamw"),
        "--torch_compile true": (recipe.torch_compile, "leave one of them out"),
        "--specimen": (recipe.specimen is not None, "leave out --use_fsdp"),
        f"--finetune {recipe.finetune}": (
            recipe.finetune in ("head", "lora"),
            "so little is trained that only the weights would be shared out; leave out --use_fsdp",
        ),
    }
    for flag, (is_chosen, remedy) in refused.items():
        if is_chosen:
            raise UserError(f"{flag} does not work with --use_fsdp: {remedy}.")
    world_size = accelerator.num_processes
    num_parts = -(-recipe.gradient_accumulation_steps // world_size)
    # all gather a layer together, so each process needs an image for each part
    least = world_size * num_parts * images_for_each(recipe, world_size)
    if recipe.train_batch_size < least:
        raise UserError(
            f"--train_batch_size {recipe.train_batch_size} is too small for {world_size} processes with --use_fsdp and "
            f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps}: use {least} or more."
        )


def images_for_each(recipe: Recipe, world_size: int) -> int:
    """A batch's images for each process, with which every process has one: streams give them out less evenly, least so
    where processes do not divide the lanes, for some then have one more of them, at the end of an epoch too."""
    return (3 if recipe.stream_lanes % world_size else 2) if recipe.streaming else 1


def check_shares(recipe: Recipe, world_size: int, num_samples: int):
    """Raises UserError where a process would have no image of a batch, or no part of a stream."""
    batch_size, lanes = recipe.train_batch_size, recipe.stream_lanes
    if batch_size < world_size * images_for_each(recipe, world_size):
        raise UserError(f"--train_batch_size {batch_size} is too small for {world_size} processes.")
    if recipe.streaming and world_size > lanes:
        raise UserError(f"{world_size} processes share {lanes} lanes: set --stream_lanes {2 * world_size}.")
    if recipe.streaming and world_size > num_samples:
        raise UserError(f"{world_size} processes cannot share a stream of {num_samples} images.")


# ---------------------------------------------------------------- tensors, whole and in shards


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this one is a shard of; itself where it is none. All processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, torch.Tensor], is_kept: bool) -> dict[str, torch.Tensor]:
    """The tensors, whole and on the CPU, one gathered after the other; nothing where they are not kept.

    All processes take part, with the same names in the same order.
    """
    kept = {}
    for name, tensor in tensors.items():
        complete = full_tensor(tensor.detach())
        if is_kept:
            kept[name] = complete.cpu().contiguous()
    return kept


def shared_out(tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of whole tensors, which every process has, its own shards, cut as the tensors of the same names in `like`."""
    return {name: own_shard(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def own_shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, cut as `like` is; itself where that is whole or of another shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:  # the count of Adam's steps is in no shards
        return tensor
    # without a source: every process cuts its own, and none waits for another
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local_tensors(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What of the parameters lies in this process."""
    data = [parameter.data for parameter in parameters]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in data]


# ---------------------------------------------------------------- networks


def prepare(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """Both, ready to train as the launcher said: in place where that is in shards, which the optimizer then has too.

    Raises UserError for a network without layers to shard.
    """
    if is_sharded(accelerator) and not any(type(module).__name__ == LAYER for module in network.modules()):
        raise UserError("--use_fsdp shards layer by layer, and this network has no layers: leave it out.")
    # its embeddings give a view that nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return accelerator.prepare(network, optimizer)


def shard_like_the_trained(accelerator: Accelerator, model: torch.nn.Module):
    """Shards a copy of a network, in place, as `prepare` shards the network itself."""
    if is_sharded(accelerator):
        fsdp2_prepare_model(accelerator, model)


def reshard(model: torch.nn.Module):
    """Gives up the layers that are still whole after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_in_shards(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole_network(model: ViTScratchForImageClassification, is_kept: bool) -> ViTScratchForImageClassification | None:
    """A network with the weights whole: itself where they are; else a new one on the CPU, or None if not kept.

    All processes take part.
    """
    if not is_in_shards(model):
        return model
    tensors = gathered(model.state_dict(), is_kept)
    if not is_kept:
        return None
    with torch.device("meta"):
        plain = ViTScratchForImageClassification(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()
