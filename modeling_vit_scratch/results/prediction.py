"""Images and folders of images -> labels and probabilities, from the pixels that evaluation sees."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..configuration_vit_scratch import pair
from ..data.augmentation import normalise
from ..data.decoding import BadImageError, Decoder, Processor, normalisation, output_size
from ..data.examples import Example
from ..data.listing import IMAGE_ENDINGS, UNREAD_IMAGE_ENDINGS, is_hidden, shown, some
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..weights import LoadingReport, load_pretrained, load_processor
from ..weights.pixels import with_other_pixels
from .record import printable
from .text_table import text_table

DEFAULT_TOP_K = 5  # as a pipeline of transformers


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image file.

    target: the class whose folder the file lies in, None where it is not known. labels, probabilities: the most
    probable classes, best first. answer: the classes that the image is said to have: the first of `labels`, or, where
    an image may have several, each of a probability over a half. error: why the file could not be read; then `labels`,
    `probabilities` and `answer` are empty.
    """

    path: str
    target: str | None
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is the target; None where there is no answer or no known target."""
        return None if self.error is not None or self.target is None else self.answer == [self.target]


# ---------------------------------------------------------------- what is asked, and of which images


def open_model(
    name_or_path: str, image_size: int | tuple[int, int] | None = None, crop_pct: float | None = None
) -> tuple[ViTScratchForImageClassification, Processor, LoadingReport]:
    """The network in evaluation mode, its image processor and the loading report, of a run's folder (its model/), a
    checkpoint's folder or a Hub repository.

    image_size: another side, or (height, width), of its images in pixels, to which positions are interpolated.
    crop_pct: another share of an image's shorter side for the central crop. Raises UserError for a run that has no
    model yet, for a checkpoint without a classifier, where the weights cannot be loaded, and for a size that the
    patches do not divide.
    """
    run = Path(name_or_path).expanduser()
    if (run / "recipe.json").is_file():
        if not (run / "model").is_dir():
            raise UserError(
                f"{name_or_path} is a run without model/: it has not finished; its command goes on with it."
            )
        name_or_path = str(run / "model")
    try:
        model, report = load_pretrained(name_or_path, image_size=image_size)
        processor = load_processor(name_or_path)
        if image_size is not None or crop_pct is not None:
            own = output_size(processor)
            size = own if image_size is None else pair(image_size)
            if size != own or crop_pct is not None:
                processor = with_other_pixels(processor, size, crop_pct)
        made, taken = output_size(processor), model.config.image_height_width
        if made != taken:
            raise UserError(
                f"{name_or_path}: preprocessor_config.json makes images of {made[0]} x {made[1]} pixels, the network "
                f"takes {taken[0]} x {taken[1]}: mend one of the two."
            )
    except UserError as error:  # here it is no flag
        raise UserError(str(error).removeprefix("--model_name_or_path ")) from error
    return model.eval(), processor, report


def class_names_of(model: ViTScratchForImageClassification) -> list[str]:
    """The names of the model's classes, in the order of its logits."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def image_paths(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The image files that these files and folders are or hold, and notes on what is left out.

    A folder is read with all folders below it, names sorted, without hidden files; what is no image by its ending is
    left out and counted. A file that is named is taken whatever its ending. Raises UserError for a name that does not
    exist, for a folder that cannot be listed or is a link to one around it, and where there is no image at all.
    """
    paths, notes = [], []
    for name in names:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            left_out: Counter[str] = Counter()
            paths += _images_below(path, left_out, ())
            if left_out:
                kinds = some((f"{shown(ending) or 'no ending'} {count}" for ending, count in left_out.most_common()), 8)
                notes.append(f"{shown(path)}: {left_out.total()} file(s) that are no images are left out: {kinds}.")
        elif os.path.exists(path):
            paths.append(path)
        else:
            raise UserError(f"{shown(name)}: there is no such file or folder.")
    if not paths:
        endings = " ".join(IMAGE_ENDINGS)
        raise UserError(f"There are no images in {some(map(shown, names))}; expected files that end in {endings}.")
    return paths, notes


def _images_below(folder: str, left_out: Counter[str], around: tuple[str, ...]) -> Iterator[str]:
    """The images of a folder, then those of the folders in it; `around`: the real paths of the folders it lies in."""
    real = os.path.realpath(folder)
    if real in around:
        raise UserError(f"{shown(folder)} is a link to a folder that it lies in ({shown(real)}); remove it.")
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be listed: {error.strerror}; give yourself the right to read it."
        ) from error
    for entry in entries:
        if entry.is_dir():
            continue
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in IMAGE_ENDINGS or ending in UNREAD_IMAGE_ENDINGS:  # the latter is said to be unreadable, by name
            yield entry.path
        else:
            left_out[ending] += 1
    for entry in entries:
        if entry.is_dir():
            yield from _images_below(entry.path, left_out, (*around, real))


def named_folders(names: Sequence[str]) -> frozenset[Path]:
    """The folders that were named, and those in which the files lie that were."""
    paths = [Path(os.path.expanduser(name)) for name in names]
    return frozenset(path if path.is_dir() else path.parent for path in paths)


def target_of(path: str, class_names: set[str], named: frozenset[Path] = frozenset()) -> str | None:
    """The name of the nearest folder around the file that is exactly a class's; None where there is none.

    named: folders above which nothing is looked at: what lies around them is chance, as a user's name is.
    """
    for parent in Path(path).parents:
        if parent.name in class_names:
            return parent.name
        if parent in named:
            break
    return None


# ---------------------------------------------------------------- the answers


def predict(
    model: ViTScratchForImageClassification,
    processor: Processor,
    paths: Sequence[str],
    top_k: int | None = None,
    batch_size: int = 64,
    num_threads: int | None = None,
    named: frozenset[Path] = frozenset(),
) -> Iterator[Prediction]:
    """The predictions of image files, in their order; a file that cannot be read has its `error` in place of labels.

    Probabilities are a softmax over the classes or, where an image may have several, each class's own sigmoid; there a
    folder's name tells one class at most, so that no target is known. top_k: labels an image; else five, or all classes
    where they are fewer. num_threads: that decode; else as many as torch computes with. named: as target_of takes it.
    Raises UserError for a top_k beyond the number of classes.
    """
    names = class_names_of(model)
    if top_k is not None and not 1 <= top_k <= len(names):
        raise UserError(f"--top_k must be from 1 to {len(names)}, the number of classes of the model; got {top_k}.")
    top_k = top_k or min(DEFAULT_TOP_K, len(names))
    has_several = has_several_classes(model)
    known = set() if has_several else set(names)
    decoder, pixels = Decoder(processor), normalisation(processor, model.device)
    model.eval()
    for chunk, decoded in _decoded_chunks(paths, decoder, batch_size, num_threads or torch.get_num_threads()):
        images = [image for image in decoded if isinstance(image, torch.Tensor)]
        rows = iter(_probabilities(model, torch.stack(images), pixels) if images else [])
        for path, image in zip(chunk, decoded, strict=True):
            target = target_of(path, known, named)
            if isinstance(image, BadImageError):
                yield Prediction(path, target, error=image.reason)
                continue
            row = next(rows)
            best = row.argsort(descending=True, stable=True)
            answered = (row > 0.5).sum() if has_several else 1
            labels = [names[index] for index in best.tolist()]
            yield Prediction(path, target, labels[:top_k], row[best[:top_k]].tolist(), labels[:answered])


def has_several_classes(model: ViTScratchForImageClassification) -> bool:
    """Whether the model gives each class a probability of its own, as a pipeline of transformers decides it."""
    return model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1


@torch.inference_mode()
def _probabilities(
    model: ViTScratchForImageClassification, images: torch.Tensor, pixels: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """(B, K) float32 on the CPU, of uint8 images (B, C, H, W). Raises UserError where they are no numbers."""
    logits = model(pixel_values=normalise(images.to(model.device), *pixels, model.dtype)).logits.float().cpu()
    if not logits.isfinite().all():
        raise UserError("The model answers with numbers that are not finite: its weights are damaged; load others.")
    return logits.sigmoid() if has_several_classes(model) else logits.softmax(dim=1)


Decoded = torch.Tensor | BadImageError


def _decoded_chunks(
    paths: Sequence[str], decoder: Decoder, batch_size: int, num_threads: int
) -> Iterator[tuple[Sequence[str], list[Decoded]]]:
    """Chunks of the paths with their images; the next chunk is decoded while one is computed."""

    def decode(path: str) -> Decoded:
        try:
            return decoder(Example(path, None, path))
        except BadImageError as error:
            return error

    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(num_threads) as pool:  # PIL releases the interpreter while it decodes
        waiting: list[Future] = [pool.submit(decode, path) for path in chunks[0]] if chunks else []
        for place, chunk in enumerate(chunks):
            decoded = [future.result() for future in waiting]
            waiting = [pool.submit(decode, path) for path in chunks[place + 1]] if place + 1 < len(chunks) else []
            yield chunk, decoded


# ---------------------------------------------------------------- as text


def as_table(predictions: Sequence[Prediction], has_several: bool) -> str:
    """A table for people: the file, its class where one is known, and the most probable classes; then the count."""
    has_targets = any(prediction.target is not None for prediction in predictions)
    readable = [prediction for prediction in predictions if prediction.error is None]
    num_labels = len(readable[0].labels) if readable else 0
    heads = ["image", *(["target", ""] if has_targets else []), *(["answer"] if has_several else [])]
    rows = [[*heads, *map(str, range(1, num_labels + 1))]]
    for prediction in readable:
        row = [shown(prediction.path)]
        if has_targets:
            row += [printable(prediction.target or ""), verdict(prediction)]
        if has_several:
            row.append(printable(", ".join(prediction.answer)) or "none")
        pairs = zip(prediction.probabilities, prediction.labels, strict=True)
        rows.append([*row, *(f"{100 * share:5.1f}% {printable(label)}" for share, label in pairs)])
    lines = [text_table(rows, num_names=len(rows[0]))] if readable else []
    return "\n".join([*lines, *filter(None, [right_note(predictions)])])


def verdict(prediction: Prediction) -> str:
    """right or wrong; nothing where the target is not known."""
    return "" if prediction.is_right is None else "right" if prediction.is_right else "wrong"


def right_note(predictions: Sequence[Prediction]) -> str | None:
    """How many of the images with a known class are right; None where no class is known."""
    marks = [prediction.is_right for prediction in predictions if prediction.is_right is not None]
    share = 100 * sum(marks) / len(marks) if marks else 0
    return f"{sum(marks)} of {len(marks)} with a known class are right ({share:.1f}%)" if marks else None


def as_csv(predictions: Sequence[Prediction], has_several: bool) -> str:
    """One line a file: file, target, label_1, probability_1, ..., error; several classes of an answer are put between
    `|` in a column `answer`, as in metadata.csv."""
    num_labels = max((len(prediction.labels) for prediction in predictions), default=0)
    ranks = range(1, num_labels + 1)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    pairs = [name for rank in ranks for name in (f"label_{rank}", f"probability_{rank}")]
    table.writerow(["file", "target", *(["answer"] if has_several else []), *pairs, "error"])
    for prediction in predictions:
        answer = ["|".join(prediction.answer)] if has_several else []
        cells = [cell for pair in zip(prediction.labels, prediction.probabilities, strict=True) for cell in pair]
        cells = cells or [""] * len(pairs)
        row = [prediction.path, prediction.target or "", *answer, *cells, prediction.error or ""]
        table.writerow([_encodable(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue().removesuffix("\n")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a file's name may be no UTF-8


def as_json(predictions: Sequence[Prediction], has_several: bool) -> str:
    """A list of the predictions' fields."""
    return json.dumps([asdict(prediction) for prediction in predictions], indent=2)


FORMATS: dict[str, Callable[[Sequence[Prediction], bool], str]] = {"table": as_table, "csv": as_csv, "json": as_json}
