"""The scores of one split as text for a terminal, and its confusion matrix as a picture."""

from pathlib import Path
from typing import Any

from .metrics import wilson_interval
from .plots import LIGHT, confusion_figure, png_bytes
from .record import METRICS, RunRecord, metric_label, metric_text, most_confused, printable
from .text_table import text_table

MOST_CLASSES_LISTED = 50  # in the table of classes
NUM_LISTED = 20  # of more classes than that, those that are recognised least
MOST_CLASSES_IN_MATRIX = 20
LONGEST_HEAD = 7  # letters of a class name that fit over a column of the matrix


def score_text(results: dict[str, Any]) -> str:
    """The scores, each class and the confusion, from the results of `training.scoring.score`."""
    parts = [heading(results), overall(results), per_class(results["per_class"])]
    if "confusion" in results:
        parts.append(confusion(results["confusion"], results["class_names"]))
    return "\n\n".join(parts)


def heading(results: dict[str, Any]) -> str:
    """What was scored on what, in which time."""
    return (
        f"{results['model']} on {_data_of(results)}: {results['num_images']:,} images of "
        f"{count_of(present(results['per_class']))} in {results['seconds']:.1f} s, "
        f"{results['images_per_second']:,.0f} images/s with decoding"
    )


def _data_of(results: dict[str, Any]) -> str:
    """The dataset's split, or the folder, which has none."""
    data = results["dataset"]
    return data["name"] if data["split"] is None else f"the {data['split']} split of {data['name']}"


def count_of(rows: list[Any]) -> str:
    return f"{len(rows):,} class{'' if len(rows) == 1 else 'es'}"


def present(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes that have images."""
    return [row for row in rows if row["support"]]


def class_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """precision_macro and recall_macro: means over the classes that have images, each class as much as any other; none
    where no class has any.

    Of images with one class, that of recall is the balanced accuracy: accuracy with as many images of each class.
    """
    found = present(rows)
    return {name: _mean(found, name.partition("_")[0]) for name in ("precision_macro", "recall_macro") if found}


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def overall(results: dict[str, Any]) -> str:
    """One line a score, with what it takes to read it."""
    rows, found = results["per_class"], present(results["per_class"])
    low, high = results["accuracy_interval"]
    comments = {"accuracy": f"95% interval {metric_text('accuracy', low)} to {metric_text('accuracy', high)} (Wilson)"}
    if 0 < len(found) < len(rows):
        mean = _mean(found, "f1")
        comments["f1_macro"] = (
            f"over all {len(rows):,} classes of the model; {metric_text('f1_macro', mean)} over {count_of(found)} with "
            "images"
        )
    lines = [
        [metric_label(name, results["is_multi_label"]), metric_text(name, results[name]), comments.get(name, "")]
        for name in METRICS
        if name in results
    ]
    mean = f"mean over {count_of(found)} with images"
    balanced = "" if results["is_multi_label"] else ": balanced accuracy"
    texts = {"precision_macro": mean, "recall_macro": mean + balanced} if found else {}
    for name, text in texts.items():
        lines.append([f"Macro {name.partition('_')[0]}", metric_text("accuracy", results[name]), text])
    if "calibration" in results:
        calibration = results["calibration"]
        error, confidence = calibration["expected_calibration_error"], calibration["mean_confidence"]
        bins = f"{len(calibration['bins'])} bins of equal width"
        lines += [
            ["Mean confidence", metric_text("accuracy", confidence), "probability of the answers"],
            ["Expected calibration error", metric_text("accuracy", error), bins],
        ]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {text}".rstrip() for name, value, text in lines)


def per_class(rows: list[dict[str, Any]]) -> str:
    """A table of the classes, or of those that are recognised least where they are many."""
    shown, lead = rows, []
    if len(rows) > MOST_CLASSES_LISTED:
        shown = sorted(present(rows), key=lambda row: row["recall"])[:NUM_LISTED]
        lead = [f"The {len(shown)} of {len(rows):,} classes with the lowest recall:"]
    cells = [["class", "precision", "recall", "95% interval (Wilson)", "F1", "images"]]
    for row in shown:
        precision, recall, f1 = (f"{100 * row[name]:.1f}%" for name in ("precision", "recall", "f1"))
        interval = "{:.1f}% to {:.1f}%".format(*(100 * end for end in row["recall_interval"]))
        if not row["support"]:
            recall, interval, f1 = "–", "–", "–"
        cells.append([printable(row["class"]), precision, recall, interval, f1, f"{row['support']:,}"])
    return "\n".join([*lead, text_table(cells)])


def with_recall_intervals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the classes, each with the 95% interval of its recall."""
    return [
        {**row, "recall_interval": list(wilson_interval(round(row["recall"] * row["support"]), row["support"]))}
        for row in rows
    ]


def confusion(counts: list[list[int]], class_names: list[str]) -> str:
    """The matrix of counts, rows the true classes; the most frequent mistakes where classes are many."""
    names = list(map(printable, class_names))
    if len(names) > MOST_CLASSES_IN_MATRIX:
        mistakes = most_confused(counts, names, NUM_LISTED)
        lines = [f"  {true} -> {answer}  {count:,}" for true, answer, count in mistakes] or ["  none"]
        return "\n".join(["Most frequent mistakes (true class -> answer, images):", *lines])
    heads = names
    if max(map(len, names)) > LONGEST_HEAD:
        heads = [str(index) for index in range(len(names))]
        names = [f"{index}: {name}" for index, name in enumerate(names)]
    rows = [[name, *(f"{count:,}" if count else "." for count in row)] for name, row in zip(names, counts, strict=True)]
    return "\n".join(["Confusion (row: true class, column: answer):", text_table([["", *heads], *rows])])


def write_confusion(path: str | Path, results: dict[str, Any]) -> Path | None:
    """The path of the PNG it writes, the confusion matrix; None, and no file, where classes are too many to draw."""
    path = Path(path)
    record = RunRecord(path.parent, {}, {**results, "confusion": {"test": results["confusion"]}}, [], [])
    figure = confusion_figure(record, LIGHT)
    if figure is None:
        return None
    title = f"Confusion on {printable(_data_of(results))}"
    figure.axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=LIGHT.text, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(figure))
    return path
