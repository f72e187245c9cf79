"""Which injected bugs the doctor finds, and what it says of healthy networks: two tables.

python benchmarks/doctor_table.py                       under a minute on one core
python benchmarks/doctor_table.py --output doctor.json  keeps the rows too
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from recorded import write_record  # which puts the package of this checkout first
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.doctor import examine
from modeling_vit_scratch.specimens import SPECIMENS, HealthyViT

SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
NUM_LABELS = 10


def ours(preset: str, **fields: Any) -> nn.Module:
    config = ViTScratchConfig.from_preset(preset, **{"num_labels": NUM_LABELS, **fields})
    return ViTScratchForImageClassification(config)


# network -> (factory, image size, channels)
HEALTHY: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "specimens.HealthyViT": (HealthyViT, 16, 3),
    "ours, nano": (lambda: ours("nano"), 32, 3),
    "ours, digits": (lambda: ours("digits"), 8, 1),
    "ours, article_2, small": (lambda: ours("article_2", image_size=32, patch_size=8, **SMALL), 32, 3),
    "ours, post-norm": (lambda: ours("nano", pre_norm=False), 32, 3),
    "transformers ViT": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=32, patch_size=8, num_labels=NUM_LABELS, **SMALL)
        ),
        32,
        3,
    ),
    "timm VisionTransformer": (
        lambda: timm.models.VisionTransformer(32, 8, embed_dim=48, depth=4, num_heads=4, num_classes=NUM_LABELS),
        32,
        3,
    ),
    "torchvision VisionTransformer": (
        lambda: torchvision.models.VisionTransformer(32, 8, 4, 4, 48, 96, num_classes=NUM_LABELS),
        32,
        3,
    ),
}


def measured(module: nn.Module, image_size: int, num_channels: int, optimizer: Any) -> dict[str, Any]:
    """The names of the checks that failed and that did not apply, and the seconds."""
    began = time.perf_counter()
    findings = examine(module, image_size, NUM_LABELS, num_channels, optimizer)
    return {
        "failed": [finding.check for finding in findings if finding.passed is False],
        "not_applicable": [finding.check for finding in findings if finding.passed is None],
        "seconds": round(time.perf_counter() - began, 2),
    }


def bug_rows(seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, specimen in SPECIMENS.items():
        torch.manual_seed(seed)
        module = specimen.build()
        optimizer = torch.optim.AdamW(module.parameters()) if specimen.optimizer is None else specimen.optimizer(module)
        row = {"bug": name, "origin": specimen.origin, "check": specimen.check}
        row |= measured(module, specimen.image_size, 3, optimizer)
        rows.append({**row, "found": bool(row["failed"]), "named": specimen.check in row["failed"]})
    return rows


def clean_rows(seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, (make, image_size, num_channels) in HEALTHY.items():
        torch.manual_seed(seed)
        module = make()
        row = measured(module, image_size, num_channels, torch.optim.AdamW(module.parameters()))
        rows.append({"network": name, **row, "clean": not row["failed"]})
    return rows


def tables(bugs: list[dict[str, Any]], clean: list[dict[str, Any]]) -> str:
    yes = {True: "yes", False: "NO"}
    lines = ["| bug | met in | found | named by | other checks that failed |", "|---|---|---|---|---|"]
    for row in bugs:
        others = ", ".join(check for check in row["failed"] if check != row["check"])
        named = f"`{row['check']}`" if row["named"] else "NOT NAMED"
        lines.append(f"| {row['bug']} | {row['origin']} | {yes[row['found']]} | {named} | {others} |")
    lines += ["", "| healthy network | clean | failed | not applicable |", "|---|---|---|---|"]
    for row in clean:
        failed, other = (", ".join(row[key]) for key in ("failed", "not_applicable"))
        lines.append(f"| {row['network']} | {yes[row['clean']]} | {failed} | {other} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="the JSON to write beside what is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bugs, clean = bug_rows(arguments.seed), clean_rows(arguments.seed)
    print(tables(bugs, clean))
    if arguments.output is not None:
        write_record(arguments.output, "doctor_table.py", sys.argv[1:], seed=arguments.seed, bugs=bugs, clean=clean)


if __name__ == "__main__":
    main()
