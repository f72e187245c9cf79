"""`vit-scratch predict`: what a model says of images."""

import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.listing import shown
from ..errors import UserError
from ..results.prediction import (
    DEFAULT_TOP_K,
    FORMATS,
    Prediction,
    has_several_classes,
    image_paths,
    named_folders,
    predict,
    right_note,
)
from ..results.prediction_grid import MOST_IMAGES, write_prediction_grid
from .command_flags import add_pixel_flags, open_model_of
from .flags import Parser, exit_code
from .machine import num_cores


def build_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch predict",
        description="Says which classes images show, with probabilities, from the same pixels as evaluation. Where an "
        "image lies in a folder of a class's name, at or below the one that is named, the answer is compared with it.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a checkpoint (folder or file), or owner/name")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+", help="images, and folders with all below them")
    parser.add_argument(
        "--top_k", metavar="INT", type=int, help=f"classes an image, most probable first [{DEFAULT_TOP_K}, or all]"
    )
    parser.add_argument("--format", default="table", help=f"of what is printed: {', '.join(FORMATS)} [table]")
    parser.add_argument("-o", "--picture", metavar="FILE", help="draws the images with their answers into this PNG")
    add_pixel_flags(parser)
    parser.add_argument("--batch_size", metavar="INT", type=int, default=64, help="images computed at once [64]")
    parser.add_argument("--cpu_threads", metavar="INT", type=int, help="threads; else one a core")
    return parser


def main(arguments: list[str]) -> int:
    """Prints the predictions; the exit code. Only they go to stdout, all notes to stderr."""
    parser = build_parser()

    def act():
        own = parser.parse_args(arguments)
        _check(own)
        paths, notes = image_paths(own.images)
        for note in notes:
            _say(f"note: {note}")
        threads = own.cpu_threads or num_cores()
        torch.set_num_threads(threads)
        model, processor, report = open_model_of(own)
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        _say(f"{own.model}: {report}")
        answers = predict(model, processor, paths, own.top_k, own.batch_size, threads, named_folders(own.images))
        bar = tqdm(answers, total=len(paths), unit="image", leave=False, disable=None)  # on a terminal alone
        predictions = list(bar)
        print(FORMATS[own.format](predictions, has_several_classes(model)), flush=True)
        if own.format != "table" and (note := right_note(predictions)) is not None:
            _say(note)
        if own.picture is not None:
            _draw(own.picture, own.model, predictions)
        _refuse_unreadable(predictions)

    return exit_code(act)


def _check(own):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vit-scratch predict is one process; start it without a launcher.")
    if own.format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}; got {own.format!r}.")
    for name in ("batch_size", "cpu_threads"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(own, name)}.")
    if own.picture is not None and Path(own.picture).suffix.lower() != ".png":
        raise UserError(f"--picture {own.picture}: the picture is a PNG; expected a name that ends in .png.")


def _draw(file: str, model: str, predictions: list[Prediction]):
    readable = [prediction for prediction in predictions if prediction.error is None]
    if not readable:
        return  # the error that follows says so
    note = right_note(predictions)
    try:
        write_prediction_grid(file, f"{Path(model).name}: {note}" if note else Path(model).name, readable)
    except OSError as error:
        raise UserError(f"--picture {file} cannot be written: {error.strerror}.") from error
    more = f", of {len(readable)}: the picture holds no more" if len(readable) > MOST_IMAGES else ""
    _say(f"{file}: {min(len(readable), MOST_IMAGES)} image(s) drawn{more}")


def _refuse_unreadable(predictions: list[Prediction]):
    unreadable = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in unreadable:
        _say(f"{shown(prediction.path)} cannot be read as an image: {prediction.error}")
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(predictions)} files cannot be read as images and have no prediction; mend or "
            "remove them."
        )


def _say(text: str):
    print(text, file=sys.stderr, flush=True)
