"""`vit-scratch attention` and `vit-scratch summary`: where a network looks, and what it is made of."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_vit_scratch import PRESETS, ViTScratchConfig
from ..data.augmentation import normalise
from ..data.decoding import BadImageError, Decoder, Processor, normalisation
from ..data.examples import Example
from ..data.listing import shown
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.attention import METHODS, attention_between_tokens, attention_maps, patch_map, queries_of
from ..results.attention_picture import AttendedImage, write_attention_picture, write_heads_picture
from ..results.prediction import class_names_of, image_paths
from ..results.record import printable
from ..results.summary import summarise, summary_text
from ..results.text_table import text_table
from ..weights import checkpoint_facts
from .command_flags import add_pixel_flags, open_model_of
from .flags import Parser, exit_code
from .machine import num_cores

MOST_IMAGES = 16  # in a picture
DEFAULT_LABELS = 10


# ---------------------------------------------------------------- attention


def attention_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch attention",
        description="Draws where a network looks: how much of each patch reaches the vector that it classifies, "
        "through all layers (rollout) or in one. Prints the share of the patches, and the patch with the largest.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a checkpoint (folder or file), or owner/name")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help=f"up to {MOST_IMAGES} images")
    parser.add_argument(
        "-o", "--picture", metavar="FILE", default="attention.png", help="the PNG to write [attention.png]"
    )
    parser.add_argument(
        "--method",
        help="rollout: all layers multiplied, residual connections included; last, head-mean: the mean over the heads "
        "of the last layer, or of --layer [rollout]",
    )
    parser.add_argument("--layer", metavar="INT", type=int, help="of head-mean, counted from 1")
    parser.add_argument(
        "--every_head", action="store_true", help="draws each head of each layer by itself, for one image"
    )
    add_pixel_flags(parser)
    parser.add_argument("--cpu_threads", metavar="INT", type=int, help="threads; else one a core")
    return parser


def attention(arguments: list[str]) -> int:
    """Draws the attention over images; the exit code."""
    parser = attention_parser()
    return exit_code(lambda: _attention(parser.parse_args(arguments)))


def _attention(own: Any):
    _check(own)
    paths, notes = image_paths(own.images)
    most = 1 if own.every_head else MOST_IMAGES
    if len(paths) > most:
        what = "--every_head draws one image" if own.every_head else f"A picture holds up to {most} images"
        raise UserError(f"{what}, {len(paths)} came; name fewer.")
    torch.set_num_threads(own.cpu_threads or num_cores())
    model, processor, report = open_model_of(own)
    for note in [*(f"note: {note}" for note in notes), f"{own.model}: {report}"]:
        print(note, file=sys.stderr)
    if not model.config.num_hidden_layers:
        raise UserError(f"{own.model} has no layers, and so no attention.")
    title = f"{Path(own.model).name}: attention of {queries_of(model.config)}"
    try:
        if own.every_head:
            image, heads = heads_over(model, processor, paths[0])
            file = write_heads_picture(own.picture, title, image, heads)
        else:
            method = own.method or METHODS[0]
            images = [attention_over(model, processor, path, method, own.layer) for path in paths]
            print(attention_table(paths, images))
            title += f", {method}" + (f" of layer {own.layer}" if own.layer else "")
            file = write_attention_picture(own.picture, title, images)
    except OSError as error:
        raise UserError(f"--picture {own.picture} cannot be written: {error.strerror}.") from error
    print(f"{file}: {title}")


def _check(own: Any):
    if own.method is not None and own.method not in METHODS:
        raise unknown("--method", own.method, METHODS)
    for flag in ("method", "layer"):
        if own.every_head and getattr(own, flag) is not None:
            raise UserError(f"--{flag} has no effect with --every_head, which draws all heads of all layers.")
    if own.cpu_threads is not None and own.cpu_threads < 1:
        raise UserError(f"--cpu_threads must be at least 1, got {own.cpu_threads}.")
    if Path(own.picture).suffix.lower() != ".png":
        raise UserError(f"--picture {own.picture}: the picture is a PNG; expected a name that ends in .png.")


def attention_over(
    model: ViTScratchForImageClassification, processor: Processor, path: str, method: str, layer: int | None = None
) -> AttendedImage:
    """The image of a file as the network sees it, its most probable class, and the attention on its patches.

    method, layer: of attention_between_tokens. Raises UserError for these, and for a file that cannot be read.
    """
    pixels, answer, attentions = _seen(model, processor, path)
    weights = attention_between_tokens(attentions, method, layer)
    return AttendedImage(Path(path).name, answer, pixels, patch_map(weights, model.config)[0].float().cpu().numpy())


def heads_over(
    model: ViTScratchForImageClassification, processor: Processor, path: str
) -> tuple[AttendedImage, np.ndarray]:
    """The same with the mean over the last layer's heads, and each head of each layer: (layers, A, Gh, Gw)."""
    pixels, answer, attentions = _seen(model, processor, path)
    heads = torch.stack([patch_map(layer, model.config)[0] for layer in attentions]).float().cpu().numpy()
    return AttendedImage(Path(path).name, answer, pixels, heads[-1].mean(axis=0)), heads


def _seen(
    model: ViTScratchForImageClassification, processor: Processor, path: str
) -> tuple[np.ndarray, str, list[torch.Tensor]]:
    """The uint8 image (C, H, W), the name of its most probable class, and the attention weights of each layer."""
    try:
        pixels = Decoder(processor)(Example(path, None, path))
    except BadImageError as error:
        raise UserError(
            f"{shown(path)} cannot be read as an image: {error.reason}; mend it or leave it out."
        ) from error
    mean, std = normalisation(processor, model.device)
    pixel_values = normalise(pixels[None].to(model.device), mean, std, model.dtype)
    with torch.inference_mode():
        best = int(model(pixel_values=pixel_values).logits.argmax())
    return pixels.numpy(), class_names_of(model)[best], attention_maps(model, pixel_values)


def attention_table(paths: list[str], images: list[AttendedImage]) -> str:
    """A row an image: its most probable class, the attention on all its patches, and which has the most, from 1 on."""
    rows = [("image", "answer", "on patches", "on the largest", "row", "column")]
    for path, image in zip(paths, images, strict=True):
        row, column = np.unravel_index(image.patches.argmax(), image.patches.shape)
        shares = (f"{share:.1%}" for share in (image.patches.sum(), image.patches.max()))
        rows.append((shown(path), printable(image.answer), *shares, str(row + 1), str(column + 1)))
    return text_table(rows, num_names=2)


# ---------------------------------------------------------------- summary


def summary_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch summary",
        description="Prints a network as a table: the shapes, parameters and operations of its layers. Nothing is "
        "computed and no weights are needed.",
        epilog=f"Presets: {', '.join(PRESETS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("network", metavar="PRESET|MODEL", help="a preset, a run's folder, a checkpoint, or owner/name")
    parser.add_argument("--image_size", metavar="PIXELS", type=int, help="side of the images [the network's own]")
    parser.add_argument(
        "--num_labels",
        metavar="INT",
        type=int,
        help=f"classes [the network's own; of a preset without, {DEFAULT_LABELS}]",
    )
    return parser


def summary(arguments: list[str]) -> int:
    """Prints the table of a network; the exit code."""
    parser = summary_parser()
    return exit_code(lambda: print(_summary(parser.parse_args(arguments))))


def _summary(own: Any) -> str:
    for name in ("image_size", "num_labels"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(own, name)}.")
    given = {name: getattr(own, name) for name in ("image_size", "num_labels") if getattr(own, name) is not None}
    try:
        return summary_text(summarise(_config_of(own.network, given)))
    except UserError:
        raise
    except ValueError as error:  # the configuration says what is wrong and what would work
        raise UserError(" ".join(str(error).split())) from error


def _config_of(name: str, given: dict[str, int]) -> ViTScratchConfig:
    """The configuration of a preset, a run or a checkpoint, with these fields over it."""
    if name in PRESETS:
        labels = {} if "num_labels" in PRESETS[name] else {"num_labels": DEFAULT_LABELS}
        return ViTScratchConfig.from_preset(name, **{**labels, **given})
    path = Path(name).expanduser()
    if "/" not in name and not path.exists():
        raise unknown("preset or folder", name, PRESETS)
    has_model = (path / "recipe.json").is_file() and (path / "model").is_dir()
    fields = checkpoint_facts(str(path / "model") if has_model else name).to_dict()
    if "num_labels" in given:
        fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
    return ViTScratchConfig.from_dict({**fields, **given})
