"""What augmenting a batch costs, ours beside kornia's and torchvision's, as a share of a training step.

python benchmarks/augmentation.py                                            prints two tables
python benchmarks/augmentation.py --precisions no --output benchmarks/results/augmentation-cpu.json
python benchmarks/augmentation.py --device cuda --output benchmarks/results/augmentation-gpu.json

A batch of 128 images of 32 x 32 pixels. All candidates and the training step (vit_lite_7_4: forward, backward, AdamW)
take turns in one process; each number is the median over the rounds. kornia takes floats and gets them ready-made.
The second table is measured too: a batch of identical images tells whether a draw is made for each of them.
Needs kornia, which is no dependency of the package: pip install kornia==0.9.0
"""

import argparse
import inspect
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from recorded import write_record  # which puts the package of this checkout first
from torchvision.transforms import InterpolationMode, v2
from train_step import PRECISION_NAMES

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data.augmentation import Augmentation, Draws, Mixing

try:
    import kornia.augmentation as K
    from kornia.augmentation import auto
except ImportError:
    sys.exit("This comparison needs kornia: pip install kornia==0.9.0")

BATCH_SIZE, SIZE, NUM_LABELS, PRESET = 128, 32, 10, "vit_lite_7_4"
OURS, KORNIA, SINGLY, AT_ONCE = "ours", "kornia", "torchvision, image by image", "torchvision, once a batch"
CANDIDATES = (OURS, KORNIA, SINGLY, AT_ONCE)
NUM_PROBES = 20  # batches of identical images that the table of draws looks at


def our_candidates() -> dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]]:
    """By task: a function of uint8 images (normalised floats where the last three are concerned), labels and step."""
    positions = torch.arange(BATCH_SIZE)

    def augment(**fields):
        augmentation = Augmentation(**fields)
        return lambda images, labels, step: augmentation(images, Draws(0, step, BATCH_SIZE, positions))

    def mix(**fields):
        mixing = Mixing(**fields)
        return lambda images, labels, step: mixing(images, labels, Draws(0, step, BATCH_SIZE, positions), NUM_LABELS)[0]

    erasing = Augmentation(random_erasing_prob=0.25)
    return {
        "flip and padded crop": augment(horizontal_flip_prob=0.5, crop_padding=4),
        "random resized crop": augment(random_resized_crop_scale=0.2),
        "rotation": augment(rotation_degrees=15),
        "AutoAugment, CIFAR-10": augment(auto_augment="autoaugment_cifar10"),
        "AutoAugment, ImageNet": augment(auto_augment="autoaugment_imagenet"),
        "RandAugment (2, 9)": augment(auto_augment="randaugment"),
        "TrivialAugment": augment(auto_augment="trivialaugment"),
        "3-Augment": augment(auto_augment="three_augment"),
        "colour jitter": augment(color_jitter=0.3),
        "random erasing": lambda images, labels, step: erasing.erase(images, Draws(0, step, BATCH_SIZE, positions)),
        "mixup": mix(mixup_alpha=0.8),
        "CutMix": mix(cutmix_alpha=1.0),
    }


def kornia_candidates() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CutMix's former lambda, which is not used
        cutmix = K.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    return {
        "flip and padded crop": torch.nn.Sequential(
            K.RandomHorizontalFlip(p=0.5), K.RandomCrop((SIZE, SIZE), padding=4)
        ),
        "random resized crop": K.RandomResizedCrop((SIZE, SIZE), scale=(0.2, 1.0)),
        "rotation": K.RandomRotation(15.0, p=1.0),
        "AutoAugment, CIFAR-10": auto.AutoAugment("cifar10"),
        "AutoAugment, ImageNet": auto.AutoAugment("imagenet"),
        "RandAugment (2, 9)": auto.RandAugment(n=2, m=9),
        "TrivialAugment": auto.TrivialAugment(),
        "3-Augment": K.ImageSequential(
            K.RandomGrayscale(p=1.0),
            K.RandomSolarize(thresholds=0.0, additions=0.0, p=1.0),  # kornia draws around a threshold of 0.5
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=1.0),
            random_apply=1,
        ),
        "colour jitter": K.ColorJitter(0.3, 0.3, 0.3, p=1.0),
        "random erasing": K.RandomErasing(p=0.25),
        "mixup": K.RandomMixUpV2(data_keys=["input", "class"]),
        "CutMix": cutmix,
    }


def torchvision_candidates() -> dict[str, Any]:
    grey = [128.0] * 3
    return {
        "flip and padded crop": v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(SIZE, padding=4)]),
        "random resized crop": v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        "rotation": v2.RandomRotation(15, interpolation=InterpolationMode.BILINEAR),
        "AutoAugment, CIFAR-10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=grey),
        "AutoAugment, ImageNet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=grey),
        "RandAugment (2, 9)": v2.RandAugment(2, 9, fill=grey),
        "TrivialAugment": v2.TrivialAugmentWide(fill=grey),
        "3-Augment": v2.RandomChoice(
            [v2.Grayscale(num_output_channels=3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(13, (0.1, 2.0))]
        ),
        "colour jitter": v2.ColorJitter(0.3, 0.3, 0.3),
        "random erasing": v2.RandomErasing(0.25, value="random"),
        "mixup": v2.MixUp(alpha=0.8, num_classes=NUM_LABELS),
        "CutMix": v2.CutMix(alpha=1.0, num_classes=NUM_LABELS),
    }


FLOAT_TASKS = ("random erasing", "mixup", "CutMix")  # done to normalised floats
MIXING_TASKS = ("mixup", "CutMix")


def runners() -> dict[tuple[str, str], Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]]:
    """By (task, candidate): a function of images, labels and step that returns the images."""
    table = {}
    ours, theirs, vision = our_candidates(), kornia_candidates(), torchvision_candidates()
    for task in ours:
        table[task, OURS] = ours[task]
        if task in MIXING_TASKS:  # both return images and labels
            table[task, KORNIA] = lambda images, labels, step, run=theirs[task]: run(images, labels)[0]
            table[task, AT_ONCE] = lambda images, labels, step, run=vision[task]: run(images, labels)[0]
        else:
            table[task, KORNIA] = lambda images, labels, step, run=theirs[task]: run(images)
            table[task, SINGLY] = lambda images, labels, step, run=vision[task]: torch.stack([run(i) for i in images])
            table[task, AT_ONCE] = lambda images, labels, step, run=vision[task]: run(images)
    return table


def input_of(task: str, candidate: str, images: torch.Tensor) -> torch.Tensor:
    """uint8 as they come; floats for what is done after normalisation; for kornia floats in [0, 1]."""
    return images.float() / 255 if candidate == KORNIA or task in FLOAT_TASKS else images


# ---------------------------------------------------------------- time


class TrainingStep:
    """Forward, backward and AdamW on one batch, in float32 or under bf16 autocast."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, is_bf16: bool):
        torch.manual_seed(0)
        config = ViTScratchConfig.from_preset(PRESET, num_labels=NUM_LABELS)
        self.model = ViTScratchForImageClassification(config).to(images.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.pixels, self.labels, self.is_bf16 = images.float() / 127.5 - 1, labels, is_bf16

    def __call__(self):
        with torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=self.is_bf16):
            logits = self.model(pixel_values=self.pixels).logits
        torch.nn.functional.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1000 * (time.perf_counter() - start)


def measure_time(
    device: torch.device, rounds: int, precisions: list[str]
) -> tuple[dict[tuple[str, str], list[float]], dict[str, list[float]]]:
    """Milliseconds of each round, by (task, candidate), and of training steps, by precision."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH_SIZE, 3, 4, 4), dtype=torch.uint8, generator=generator)
    images = v2.functional.resize(images, [SIZE, SIZE]).to(device)
    labels = (torch.arange(BATCH_SIZE) % NUM_LABELS).to(device)
    table = runners()
    inputs = {key: input_of(*key, images) for key in table}
    steps = {PRECISION_NAMES[name]: TrainingStep(images, labels, name == "bf16") for name in precisions}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in table}
    step_times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-3, rounds):  # the first three warm up
        for key, run in table.items():
            spent = milliseconds(lambda run=run, key=key, n=number: run(inputs[key], labels, n), device)
            if number >= 0:
                times[key].append(spent)
        for name, step in steps.items():
            if number % 5 == 0 or number < 0:
                spent = milliseconds(step, device)
                if number >= 0:
                    step_times[name].append(spent)
    return times, step_times


# ---------------------------------------------------------------- draws


def measure_draws(device: torch.device) -> list[dict[str, Any]]:
    """Of each task and candidate what its draws are like, found by calling it."""
    image = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = v2.functional.resize(image, [SIZE, SIZE]).to(device)
    same = image.expand(BATCH_SIZE, -1, -1, -1).contiguous()
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64, device=device)
    # mixing needs images that differ: image i is 1 at its pixel i alone, or i everywhere, and a mix tells what is in it
    marks = torch.eye(BATCH_SIZE, 3 * SIZE * SIZE, device=device).view(-1, 3, SIZE, SIZE)
    numbers = torch.arange(BATCH_SIZE, device=device).float()[:, None, None, None].expand_as(marks).contiguous()
    rows = []
    objects = {KORNIA: kornia_candidates(), SINGLY: torchvision_candidates(), AT_ONCE: torchvision_candidates()}
    for (task, candidate), run in runners().items():
        batch = {"mixup": marks, "CutMix": numbers}.get(task)
        batch = input_of(task, candidate, same) if batch is None else batch
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        before = global_states()
        counts, is_alone = [], True
        for probe in range(NUM_PROBES):
            counts.append(num_results(run(batch, labels, probe), task))
        is_alone = before == global_states()
        operation = objects.get(candidate, {}).get(task)
        takes_generator = candidate == OURS or any(
            "generator" in inspect.signature(part).parameters for part in (type(operation), operation.forward)
        )
        rows.append({
            "task": task, "candidate": candidate, "least_distinct": min(counts), "most_distinct": max(counts),
            "takes_seed_or_generator": takes_generator, "leaves_global_generators_alone": is_alone,
            "repeats": repeats(run, batch, labels), "uint8_becomes": uint8_result(run, same, labels, task),
        })  # fmt: skip
    return rows


def num_results(results: torch.Tensor, task: str) -> int:
    """Distinct images among the results; of mixup distinct own shares, of CutMix distinct boxes."""
    flat = results.flatten(1).float()
    if task == "mixup":
        return len(torch.unique((flat.diagonal() * 1e4).round()))
    if task == "CutMix":
        flat = (flat != torch.arange(BATCH_SIZE, device=flat.device)[:, None]).float()
    return len(torch.unique(flat, dim=0))


def global_states() -> tuple[bytes, bytes, int]:
    torch_state = torch.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available():
        torch_state += torch.cuda.get_rng_state().numpy().tobytes()
    return torch_state, np.random.get_state()[1].tobytes(), hash(random.getstate())


def repeats(run: Callable[..., torch.Tensor], batch: torch.Tensor, labels: torch.Tensor) -> str:
    """Of what the same result comes again: of its own arguments, of the global generator's seed, or of neither."""
    if all(torch.equal(run(batch, labels, step), run(batch, labels, step)) for step in range(NUM_PROBES)):
        return "its seed and step"
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(batch, labels, 1))
    return "the global seed" if torch.equal(*results) else "nothing"


def uint8_result(run: Callable[..., torch.Tensor], batch: torch.Tensor, labels: torch.Tensor, task: str) -> str:
    if task in FLOAT_TASKS:
        return "floats only"
    try:
        return str(run(batch, labels, 0).dtype).removeprefix("torch.")
    except Exception as error:  # whatever a library raises at bytes is the finding
        return type(error).__name__


# ---------------------------------------------------------------- tables


def time_table(times: dict[tuple[str, str], list[float]], steps: dict[str, list[float]]) -> str:
    medians = {key: statistics.median(values) for key, values in times.items()}
    step = {name: statistics.median(values) for name, values in steps.items()}
    taken = ", ".join(f"{value:.0f} ms in {name}" for name, value in step.items())
    shares = " | ".join(f"ours, share of a step in {name}" for name in step)
    lines = [
        f"Milliseconds a batch of {BATCH_SIZE} images of {SIZE} px (a step of {PRESET}: {taken})",
        "",
        f"| | {' | '.join(CANDIDATES)} | ours, images/s | {shares} |",
        "|---" * (len(CANDIDATES) + 2 + len(step)) + "|",
    ]
    for task in dict.fromkeys(task for task, _ in medians):
        cells = [f"{medians[task, name]:.2f}" if (task, name) in medians else "—" for name in CANDIDATES]
        ours = medians[task, OURS]
        cells += [f"{1000 * BATCH_SIZE / ours:,.0f}", *(f"{100 * ours / value:.1f} %" for value in step.values())]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draws_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Distinct results in a batch of {BATCH_SIZE} identical images, least and most of {NUM_PROBES} batches; for "
        "mixup and CutMix distinct shares and boxes",
        "",
        "| | candidate | distinct | takes a seed or generator | leaves the global generators alone | "
        "repeats with | uint8 becomes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        answers = ["yes" if row[name] else "no" for name in list(row)[4:6]]
        cells = [row["task"], row["candidate"], f"{row['least_distinct']} to {row['most_distinct']}", *answers]
        lines.append(f"| {' | '.join([*cells, row['repeats'], row['uint8_becomes']])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch [2]")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each number [40]")
    parser.add_argument("--precisions", default="no,bf16", help="of the step: no (float32) and bf16, with commas")
    parser.add_argument("--output", metavar="FILE", help="write the measurements there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, load_before = torch.device(arguments.device), os.getloadavg()[0]
    times, steps = measure_time(device, arguments.rounds, arguments.precisions.split(","))
    rows = measure_draws(device)
    print(time_table(times, steps), draws_table(rows), sep="\n\n")
    if arguments.output:
        write_record(
            arguments.output, "augmentation.py", sys.argv[1:], device.type,
            load_before=load_before, load_after=os.getloadavg()[0],
            batch_size=BATCH_SIZE, image_size=SIZE, preset=PRESET, rounds=arguments.rounds,
            step_milliseconds={name: summary(values) for name, values in steps.items()},
            milliseconds=[
                {"task": task, "candidate": name, **summary(values)} for (task, name), values in times.items()
            ],
            draws=rows,
        )  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": round(statistics.median(values), 3), "quarter": round(low, 3), "three_quarters": round(high, 3)}


if __name__ == "__main__":
    main()
