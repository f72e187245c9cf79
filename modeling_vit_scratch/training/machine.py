"""The machine a run is on: processes, threads, precision, and what results.json records of them."""

import ctypes
import importlib.metadata
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)

from ..data.decoding import Decoder
from ..errors import PassingError, UserError
from ..weights.pixels import SMALL
from . import sharding
from .recipe import PLACES, Recipe

Result = TypeVar("Result")

LAUNCHERS = ("accelerate", "torchrun")
PR_SET_PDEATHSIG = 1  # sys/prctl.h
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
NUM_TURNS = 5  # that a product is timed
WORTH_A_WARNING = 1.3  # times the seconds of float32
LONGEST_WAIT = timedelta(hours=3)  # for the process that downloads, decodes or writes; NCCL's own is ten minutes


def check_launch(num_processes: int):
    """Raises UserError where the launcher was asked for several processes and started fewer, in silence."""
    environment = os.environ
    asked = environment.get("WORLD_SIZE")
    remedy = (
        "On CPUs: ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_config.yaml --num_processes N "
        "run_train.py. On GPUs: accelerate launch --config_file accelerate_config.yaml --num_processes N run_train.py."
    )
    if asked is not None and int(asked) != num_processes:
        raise UserError(f"{asked} processes were launched, but each of them is on its own ({num_processes}). {remedy}")
    if asked is None and _is_meant_for_several():
        raise UserError(f"Several processes were asked for, but the launcher started one. {remedy}")


def launcher() -> psutil.Process | None:
    """The launcher that started this process, if one did and may be looked at."""
    try:
        parent = psutil.Process().parent()
        words = [Path(word).name for word in parent.cmdline()[:3]] if parent is not None else []
    except psutil.Error:  # the parent's affairs may be nobody else's
        return None
    return parent if any(name in words for name in LAUNCHERS) else None


def end_with_launcher():
    """Has the kernel (Linux) send SIGTERM when the launcher dies, by a signal say: without torchrun it tells nobody."""
    if sys.platform == "linux" and launcher() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_meant_for_several() -> bool:
    """Whether the launcher itself, and not the shell around it, named a place where processes meet."""
    parent = launcher()
    if parent is None or "MASTER_ADDR" not in os.environ:
        return False
    try:
        return "MASTER_ADDR" not in parent.environ()
    except psutil.Error:
        return True


def keep_freed_memory():
    """Lets glibc keep what the process frees: activations, which it would fetch from the kernel anew in each step.

    A step of a small network on a CPU spends a fifth of its time on that (benchmarks/NOTES.md). Other systems and C
    libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            library.mallopt(option, 2**30)


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_accelerator(
    trackers: list[str], output_dir: Path, cpu_threads: int | None, trains: bool = False
) -> Accelerator:
    """The Accelerator, after the guard against launches that went wrong, with threads set and said.

    trains: what is started may be sharded. `accelerate launch` exports OMP_NUM_THREADS=1, which would leave all cores
    but one idle.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1"):
            flag = f"--use_{engine.lower()}"
            raise UserError(f"{flag} is not supported: leave it out, or take --use_fsdp to share parameters out.")
    if sharding.is_asked():
        if not trains:
            raise UserError("--use_fsdp has no effect here: only training shards a network. Leave it out.")
        sharding.set_up_environment()
    if trains:
        end_with_launcher()
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir))
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
    ]
    # TensorBoard would lie in a folder of the project's name, which is what the others get
    chosen = [TensorBoardTracker(name, str(output_dir)) if name == "tensorboard" else name for name in trackers]
    accelerator = Accelerator(log_with=chosen or None, project_config=project, kwargs_handlers=handlers)
    check_launch(accelerator.num_processes)
    if sharding.is_asked():
        sharding.check_launch(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no.")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = cpu_threads or max(1, num_cores() // local_processes)
    torch.set_num_threads(threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    shards = ", parameters sharded over them (FSDP2)" if sharding.is_sharded(accelerator) else ""
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}{shards}, {threads} thread(s) each, "
        f"precision {accelerator.mixed_precision}"
    )
    if warning := precision_warning(accelerator):
        print(warning)
    return accelerator


def precision_warning(accelerator: Accelerator) -> str | None:
    """What to use instead where bf16 was asked for and is the slower one, as the main process finds it; else None."""
    if not accelerator.is_main_process or accelerator.mixed_precision != "bf16":
        return None
    if accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "This GPU has no units for bf16 and emulates it, slowly. Use --mixed_precision fp16."
    if accelerator.device.type == "cpu" and (slowdown := bf16_slowdown()) > WORTH_A_WARNING:
        return (
            f"bf16 is slower than float32 on this processor: matrix products take {slowdown:.1f} times as long. Leave "
            "out --mixed_precision bf16."
        )
    return None


def bf16_slowdown() -> float:
    """Seconds of matrix products in bf16 over those in float32, on one thread of the CPU: measured in about 0.2 s.

    Less than one with AMX or AVX-512 bf16; twenty and more where there is no unit for it, as in most laptops.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where the machine is busy
    fastest = []
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(2, 256, 256, dtype=dtype)
        taken = []
        for _ in range(NUM_TURNS):
            start = time.perf_counter()
            left @ right.t() @ right  # a linear layer's, and the gradient of its input
            taken.append(time.perf_counter() - start)
        fastest.append(min(taken))
    torch.set_num_threads(num_threads)
    return fastest[0] / fastest[1]


def refuse_precision(accelerator: Accelerator, recipe: Recipe):
    """Raises UserError for a --dtype, --tf32 or --full_determinism that has no place on this device or with this
    precision; sets the last two."""
    device = accelerator.device.type
    if recipe.dtype == "float64" and (accelerator.mixed_precision != "no" or device == "mps"):
        where = "on Apple's GPUs" if device == "mps" else f"with --mixed_precision {accelerator.mixed_precision}"
        raise UserError(f"--dtype float64 does not work {where}.")
    if recipe.tf32 and device != "cuda":
        raise UserError(f"--tf32 has no effect here: the device is {device}, not CUDA.")
    if recipe.tf32:
        torch.set_float32_matmul_precision("high")
    if recipe.full_determinism and device == "cpu":
        raise UserError("--full_determinism has no effect here: on a CPU every run gives the same bits.")
    if recipe.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first called
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch names what has no such algorithm


def first_on_each_node(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """What `act` gives, done by one process of each node before the others; no process waits for one that failed.

    A UserError that any of them meets, even one alone, is raised in all.
    """
    result, wrong = None, None
    for is_first in (True, False):
        if accelerator.is_local_main_process is is_first:
            try:
                result = act()
            except UserError as error:
                wrong = _told(error)
        accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        wrong = next((told for told in gather_object([wrong]) if told is not None), None)
    if wrong is not None:
        raise _error(*wrong)
    return result


def agree(accelerator: Accelerator, decide: Callable[[], Result]) -> Result:
    """What the main process decides, in every process; a UserError of its is raised in all of them."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = _told(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise _error(*outcome[1])
    return outcome[0]


def _told(error: UserError) -> tuple[bool, str]:
    """What other processes are told of an error: whether it passes, and its text."""
    return isinstance(error, PassingError), str(error)


def _error(passes: bool, text: str) -> UserError:
    return PassingError(text) if passes else UserError(text)


def gather_batch(
    accelerator: Accelerator, images: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images, labels, positions) of all ranks together, from each rank's own; positions stay on the CPU."""
    columns = [images, labels, positions.to(accelerator.device)]
    # ranks may hold one image more or less: rows of padding have position -1
    columns = [accelerator.gather(accelerator.pad_across_processes(c, pad_index=-1)) for c in columns]
    kept = (columns[2] >= 0).nonzero()[:, 0]
    images, labels, positions = (column[kept] for column in columns)
    return images, labels, positions.cpu()


def in_sample_order(accelerator: Accelerator, columns: list[torch.Tensor]) -> list[torch.Tensor]:
    """The rows of all ranks together, sorted by the first column, which says the sample of each, in every process."""
    if accelerator.num_processes > 1:  # ranks may hold one sample more or less: rows of padding have sample -1
        columns = [accelerator.gather(accelerator.pad_across_processes(c, pad_index=-1)) for c in columns]
    order = columns[0].argsort()
    order = order[columns[0][order] >= 0]
    return [column[order] for column in columns]


def num_decoding_workers(decoder: Decoder, device: torch.device, asked: int | None = None) -> int:
    """Processes that decode: as asked; else none for small images, which decode faster than they train, and for
    photographs one a thread, one less for who feeds a GPU."""
    if asked is not None:
        return asked
    if not decoder.processor.do_center_crop and max(decoder.size) <= SMALL:
        return 0
    # as many as cores though they train too: flowers at 224 px, a network of 4 layers of 192, 2 shared CPU cores:
    # 0, 1 and 2 workers gave 5, 7 and 9 images/s
    return min(16, max(1, torch.get_num_threads() - (device.type != "cpu")))


def command(accelerator: Accelerator, recipe: Recipe, chosen: frozenset[str]) -> str:
    """The command that repeats this run, as a person would type it; where it was written to is nobody's business."""
    launch = ["accelerate", "launch"]
    if accelerator.num_processes > 1:
        launch += ["--config_file", "accelerate_config.yaml", "--num_processes", str(accelerator.num_processes)]
    if sharding.is_sharded(accelerator):
        launch += ["--use_fsdp", "--fsdp_version", "2"]
    if accelerator.mixed_precision != "no":
        launch += ["--mixed_precision", accelerator.mixed_precision]
    words = [*launch, "run_train.py", "--recipe", recipe.recipe]
    for name in sorted(chosen - PLACES):
        value = getattr(recipe, name)
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    on_cpus = accelerator.device.type == "cpu" and accelerator.num_processes > 1
    return ("ACCELERATE_USE_CPU=true " if on_cpus else "") + shlex.join(words)


def versions() -> dict[str, str]:
    names = (
        "torch", "torchvision", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "numpy",
        "peft",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    accelerators = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": accelerators,
        "processor": _processor(),
        "cores": num_cores(),
        "threads_per_process": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit of the checkout that this code lies in, or None where it was installed from a wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty.strip() else "")
