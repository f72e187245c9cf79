"""What each way of fine-tuning trains and has to keep: parameters, their share, and the size of the files as written.

python benchmarks/finetuning_sizes.py
python benchmarks/finetuning_sizes.py --presets vit_s_16 --num_labels 102 --lora_r 16 \
    --output benchmarks/results/finetuning-sizes.json

"what was trained" is one safetensors file of the trained parameters, for LoRA the folder adapter/, which peft loads;
"the whole model" is the folder's model.safetensors, into which LoRA is merged. Networks are drawn at random: sizes do
not depend on the weights.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from recorded import write_record
from safetensors.torch import save_file
from transformers.utils import logging

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.training.finetuning import (
    has_adapter,
    merged,
    prepare_finetuning,
    save_adapter,
)
from modeling_vit_scratch.training.recipes import RECIPES

MODES = (
    {"finetune": "full"},
    {"finetune": "attention"},
    {"finetune": "last:2"},
    {"finetune": "lora", "lora_target_modules": "all-linear"},
    {"finetune": "lora"},
    {"finetune": "head"},
)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(preset: str, num_labels: int, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row: what is trained of the preset's network, and the bytes of what is written to `folder`."""
    model = ViTScratchForImageClassification(ViTScratchConfig.from_preset(preset, num_labels=num_labels))
    recipe = RECIPES["finetune"].replace(**fields)
    finetuning = prepare_finetuning(model, recipe)
    trained, whole = folder / "adapter", folder / "model"
    if has_adapter(model):
        save_adapter(model, trained, "owner/base")
    else:
        trained.mkdir()
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        save_file(tensors, trained / "trained.safetensors")
    merged(model).save_pretrained(whole)
    targets = f", {recipe.lora_target_modules}, r {recipe.lora_r}" if has_adapter(model) else ""
    return {
        "preset": preset,
        "mode": f"{recipe.finetune}{targets}",
        "trained_parameters": finetuning.num_trained,
        "share": round(finetuning.num_trained / finetuning.num_parameters, 6),
        "trained_bytes": bytes_in(trained),
        "model_bytes": (whole / "model.safetensors").stat().st_size,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | --finetune | trained parameters | share | what was trained, MB | the whole model, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["preset"],
            row["mode"],
            f"{row['trained_parameters']:,}",
            f"{row['share']:.2%}",
            f"{row['trained_bytes'] / 1e6:.2f}",
            f"{row['model_bytes'] / 1e6:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["vit_b_16", "vit_s_16"], help="names of networks")
    parser.add_argument("--num_labels", type=int, default=10)
    parser.add_argument("--lora_r", type=int, default=RECIPES["finetune"].lora_r)
    parser.add_argument("--output", help="a JSON file for the numbers")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    rows = []
    for preset in arguments.presets:
        for fields in MODES:
            with tempfile.TemporaryDirectory() as folder:
                fields = {**fields, "lora_r": arguments.lora_r}
                rows.append(measure(preset, arguments.num_labels, fields, Path(folder)))
    print(markdown(rows))
    if arguments.output:
        write_record(arguments.output, "finetuning_sizes.py", sys.argv[1:], results=rows)


if __name__ == "__main__":
    main()
