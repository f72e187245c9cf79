"""Checkpoints into the network: complete or refused, with a report of what was loaded, interpolated and replaced."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration_vit_scratch import ViTScratchConfig
from .errors import UserError
from .modeling_vit_scratch import ViTScratchForImageClassification, interpolate_position_embeddings


@dataclass
class LoadingReport:
    """What happened to each tensor; nothing is re-drawn that is not in `replaced`."""

    loaded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for verb in ("interpolated", "replaced"):
            names = getattr(self, verb)
            if names:
                parts.append(f"{verb}: {', '.join(names)}")
        return "; ".join(parts)


def load_pretrained(
    name_or_path: str, class_names: list[str], image_size: Any, num_channels: int
) -> tuple[ViTScratchForImageClassification, LoadingReport]:
    """The checkpoint's network in float32 for these classes and this image size, and the report.

    The head is kept where the class names are the checkpoint's own, else drawn anew; learned positions are
    interpolated to another image size. Raises UserError where there is no such checkpoint, where it is not this
    package's, or where any other tensor is missing, unknown or of another shape.
    """
    config_file, weights_file = (_fetch(name_or_path, name) for name in ("config.json", "model.safetensors"))
    try:
        fields = json.loads(Path(config_file).read_text(encoding="utf-8"))
        tensors = load_file(weights_file)
    except (ValueError, SafetensorError, OSError) as error:
        raise UserError(f"--model_name_or_path {name_or_path} is damaged: {error}") from error
    if fields.get("model_type") != ViTScratchConfig.model_type:
        raise UserError(
            f"--model_name_or_path {name_or_path} has model_type {fields.get('model_type')!r}; expected "
            f"{ViTScratchConfig.model_type!r}."
        )
    old = ViTScratchConfig.from_dict(fields)
    if old.num_channels != num_channels:
        raise UserError(f"{name_or_path} takes {old.num_channels} channels, the images have {num_channels}.")
    names = {index: name for index, name in enumerate(class_names)}
    config = ViTScratchConfig.from_dict(
        {**fields, "dtype": "float32", "image_size": image_size, "id2label": names,
         "label2id": {name: index for index, name in names.items()}}
    )  # fmt: skip
    model = ViTScratchForImageClassification(config)
    return model, _load_strictly(model, tensors, old, name_or_path)


def load_pixel_facts(name_or_path: str) -> dict[str, Any]:
    """Mean, standard deviation and resampling that the checkpoint's image processor has."""
    try:
        fields = json.loads(Path(_fetch(name_or_path, "preprocessor_config.json")).read_text(encoding="utf-8"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--model_name_or_path {name_or_path}: preprocessor_config.json is damaged.") from error
    return {name: fields[name] for name in ("image_mean", "image_std", "resample") if name in fields}


def _load_strictly(
    model: ViTScratchForImageClassification, tensors: dict[str, torch.Tensor], old: ViTScratchConfig, source: str
) -> LoadingReport:
    report = LoadingReport()
    own = model.state_dict()
    if old.id2label != model.config.id2label:
        report.replaced = [name for name in own if name.rpartition(".")[0] in ("classifier", "classifier.out")]
        tensors.update({name: own[name] for name in report.replaced})
    positions = "vit.embeddings.position_embeddings"
    if positions in tensors and old.patch_grid != model.config.patch_grid:
        tensors[positions] = interpolate_position_embeddings(
            tensors[positions], old.patch_grid, model.config.patch_grid
        )
        report.interpolated.append(positions)
    missing, strangers = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if missing or strangers or shapes:
        raise UserError(
            f"{source} does not fill its own configuration: missing {missing[:3]}, unknown {strangers[:3]}, "
            f"of another shape {shapes[:3]}."
        )
    model.load_state_dict(tensors)
    report.loaded = [name for name in own if name not in report.replaced]
    return report


def _fetch(name_or_path: str, file_name: str) -> str:
    """The local path of a file of a checkpoint folder or Hub repository."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / file_name).is_file():
            raise UserError(f"--model_name_or_path {name_or_path}: the folder has no {file_name}.")
        return str(folder / file_name)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise UserError(f"--model_name_or_path {name_or_path}: there is no such folder.")
    try:
        return hf_hub_download(name_or_path, file_name)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"--model_name_or_path {name_or_path}: no such folder, and no such model on the Hub."
        ) from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: it comes first
        raise UserError(
            f"--model_name_or_path {name_or_path}: no such folder, and the Hub cannot be reached."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"--model_name_or_path {name_or_path}: not here, and the Hub has no {file_name} of it."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"--model_name_or_path {name_or_path}: the Hub does not give it: {error}") from error
