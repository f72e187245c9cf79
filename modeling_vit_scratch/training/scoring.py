"""`vit-scratch evaluate`: the scores of a model on a split of a dataset or on a folder of images."""

import difflib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.decoding import Decoder, Processor, normalisation
from ..data.folders import flat, open_folders
from ..data.listing import shown, some
from ..data.loading import EvaluationData, is_resident
from ..data.scan import BadImage, scan_steps, without_bad
from ..data.sources import open_source
from ..data.splits import Source, Split
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.metrics import wilson_interval
from ..results.plots import MOST_CLASSES_DRAWN, confusion_csv
from ..results.prediction import class_names_of, has_several_classes
from ..results.score_text import MOST_CLASSES_LISTED, class_means, score_text, with_recall_intervals, write_confusion
from ..weights.pixels import crop_share
from .command_flags import add_pixel_flags, add_trainers_flags, open_model_of, trainers_options
from .evaluation import evaluate
from .flags import Parser, exit_code
from .machine import agree, commit, first_on_each_node, hardware, num_decoding_workers, start_accelerator, versions
from .objectives import objective_kind
from .recipe import SPLIT_FLAGS, Recipe
from .run_folder import write_json

# the trainer's flags that mean the same here
OF_TABLE = ("dataset_config_name", *SPLIT_FLAGS, "image_column_name", "label_column_name", "streaming")
SHARED = ("dataset_name", *OF_TABLE, "bad_images", "eval_batch_size", "dataloader_num_workers", "cpu_threads")
SPLITS = ("test", "validation", "train")
MATCHES = ("name", "position")
NUM_NAMED = 10  # of the bad images, on the screen


# ---------------------------------------------------------------- what is scored


def open_split(
    options: Recipe, test_dir: str | None, split: str | None, is_multi_label: bool = False
) -> tuple[Source, str]:
    """The source with the one split that is scored, and that split's name.

    test_dir: a folder of images, which is the test split; else the dataset of `options`. split: else test, or
    validation where there is no test split. is_multi_label: whether the model gives an image any number of classes.
    Raises UserError for what cannot be found, and for a split that is not there.
    """
    if options.streaming and (test_dir is not None or options.dataset_name == "digits"):
        raise UserError("--streaming has no effect here: only datasets in a Hub repository's layout are streamed.")
    if test_dir is not None:
        return _open_folder(test_dir, options.label_column_name, is_multi_label), "test"
    source = open_source(
        options.dataset_name, options.dataset_config_name, image_column_name=options.image_column_name,
        label_column_name=options.label_column_name, streaming=options.streaming, train_val_split=0.0,
        needs_training=False, **options.split_names,
    )  # fmt: skip
    if split is None:
        split = next((name for name in ("test", "validation") if name in source.splits), None)
    if split is None:
        raise UserError(f"{source.name} has neither a test nor a validation split; --split train scores what it has.")
    if split not in source.splits:
        raise unknown(f"split of {source.name}", split, source.splits)
    if not len(source.splits[split]):
        raise UserError(f"{source.name}: the {split} split is empty; score another with --split.")
    return replace(source, splits={split: source.splits[split]}), split


def _open_folder(folder: str, label_column: str | None, is_multi_label: bool) -> Source:
    found = open_folders({"test": folder}, label_column, "test", is_multi_label)  # the model's classes come later
    splits = {"test": Split(found.examples["test"])}
    return Source(
        Path(folder).resolve().name, splits, found.class_names, found.label_ids, False,
        is_multi_label=found.is_multi_label, notes=found.notes,
    )  # fmt: skip


def match_classes(source: Source, class_names: list[str], by: str = "name") -> Source:
    """The source whose classes are those of the model, each label mapped to the model's class of the same name.

    The order of the classes may differ, and the model may know classes that the data lacks. by: "position" takes the
    data's first class for the model's first, and so on, for checkpoints or data that have numbers instead of names;
    nothing but a person can know that they are in one order. Raises UserError for a class that the model does not know,
    for a name that it has twice, and for a position that cannot be meant.
    """
    theirs = source.class_names
    if by == "position":
        if theirs == class_names:
            raise UserError("--match_classes position has no effect here: the names agree, in the same order.")
        if len(theirs) != len(class_names):
            raise UserError(
                f"--match_classes position needs as many classes here as there: {source.name} has {len(theirs)}, the "
                f"model {len(class_names)}."
            )
        ids = range(len(theirs))
    elif theirs == class_names:  # names that occur twice, as two of ImageNet's do, are told apart by their places
        ids = range(len(theirs))
    else:
        ids = _ids_by_name(source, class_names)
    own = {raw: raw for raw in range(len(theirs))} if source.label_ids is None else source.label_ids
    label_ids = {raw: ids[place] for raw, place in own.items() if ids[place] is not None}
    return replace(
        source, class_names=class_names, label_ids=label_ids, notes=[*source.notes, *_lacking(source, class_names, ids)]
    )


def _ids_by_name(source: Source, class_names: list[str]) -> list[int | None]:
    """The model's class for each of the data's; None: it has no such class, and no image is of it."""
    known = {name: index for index, name in enumerate(class_names)}
    counts = Counter(class_names)
    strangers = [name for name in source.class_names if name not in known]
    if strangers:
        there = _names_that_occur(source)
        strangers = [name for name in strangers if name in there]
    if strangers and len(strangers) == len(source.class_names) == len(class_names):
        raise UserError(
            f"{source.name} has the classes {some(map(repr, source.class_names), 3)}, the model "
            f"{some(map(repr, class_names), 3)}: no name is in both. Where they are the same classes in the same "
            "order, say so with --match_classes position."
        )
    if strangers:
        others = f" ({len(strangers)} such classes)" if len(strangers) > 1 else ""
        near = class_names  # a thousand names are nothing to read
        if len(near) > MOST_CLASSES_LISTED:
            near = [
                *difflib.get_close_matches(strangers[0], near, n=3),
                "and others, under id2label in its config.json",
            ]
        raise UserError(
            f"{source.name} has a class that the model does not know{others}. {unknown('class', strangers[0], near)}"
        )
    twice = [name for name in source.class_names if counts[name] > 1]
    if twice:
        raise UserError(f"The model has {counts[twice[0]]} classes {twice[0]!r}: by name they cannot be told apart.")
    return [known.get(name) for name in source.class_names]


def _names_that_occur(source: Source) -> set[str]:
    labels = (label for split in source.splits.values() for label in split.examples.labels())
    found = set(flat(tuple(label) if isinstance(label, list) else label for label in labels))
    places = found if source.label_ids is None else {source.label_ids.get(label) for label in found}
    return {name for place, name in enumerate(source.class_names) if place in places}


def _lacking(source: Source, class_names: list[str], ids: Iterable[int]) -> list[str]:
    """A note on the model's classes that the data does not have; none where it has all."""
    absent = [repr(class_names[index]) for index in sorted(set(range(len(class_names))).difference(ids))]
    note = f"{source.name} lacks {len(absent)} of the model's {len(class_names):,} classes: {some(absent)}."
    return [note] if absent else []


def check_kind(source: Source, model: ViTScratchForImageClassification):
    """Raises UserError where images have several classes and answers one, or the other way round."""
    several = has_several_classes(model)
    if several != source.is_multi_label:
        ways = ("one class", "any number of classes")
        raise UserError(
            f"The model gives an image {ways[several]}, {source.name} has {ways[source.is_multi_label]} for each: "
            "they cannot be compared."
        )


# ---------------------------------------------------------------- the scores


def score(
    model: ViTScratchForImageClassification,
    processor: Processor,
    source: Source,
    split: str,
    accelerator: Accelerator,
    batch_size: int = 256,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """The scores of a split, each image counted once over all processes; the same in each of them.

    `accuracy_interval` is Wilson's, of 95 %; times count decoding. num_workers decode; else none for small images and
    for what is decoded once and kept, and one a thread for the rest. The source's classes must be the model's. Raises
    UserError for what cannot be decoded, and where the loss is not finite.
    """
    threads, device, decoder = torch.get_num_threads(), accelerator.device, Decoder(processor)
    if num_workers is None and is_resident(source, source.splits[split], decoder):
        num_workers = 0
    num_workers = num_decoding_workers(decoder, device, num_workers)
    model.to(device)
    objective = objective_kind(source.is_multi_label)(len(source.class_names))
    started = time.perf_counter()
    data = EvaluationData(
        source, source.splits[split], decoder, batch_size, accelerator.process_index, accelerator.num_processes,
        num_workers, device, threads,
    )  # fmt: skip
    found = evaluate(model, data, normalisation(processor, device), accelerator, objective, model.dtype)
    seconds = time.perf_counter() - started
    if not math.isfinite(found.scores["loss"]):
        raise UserError(f"The loss is {found.scores['loss']}: the model's weights are damaged; load others.")
    details, num_images = found.details(source.class_names), len(source.splits[split])
    return {
        **found.scores,
        "accuracy_interval": list(wilson_interval(round(found.scores["accuracy"] * num_images), num_images)),
        "num_images": num_images,
        "seconds": round(seconds, 3),
        "images_per_second": round(num_images / seconds, 1),
        "class_names": source.class_names,
        "is_multi_label": source.is_multi_label,
        **class_means(details["per_class"]),
        **details,
        "per_class": with_recall_intervals(details["per_class"]),
    }


def drop_bad_images(accelerator: Accelerator, source: Source, split: str) -> list[BadImage]:
    """The images of the split that cannot be read, which it then has no more; the main process looks at each.

    Raises UserError in every process where none can be read.
    """
    whole = source.splits[split]

    def look() -> Iterator[list[BadImage] | None]:
        bad: list[BadImage] = []
        for scan in scan_steps(whole, torch.get_num_threads()):
            bad = scan.bad
            yield None  # the others wait no longer than a block takes: they would give up in the end
        yield bad

    work, bad = look(), None
    while bad is None:
        bad = agree(accelerator, lambda: next(work))
    if len(bad) == len(whole):
        raise UserError(f"None of the {len(whole):,} images can be read ({bad[0].name}: {bad[0].reason}); mend them.")
    source.splits[split] = without_bad(whole, bad)
    return bad


# ---------------------------------------------------------------- the command


def build_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch evaluate",
        description="Scores a model on a split of a dataset or on a folder of images: accuracy with its interval, "
        "calibration, each class, confusion. Classes are matched by their names. With several processes: "
        "accelerate launch -m modeling_vit_scratch.cli evaluate ...",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a checkpoint (folder or file), or owner/name")
    parser.add_argument("--test_dir", metavar="FOLDER", help="images, one folder a class, or with a metadata file")
    parser.add_argument("--split", help=f"of the dataset: {', '.join(SPLITS)} [test, else validation]")
    parser.add_argument(
        "--match_classes", default="name", help="how the data's classes are those of the model: name, position [name]"
    )
    texts = {"bad_images": "images that cannot be read: stop at the first (error), or leave them out (skip)"}
    add_trainers_flags(parser, SHARED, texts)
    add_pixel_flags(parser)
    parser.add_argument("--output", metavar="FILE", help="writes all of it, and the machine, as JSON")
    parser.add_argument("-o", "--picture", metavar="FILE", help="draws the confusion matrix into this PNG")
    parser.add_argument("--confusion", metavar="FILE", help="writes the confusion matrix as CSV")
    return parser


def main(arguments: list[str]) -> int:
    """Prints the scores; the exit code."""
    parser = build_parser()
    return exit_code(lambda: _run(parser.parse_args(arguments)))


def _run(own: Any):
    options = _options(own)
    accelerator = start_accelerator([], Path(), options.cpu_threads)
    model, processor, report = first_on_each_node(accelerator, lambda: open_model_of(own))
    accelerator.print(f"{own.model}: {report}")
    several = has_several_classes(model)
    source, split = first_on_each_node(accelerator, lambda: open_split(options, own.test_dir, own.split, several))
    check_kind(source, model)
    source = match_classes(source, class_names_of(model), own.match_classes)
    _check_pictures(own, source)
    for note in source.notes:
        accelerator.print(f"note: {note}")
    bad = drop_bad_images(accelerator, source, split) if options.bad_images == "skip" else []
    results = {
        "model": own.model,
        "image_size": list(model.config.image_height_width),
        "crop_pct": crop_share(processor),
        "dataset": {
            "name": source.name,
            "repository": source.repository,
            "split": None if own.test_dir else split,  # a folder has none
        },
        **score(model, processor, source, split, accelerator, options.eval_batch_size, options.dataloader_num_workers),
        "bad_images": [image.name for image in bad],
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": hardware(accelerator),
        "versions": versions(),
        "commit": commit(),
    }
    accelerator.print(f"\n{score_text(results)}")
    if bad:
        accelerator.print(_bad_text(bad))
    agree(accelerator, lambda: _write(own, results))
    accelerator.end_training()


def _options(own: Any) -> Recipe:
    """The shared flags as fields of a recipe, checked as the trainer checks them."""
    if (own.test_dir is None) == (own.dataset_name is None):
        raise UserError("Say what to score: either --test_dir FOLDER or --dataset_name NAME.")
    # what has no effect on a folder of training has none on one that is scored
    options = trainers_options(own, SHARED, train_dir=own.test_dir)
    if own.split is not None and own.test_dir is not None:
        raise UserError("--split has no effect here: the images of --test_dir are one split.")
    for name, value, known in (("split", own.split, SPLITS), ("match_classes", own.match_classes, MATCHES)):
        if value is not None and value not in known:
            raise unknown(name, value, known)
    return options


def _check_pictures(own: Any, source: Source):
    if own.confusion is not None and source.is_multi_label:
        raise UserError("--confusion has no effect here: images of several classes each have no confusion matrix.")
    if (picture := own.picture) is None:
        return
    if source.is_multi_label or len(source.class_names) > MOST_CLASSES_DRAWN:
        raise UserError(
            f"--picture draws the confusion of up to {MOST_CLASSES_DRAWN} classes, one an image; {source.name} has "
            f"{len(source.class_names)}{', any number an image' if source.is_multi_label else ''}."
        )
    if Path(picture).suffix.lower() != ".png":
        raise UserError(f"--picture {picture}: the picture is a PNG; expected a name that ends in .png.")


def _bad_text(bad: list[BadImage]) -> str:
    lines = [f"{len(bad):,} image(s) cannot be read and are left out:"]
    lines += [f"  {shown(image.name)}: {image.reason}" for image in bad[:NUM_NAMED]]
    if len(bad) > NUM_NAMED:
        lines.append(f"  and {len(bad) - NUM_NAMED:,} more; --output FILE names them all")
    return "\n".join(lines)


def _write(own: Any, results: dict[str, Any]):
    flag = "--output"
    try:
        if own.output is not None:
            path = Path(own.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, results)
            print(f"{path}: all scores")
        flag = "--picture"
        if own.picture is not None:
            print(f"{write_confusion(own.picture, results)}: the confusion matrix")
        flag = "--confusion"
        if own.confusion is not None:
            path = Path(own.confusion)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(confusion_csv(results["confusion"], results["class_names"]), encoding="utf-8")
            print(f"{path}: the confusion matrix as CSV")
    except OSError as error:
        raise UserError(f"{flag} {getattr(own, flag[2:])} cannot be written: {error.strerror}.") from error
