"""A loop in the way of transformers' run_image_classification_no_trainer.py, for end_to_end.py and same_minutes.py.

accelerate launch benchmarks/example_loop.py --train_file train.parquet --max_steps 100 --output times.json
accelerate launch benchmarks/example_loop.py --train_file train.parquet --test_file test.parquet --minutes 10 \
    --shape micro --output scores.json

As in the example: `datasets` holds encoded images, a transform decodes and augments them one by one with PIL and
torchvision, a DataLoader stacks them, accelerate prepares what trains, AdamW (fused, which the example's Trainer takes
by default) and a linear schedule, `evaluate`'s accuracy. What differs: the network is built from a configuration,
torch may use all cores (the launcher's one thread would halve the speed), and steps are timed. With --minutes their
number is what fits into that time of training, measured once.
"""

import argparse
import json
import os
import time
from pathlib import Path

import datasets
import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peers import PEERS, SHAPES
from sklearn.metrics import accuracy_score
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

UNKNOWN = 10**9  # steps, until those that fit have been measured
NUM_TIMED_STEPS = 40
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Accuracy(evaluate.Metric):
    """`evaluate.load("accuracy")` without the Hub, and like it from scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        columns = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", features=columns)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": accuracy_score(references, predictions)}


def transformed(rows: datasets.Dataset, operations: list, image_column: str) -> datasets.Dataset:
    transform = Compose([*operations, ToTensor(), Normalize(MEAN, STD)])

    def preprocess(batch):
        batch["pixel_values"] = [transform(image.convert("RGB")) for image in batch[image_column]]
        return batch

    return rows.with_transform(preprocess)


def accuracy_of(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    metric = Accuracy()
    model.eval()
    for batch in loader:
        with torch.no_grad():
            predictions = logits_of(model, batch).argmax(-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=predictions, references=references)
    model.train()
    return metric.compute()["accuracy"]


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model(batch["pixel_values"])
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="parquet with columns of images and labels")
    parser.add_argument("--test_file", help="parquet that is scored at the end")
    parser.add_argument("--image_column_name", default="img")
    parser.add_argument("--label_column_name", default="label")
    parser.add_argument("--network", default="transformers", choices=list(PEERS))
    parser.add_argument("--shape", default="d192", choices=list(SHAPES))
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--validation_images", type=int, default=1000)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="of training, instead of --max_steps")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm_up_steps", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--output", required=True, help="a JSON file for the times")
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    accelerator = Accelerator()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = datasets.load_dataset("parquet", data_files=arguments.train_file, split="train")
    parts = rows.train_test_split(test_size=arguments.validation_images, seed=0)
    image, label = arguments.image_column_name, arguments.label_column_name
    train = transformed(parts["train"], [RandomCrop(32, padding=4), RandomHorizontalFlip()], image)
    held = transformed(parts["test"], [], image)

    def collate(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example[label] for example in examples])}

    workers = {"num_workers": arguments.dataloader_num_workers, "collate_fn": collate}
    train_loader = DataLoader(train, shuffle=True, batch_size=arguments.train_batch_size, **workers)
    held_loader = DataLoader(held, batch_size=256, **workers)
    model = PEERS[arguments.network](SHAPES[arguments.shape])
    total_steps = arguments.max_steps if arguments.minutes is None else UNKNOWN
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps))  # get_scheduler("linear")'s
    model, optimizer, train_loader, held_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, held_loader, schedule
    )
    step, evaluating, started, losses = 0, 0.0, None, []
    model.train()
    began = time.perf_counter()
    while step < total_steps:
        for batch in train_loader:
            loss = torch.nn.functional.cross_entropy(logits_of(model, batch).float(), batch["labels"])
            losses.append(loss.detach().float())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % arguments.logging_steps == 0:
                accelerator.print(f"step {step}: loss {torch.stack(losses).mean():.4f}", flush=True)
                losses.clear()
            if step % arguments.eval_steps == 0:
                paused = time.perf_counter()
                accelerator.print(f"step {step}: accuracy {accuracy_of(model, held_loader, accelerator)}", flush=True)
                evaluating += time.perf_counter() - paused if started is not None else 0.0
            if step == arguments.warm_up_steps:
                started = time.perf_counter()
            if total_steps == UNKNOWN and step == arguments.warm_up_steps + NUM_TIMED_STEPS:
                now = time.perf_counter()
                each = (now - started) / NUM_TIMED_STEPS
                total_steps = step + max(0, int((60 * arguments.minutes - (now - began)) / each))
                accelerator.print(f"{total_steps} steps of {each:.3f} s fit into {arguments.minutes:g} minutes")
            if step == total_steps:
                break
    now = time.perf_counter()
    images = (total_steps - arguments.warm_up_steps) * arguments.train_batch_size
    measured = {"images": images, "seconds": now - started, "evaluating": evaluating, "steps": total_steps}
    measured["train_seconds"] = now - began - evaluating
    if arguments.test_file is not None:
        rows = datasets.load_dataset("parquet", data_files=arguments.test_file, split="train")
        loader = accelerator.prepare(DataLoader(transformed(rows, [], image), batch_size=256, **workers))
        measured["test_accuracy"] = accuracy_of(model, loader, accelerator)
    Path(arguments.output).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
