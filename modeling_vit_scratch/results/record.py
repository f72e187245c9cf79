"""A finished run as its folder records it, and the facts that report and model card draw from it."""

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import UserError
from .metrics import wilson_interval

Row = dict[str, Any]


class Metric(NamedTuple):
    """How a score is called for people and on the Hub, and whether it is a share of one (shown in percent)."""

    label: str
    hub_type: str | None
    is_share: bool


METRICS = {
    "accuracy": Metric("Accuracy", "accuracy", True),
    "accuracy_top5": Metric("Top-5 accuracy", "accuracy", True),
    "f1_macro": Metric("Macro F1", "f1", True),
    "f1_micro": Metric("Micro F1", "f1", True),
    "mean_average_precision": Metric("Mean average precision", "mean_average_precision", True),
    "loss": Metric("Loss", "loss", False),
}
SCORED_SPLITS = ("test", "validation")  # in this order: the test split is what a run is judged by

# An evaluation loss this much above its lowest value has risen: less is the noise of one evaluation.
RISEN_LOSS_RATIO = 1.05

TOKEN = re.compile(r"hf_\w{8,}")
# Control characters, halves of surrogate pairs (undecodable file names) and marks that turn the reading direction.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]+")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class RunRecord:
    """What a finished run wrote: its recipe, its results, and its log, as training and as evaluation rows."""

    folder: Path
    recipe: dict[str, Any]
    results: dict[str, Any]
    training: list[Row]
    evaluations: list[Row]

    @property
    def name(self) -> str:
        return printable(self.folder.resolve().name)

    @property
    def class_names(self) -> list[str]:
        return [printable(name) for name in self.results.get("class_names") or []]

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of classes. Runs of older versions do not say; their scores do."""
        told = any("mean_average_precision" in found for found in scores(self.results).values())
        return bool(self.results.get("is_multi_label", told))


def read_run(run_dir: str | Path) -> RunRecord:
    """The record of a finished run. Raises UserError where a file is missing or cannot be read."""
    folder = Path(run_dir)
    recipe, results = (_read_json(folder / name) for name in ("recipe.json", "results.json"))
    rows = _read_rows(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    return RunRecord(folder, recipe, results, training, evaluations)


def _read_text(path: Path) -> str:
    if not path.is_file():
        around = next((folder for folder in path.parents[1:3] if (folder / path.name).is_file()), None)
        hint = "" if around is None else f" Did you mean {str(around)!r}?"  # of a model/ or a checkpoint
        raise UserError(
            f"No {path}: expected a finished run's folder, with recipe.json, metrics.jsonl and results.json.{hint}"
        )
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed_object(_read_text(path), str(path))


def _read_rows(path: Path) -> list[Row]:
    lines = _read_text(path).splitlines()
    return [_parsed_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parsed_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object.")
    return value


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a value for `key`."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def training_label(run: RunRecord, key: str) -> str:
    """What the curve of training is called beside validation's, which is of another loss where training's is binary."""
    return "training (binary)" if key == "loss" and run.recipe.get("bce_loss") else "training"


# ---------------------------------------------------------------- facts


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{split: {metric: value}} of the scores at the top level of results.json, such as `test_accuracy`."""
    found: dict[str, dict[str, float]] = {}
    for split in SCORED_SPLITS:
        names = [name for name in results if name.startswith(f"{split}_") and _is_number(results[name])]
        if names:
            ordered = sorted((name.removeprefix(f"{split}_") for name in names), key=_metric_rank)
            found[split] = {metric: results[f"{split}_{metric}"] for metric in ordered}
    return found


def _metric_rank(metric: str) -> tuple[int, str]:
    return (list(METRICS).index(metric) if metric in METRICS else len(METRICS)), metric


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def metric_label(metric: str, is_multi_label: bool = False) -> str:
    """The name of a metric for people; of one that is not in METRICS, its own name in words.

    is_multi_label: an image has any number of classes, and is right where the answer has exactly those.
    """
    if metric == "accuracy" and is_multi_label:
        return "Exact match"
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ").capitalize()


def metric_text(metric: str, value: float) -> str:
    """A score for people: shares in percent with two decimals, losses with four, numbers of unknown kind shortened."""
    if not math.isfinite(value):
        return "not a number"
    if metric not in METRICS:
        return f"{value:.4g}"
    return f"{100 * value:.2f}%" if METRICS[metric].is_share else f"{value:.4f}"


def accuracy_margin(accuracy: float, num_images: int) -> float:
    """Half the width of the 95% interval of an accuracy counted on `num_images` (Wilson's, so never zero)."""
    low, high = wilson_interval(round(accuracy * num_images), num_images)
    return (high - low) / 2


def risen_loss(evaluations: list[Row]) -> tuple[Row, Row] | None:
    """The evaluation of the lowest validation loss and the last one, where the loss has risen between; else None."""
    rows = [row for row in evaluations if _is_number(row.get("eval_loss")) and _is_number(row.get("eval_accuracy"))]
    if not rows:
        return None
    lowest, last = min(rows, key=lambda row: row["eval_loss"]), rows[-1]
    return (lowest, last) if last["eval_loss"] > RISEN_LOSS_RATIO * lowest["eval_loss"] else None


def risen_loss_text(lowest: Row, last: Row, did: str, is_multi_label: bool) -> str:
    """The first half of a sentence on a risen loss. did: what the accuracy did meanwhile."""
    accuracies = (metric_text("accuracy", row["eval_accuracy"]) for row in (lowest, last))
    return (
        f"The validation loss was lowest at step {lowest['step']:,} ({lowest['eval_loss']:.3f}) and rose to "
        f"{last['eval_loss']:.3f} at step {last['step']:,}, while the validation "
        f"{metric_label('accuracy', is_multi_label).lower()} {did} ({', then '.join(accuracies)}): "
    )


def overfitting_note(evaluations: list[Row], is_multi_label: bool = False) -> str | None:
    """A sentence for a run whose validation loss has risen from its lowest value while accuracy has not; else None."""
    rows = risen_loss(evaluations)
    if rows is None or rows[1]["eval_accuracy"] > rows[0]["eval_accuracy"]:
        return None
    told = risen_loss_text(*rows, "did not rise", is_multi_label)
    return f"{told}the model overfits. Fewer steps, more augmentation or more data would help."


def weights_text(results: dict[str, Any]) -> str:
    """Which weights the run kept and scored, from the record's "last" or "best at step N", with ", averaged" or not."""
    which, _, averaged = str(results.get("weights") or "last").partition(", ")
    text = (
        "those of the last step"
        if which == "last"
        else f"those that validated best, of {which.removeprefix('best at ')}"
    )
    return f"{text}, an average over steps" if averaged else text


def judged_split(table: dict[str, Any] | None) -> str | None:
    """The split of a table by split to show: the test split, or validation where there is no other; None for none."""
    return next((split for split in SCORED_SPLITS if (table or {}).get(split)), None)


def most_confused(
    confusion: list[list[int]], class_names: list[str], num_pairs: int = 10
) -> list[tuple[str, str, int]]:
    """The most frequent mistakes (true class, predicted class, count), most frequent first."""
    pairs = [
        (class_names[row], class_names[column], count)
        for row, counts in enumerate(confusion)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:num_pairs]


def split_sizes(results: dict[str, Any]) -> dict[str, int]:
    """The number of images of each split, where recorded."""
    return (results.get("dataset") or {}).get("splits") or {}


def dataset_hub_id(run: RunRecord) -> str | None:
    """The Hub repository of the data: dataset["repository"] where recorded, else a name of the form owner/name."""
    dataset = run.results.get("dataset") or {}
    if "repository" in dataset or run.recipe.get("train_dir"):
        return dataset.get("repository")
    return hub_id(dataset.get("name"))


def dataset_label(run: RunRecord) -> str:
    """The name of the run's data for strangers: a Hub id or a known name as it is, a folder by its last component."""
    name = str((run.results.get("dataset") or {}).get("name") or "unnamed data")
    return printable(name if name == dataset_hub_id(run) else last_component(name))


def hub_id(name: str | None) -> str | None:
    """The name where it has the form owner/name and is no folder here; else None."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def last_component(path: str) -> str:
    """The last component of a path of any system: a stranger needs no more of it."""
    return PureWindowsPath(path).name or path


# ---------------------------------------------------------------- text


def printable(value: Any) -> str:
    """The value as text that is safe to print: no control characters, no access tokens."""
    return TOKEN.sub("hf_***", UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def command_text(command: str | list[str]) -> str:
    """The recorded command as one line for a shell."""
    return printable(command if isinstance(command, str) else shlex.join(command))


def public_command(command: str | list[str]) -> str:
    """The recorded command with every local path outside the working folder cut to its last component."""
    try:
        words = shlex.split(command) if isinstance(command, str) else command
    except ValueError:  # a quote that never closes
        words = command.split()
    return printable(shlex.join("=".join(map(public_word, word.split("="))) for word in words))


def public_word(word: str) -> str:
    """The word, or its last component where it is a path that starts outside the working folder."""
    is_outside = word.startswith(("/", "~", "../", "file:")) or PureWindowsPath(word).is_absolute()
    return last_component(word) if is_outside else word


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 42 s, 5 min 12 s, 3 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
