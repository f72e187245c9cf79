"""Checkpoints into the network: complete or refused, with a report of what was loaded, interpolated and replaced."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..configuration_vit_scratch import COUNTED_POSITIONS, ViTScratchConfig, pair
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification, interpolate_position_embeddings
from .files import Checkpoint, open_checkpoint
from .formats import is_own, own_config, read_checkpoint, recognise
from .naming import Tensors
from .pixels import build_processor, format_of_files, pixel_facts, processor_fields, with_channels
from .shapes import PATCHES, POSITIONS, Reading


@dataclass
class LoadingReport:
    """What happened to each tensor, by our names; nothing is drawn anew that is not in `replaced`.

    unused: names of the checkpoint that classification has no use for. inferred: what no file and no shape said.
    shapes: of the tensors that are not as the checkpoint has them.
    """

    format: str = "vit_scratch"
    loaded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    inferred: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded ({self.format})"]
        for verb in ("interpolated", "replaced", "unused"):
            names = [f"{name} {self.shapes.get(name, '')}".strip() for name in getattr(self, verb)]
            if names:
                parts.append(f"{verb}: {', '.join(names)}")
        if self.inferred:
            parts.append("inferred: " + ", ".join(f"{name} {value}" for name, value in self.inferred.items()))
        return "; ".join([*parts, *self.notes])


def load_pretrained(
    name_or_path: str,
    class_names: list[str] | None = None,
    image_size: Any = None,
    num_channels: int | None = None,
    num_attention_heads: int | None = None,
    revision: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> tuple[ViTScratchForImageClassification, LoadingReport]:
    """The checkpoint's network in float32 for these classes, this image size and these channels, and the report.

    name_or_path: a Hub repository, a folder, or a file of weights, of this package, transformers, timm, torchvision or
    Google. None keeps what the checkpoint has. The head is kept where the class names are the checkpoint's own, else
    drawn anew; learned positions are interpolated to another image size; between RGB and grey the patch kernel is
    summed or spread. num_attention_heads: for a bare file of an unusual width, which does not say it. revision: the
    branch, tag or commit of a Hub repository. overrides: fields of the configuration that change no tensor, such as
    pooling and what is left out in training (RATES_OF_TRAINING), instead of the checkpoint's. Raises UserError where
    there is no such checkpoint, and where any other tensor is missing, unknown or of another shape.
    """
    reading = _read_with_pixels(name_or_path, num_attention_heads, revision)
    if class_names is None and not reading.has_head:
        raise UserError(f"{name_or_path} {reading.no_head}: fine-tune it, with the names of your classes.")
    wanted: dict[str, Any] = {"image_size": image_size, "num_channels": num_channels}
    if class_names is not None:
        wanted |= labels(class_names)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return network_of(reading, wanted | (overrides or {}))  # a rate may be None, which is "as hidden_dropout_prob"


def _read_with_pixels(name_or_path: str, num_attention_heads: int | None, revision: str | None = None) -> Reading:
    """The reading, with a note where nothing says how its images are to be normalised."""
    checkpoint = open_checkpoint(name_or_path, {"revision": revision})
    reading = read_checkpoint(checkpoint, num_attention_heads)
    if "image_mean" not in pixel_facts(checkpoint, reading.format):
        reading.notes.append("no file says image_mean and image_std of its training: 0.5 unless given")
    return reading


def network_of(reading: Reading, wanted: dict[str, Any]) -> tuple[ViTScratchForImageClassification, LoadingReport]:
    """The network of a reading, with the fields that are wanted instead of its own."""
    config = wanted_config(reading, wanted)
    model = ViTScratchForImageClassification(config)
    own = model.state_dict()
    tensors, report = fitted(reading, config, {name: tensor.shape for name, tensor in own.items()})
    model.load_state_dict({**tensors, **{name: own[name] for name in report.replaced}})
    return model.eval(), report


def load_network(
    name_or_path: str, num_attention_heads: int | None = None
) -> tuple[ViTScratchForImageClassification, LoadingReport]:
    """As load_pretrained with nothing changed, but what has no head is loaded without one."""
    return network_of(_read_with_pixels(name_or_path, num_attention_heads), {})


def checkpoint_facts(name_or_path: str, num_attention_heads: int | None = None) -> ViTScratchConfig:
    """The configuration that the checkpoint has here. No network is built; this package's own are not even read."""
    checkpoint = open_checkpoint(name_or_path)
    if is_own(checkpoint):
        return own_config(checkpoint)
    return read_checkpoint(checkpoint, num_attention_heads).config


def load_pixel_facts(name_or_path: str, num_channels: int | None = None, revision: str | None = None) -> dict[str, Any]:
    """image_mean, image_std, resample, crop_pct and crop_mode: those that the checkpoint or its format says.

    With num_channels, mean and standard deviation are for so many channels.
    """
    checkpoint = open_checkpoint(name_or_path, {"revision": revision})
    return with_channels(pixel_facts(checkpoint, _format_of(checkpoint)), num_channels)


def load_processor(name_or_path: str, num_channels: int | None = None, num_attention_heads: int | None = None):
    """The image processor of the checkpoint at its own image size; what nothing says is transformers' default."""
    checkpoint = open_checkpoint(name_or_path)
    config = checkpoint_facts(name_or_path, num_attention_heads)
    fields = processor_fields(checkpoint, _format_of(checkpoint), config.image_height_width)
    return build_processor(fields, num_channels or config.num_channels)


def _format_of(checkpoint: Checkpoint) -> str:
    return format_of_files(checkpoint) or recognise(checkpoint.name, checkpoint.read_tensors())


def labels(class_names: list[str]) -> dict[str, dict]:
    """id2label and label2id: always both, as transformers leaves the other as it was."""
    names = dict(enumerate(class_names))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def wanted_config(reading: Reading, wanted: dict[str, Any]) -> ViTScratchConfig:
    """The reading's configuration with what is wanted instead, in float32. Raises UserError for what cannot be."""
    if wanted.get("num_labels") == reading.config.num_labels and "id2label" not in wanted:
        wanted = {name: value for name, value in wanted.items() if name != "num_labels"}  # its own classes
    old, size = reading.config, wanted.get("image_size")
    spanned = old.position_image_size if size is None else old.spanned_at(size, old.image_size)
    fields = {**old.to_dict(), "dtype": "float32", "position_image_size": spanned, **wanted}
    if "num_labels" in wanted and "id2label" not in wanted:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    try:
        return ViTScratchConfig.from_dict(fields)
    except Exception as error:  # the configuration says what is wrong and what would work
        raise UserError(f"{reading.source}: {' '.join(str(error.__cause__ or error).split())}") from error


def fitted(reading: Reading, config: ViTScratchConfig, shapes: dict[str, torch.Size]) -> tuple[Tensors, LoadingReport]:
    """The tensors for a network of this configuration and these shapes, but those to be drawn anew, and the report.

    Raises UserError where they would not fill it: nothing but the head is ever left to chance.
    """
    tensors = dict(reading.tensors)
    report = LoadingReport(reading.format, unused=reading.unused, inferred=reading.inferred, notes=list(reading.notes))
    report.replaced = _replaced(reading, config, shapes)
    for name in report.replaced:
        tensors.pop(name, None)
        report.shapes[name] = str(tuple(shapes[name]))
    if config.num_labels == 0:
        report.unused = report.unused + [name for name in tensors if name.startswith("classifier")]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    if PATCHES in tensors and reading.config.num_channels != config.num_channels:
        tensors[PATCHES] = _to_channels(reading, tensors[PATCHES], config.num_channels, report)
    if POSITIONS in tensors and reading.config.patch_grid != config.patch_grid:
        old = tensors[POSITIONS]
        tensors[POSITIONS] = interpolate_position_embeddings(old, reading.config.patch_grid, config.patch_grid)
        report.interpolated.append(POSITIONS)
        report.shapes[POSITIONS] = f"{tuple(old.shape)} -> {tuple(tensors[POSITIONS].shape)}"
    elif config.position_embedding_type in COUNTED_POSITIONS and reading.config.patch_grid != config.patch_grid:
        kind = f"{config.position_embedding_type} positions"
        report.interpolated.append(kind)
        report.shapes[kind] = f"{reading.config.patch_grid} -> {config.patch_grid}"
    _check(reading.source, tensors, {name: shape for name, shape in shapes.items() if name not in report.replaced})
    report.loaded = list(tensors)
    return tensors, report


def _replaced(reading: Reading, config: ViTScratchConfig, shapes: dict[str, torch.Size]) -> list[str]:
    """The names of the head that is drawn anew: its last layer for other classes, all of it where there was none."""
    head = [name for name in shapes if name.startswith("classifier")]
    if not reading.has_head:
        return head
    if reading.config.id2label == config.id2label:
        return []
    return [name for name in head if name.rpartition(".")[0] in ("classifier", "classifier.out")]


def _to_channels(reading: Reading, kernel: torch.Tensor, num_channels: int, report: LoadingReport) -> torch.Tensor:
    """The patch kernel for grey instead of RGB, or the reverse: a grey image gets the response of its RGB copy."""
    old = reading.config.num_channels
    if {old, num_channels} != {1, 3}:
        raise UserError(
            f"{reading.source} takes {old} channels, the images have {num_channels}; between 1 and 3 alone it is clear "
            "what the weights would be."
        )
    channels = kernel if kernel.ndim == 4 else kernel.view(len(kernel), old, *pair(reading.config.patch_size))
    grey = channels.sum(1, keepdim=True) if old == 3 else (channels / 3).repeat(1, 3, 1, 1)
    done = "summed over RGB for grey images" if old == 3 else "a third of the grey one for each of RGB"
    report.notes.append(f"{PATCHES}: {done}")
    return grey if kernel.ndim == 4 else grey.flatten(1)


def _check(source: str, tensors: Tensors, shapes: dict[str, torch.Size]):
    missing, strangers = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    others = [name for name in shapes if name in tensors and shapes[name] != tensors[name].shape]
    if missing or strangers or others:
        raise UserError(
            f"{source} does not fill its own configuration: missing {missing[:3]}, unknown {strangers[:3]}, "
            f"of another shape {others[:3]}."
        )
