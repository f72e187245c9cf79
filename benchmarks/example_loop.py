"""A loop in the way of transformers' run_image_classification_no_trainer.py, for end_to_end.py to compare with.

accelerate launch benchmarks/example_loop.py --train_file train.parquet --max_steps 100 --output times.json

As in the example: `datasets` holds encoded images, a transform decodes and augments them one by one with PIL and
torchvision, a DataLoader stacks them, accelerate prepares what trains, AdamW (fused, which the example's Trainer takes
by default) and a linear schedule, `evaluate`'s accuracy. What differs: the network is built from a configuration,
torch may use all cores (the launcher's one thread would halve the speed), and steps are timed.
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
from peers import PEERS, SHAPES
from sklearn.metrics import accuracy_score
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from transformers import get_scheduler

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="parquet with columns of images and labels")
    parser.add_argument("--image_column_name", default="img")
    parser.add_argument("--label_column_name", default="label")
    parser.add_argument("--network", default="transformers", choices=list(PEERS))
    parser.add_argument("--shape", default="d192", choices=list(SHAPES))
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--validation_images", type=int, default=1000)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--warm_up_steps", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--output", required=True, help="a JSON file for the times")
    arguments = parser.parse_args()

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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=arguments.max_steps)
    model, optimizer, train_loader, held_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, held_loader, schedule
    )
    metric = Accuracy()
    step, evaluating, started, losses = 0, 0.0, None, []
    model.train()
    while step < arguments.max_steps:
        for batch in train_loader:
            outputs = model(batch["pixel_values"])
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
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
                model.eval()
                for held_batch in held_loader:
                    with torch.no_grad():
                        outputs = model(held_batch["pixel_values"])
                    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
                    predictions, references = accelerator.gather_for_metrics((logits.argmax(-1), held_batch["labels"]))
                    metric.add_batch(predictions=predictions, references=references)
                accelerator.print(f"step {step}: {metric.compute()}", flush=True)
                model.train()
                evaluating += time.perf_counter() - paused if started is not None else 0.0
            if step == arguments.warm_up_steps:
                started = time.perf_counter()
            if step == arguments.max_steps:
                break
    images = (arguments.max_steps - arguments.warm_up_steps) * arguments.train_batch_size
    seconds = time.perf_counter() - started
    Path(arguments.output).write_text(json.dumps({"images": images, "seconds": seconds, "evaluating": evaluating}))


if __name__ == "__main__":
    main()
