"""The folder `model/`: a complete Hub repository, loadable where this package is not installed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.decoding import Processor
from ..modeling_vit_scratch import ViTScratchForImageClassification

CODE = "*_vit_scratch.py"  # the package's files that travel along

MODEL_CODE = {
    "AutoConfig": "configuration_vit_scratch.ViTScratchConfig",
    "AutoModel": "modeling_vit_scratch.ViTScratchModel",
    "AutoModelForImageClassification": "modeling_vit_scratch.ViTScratchForImageClassification",
}
PROCESSOR_CODE = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_vit_scratch.ViTScratchImageProcessor",
        "pil": "image_processing_vit_scratch.ViTScratchImageProcessorPil",
    }
}


@contextmanager
def with_code(model: PreTrainedModel) -> Iterator[None]:
    """Within, transformers writes the network's own code beside its weights, so that anyone can load them.

    It does so by itself for a model that came with its code, and not for one whose package is installed.
    """
    kind, own_map = type(model), vars(model.config).get("auto_map")
    auto_class = next((name for name, code in MODEL_CODE.items() if code.rpartition(".")[2] == kind.__name__), None)
    if auto_class is None:  # a class of somebody's own, made of these
        yield
        return
    own_class, kind._auto_class = kind._auto_class, auto_class
    model.config.auto_map = dict(MODEL_CODE)
    try:
        yield
    finally:
        kind._auto_class = own_class
        if own_map is None:
            del model.config.auto_map
        else:
            model.config.auto_map = own_map


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which then takes the place of `folder`: that appears whole or not at all."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except BaseException:  # of a full disk it would take the last room
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def save_model_folder(
    folder: Path,
    model: ViTScratchForImageClassification,
    tensors: dict[str, torch.Tensor],
    processor: Processor,
):
    """Writes configuration, weights, image processor and code to `folder`, which appears whole or not at all."""
    logging.disable_progress_bar()  # one file, written in a moment
    with written_whole(folder) as partial:
        model.save_pretrained(partial, state_dict=tensors, save_original_format=False)
        processor.save_pretrained(partial)
        _add_code(partial)


def checkpoint_as_model(checkpoint: Path, folder: Path):
    """What a run's checkpoint would publish, as save_model_folder writes it: its averaged weights where it has them."""
    averaged = checkpoint / "averaged.safetensors"
    weights = averaged if averaged.is_file() else checkpoint / "model.safetensors"
    with written_whole(folder) as partial:
        partial.mkdir()
        save_file(load_file(weights), partial / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(checkpoint / name, partial / name)
        _add_code(partial)


def _add_code(folder: Path):
    _add_code_map(folder / "config.json", MODEL_CODE)
    _add_code_map(folder / "preprocessor_config.json", PROCESSOR_CODE)
    for file in Path(__file__).parents[1].glob(CODE):
        shutil.copyfile(file, folder / file.name)


def _add_code_map(file: Path, code: dict):
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**fields, "auto_map": code}, indent=2) + "\n", encoding="utf-8")
