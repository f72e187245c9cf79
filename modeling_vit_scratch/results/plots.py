"""The pictures of a run, for its folder plots/: curves over the steps and the confusion matrix.

Figures are drawn through matplotlib's object interface: pyplot's global state and the chosen backend stay as they are.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from .record import RunRecord, judged_split, metric_label, read_run, series, training_label

MOST_CLASSES_DRAWN = 50
MOST_CLASSES_COUNTED = 16  # up to here the cells have room for their counts
MOST_POINTS_UNSMOOTHED = 150
LOG_SPAN = 20  # a gradient norm that spans more is drawn on a logarithmic axis
DOTS_PER_INCH = 144


class Theme(NamedTuple):
    """The colours of a picture. Blue and orange of Okabe and Ito stay apart for colour-blind eyes."""

    background: str
    text: str
    muted: str
    grid: str
    training: str
    evaluation: str
    heat: tuple[str, str, str]


LIGHT = Theme("#ffffff", "#1f2328", "#59636e", "#e3e7eb", "#0072b2", "#d55e00", ("#f6f8fa", "#6aaed6", "#08306b"))


def write_plots(run_dir: str | Path) -> list[Path]:
    """The paths of what it writes: plots/curves.png, plots/confusion.png for up to fifty classes, and the counts of the
    confusion of any number of classes as plots/confusion.csv."""
    run = read_run(run_dir)
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    figures = {"curves.png": curves_figure(run, LIGHT), "confusion.png": confusion_figure(run, LIGHT)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / name)
            paths[-1].write_bytes(png_bytes(figure))
    if (split := judged_split(run.results.get("confusion"))) is not None:
        paths.append(folder / "confusion.csv")
        paths[-1].write_text(confusion_csv(run.results["confusion"][split], run.class_names), encoding="utf-8")
    return paths


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # without the version matplotlib notes in each file, the same records give the same bytes
    figure.savefig(
        buffer, format="png", dpi=DOTS_PER_INCH, facecolor=figure.get_facecolor(), metadata={"Software": None}
    )
    return buffer.getvalue()


# ---------------------------------------------------------------- curves


def draw_loss(axes: Axes, run: RunRecord, theme: Theme):
    draw_series(axes, *series(run.training, "loss"), theme.training, training_label(run, "loss"))
    draw_evaluations(axes, *series(run.evaluations, "eval_loss"), theme.evaluation, "validation")
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9)


def draw_accuracy(axes: Axes, run: RunRecord, theme: Theme):
    draw_series(axes, *series(run.training, "train_accuracy"), theme.training, "training")
    draw_evaluations(axes, *series(run.evaluations, "eval_accuracy"), theme.evaluation, "validation")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9, loc="lower right")


def draw_learning_rate(axes: Axes, run: RunRecord, theme: Theme):
    steps, values = series(run.training, "learning_rate")
    axes.plot(steps, values, color=theme.training, linewidth=1.8, marker="o" if len(steps) == 1 else None)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylim(bottom=0)


def draw_gradient_norm(axes: Axes, run: RunRecord, theme: Theme):
    steps, values = series(run.training, "grad_norm")
    draw_series(axes, steps, values, theme.training, "gradient norm")
    finite = [value for value in values if math.isfinite(value)]
    if finite and 0 < LOG_SPAN * min(finite) < max(finite):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def draw_throughput(axes: Axes, run: RunRecord, theme: Theme):
    draw_series(axes, *series(run.training, "images_per_second"), theme.training, "images per second")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(bottom=0)


def draw_data_wait(axes: Axes, run: RunRecord, theme: Theme):
    steps, shares = series(run.training, "data_wait")
    draw_series(axes, steps, shares, theme.training, "share of the time")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, max(0.2, *shares))  # a well fed run must not look like a starved one


PANELS: dict[str, tuple[str, Callable[[Axes, RunRecord, Theme], None]]] = {
    "loss": ("Loss", draw_loss),
    "train_accuracy": ("Accuracy", draw_accuracy),
    "learning_rate": ("Learning rate", draw_learning_rate),
    "grad_norm": ("Gradient norm", draw_gradient_norm),
    "images_per_second": ("Images per second", draw_throughput),
    "data_wait": ("Share of the time spent waiting for data", draw_data_wait),
}


def draw_series(axes: Axes, steps: list[int], values: list[float], colour: str, label: str):
    """Draws a training curve: as it is, or, where points are many, faintly with its running mean on top."""
    if not steps:
        return
    if len(steps) <= MOST_POINTS_UNSMOOTHED:
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker="o" if len(steps) == 1 else None)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, running_mean(values, len(values) // 50), color=colour, linewidth=1.8, label=label)


def draw_evaluations(axes: Axes, steps: list[int], values: list[float], colour: str, label: str):
    """Draws an evaluation curve, with a dot for each evaluation while they can be told apart."""
    if steps:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(steps) <= 40 else None, markersize=4,
                  label=label)  # fmt: skip


def running_mean(values: list[float], window: int) -> np.ndarray:
    """The mean of up to `window` values on each side of a value and itself; as many values as came."""
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(np.asarray(values, dtype=float)))])
    counts = np.concatenate([[0], np.cumsum(np.isfinite(np.asarray(values, dtype=float)))])
    positions = np.arange(len(values))
    low, high = np.maximum(positions - window, 0), np.minimum(positions + window + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def panels_of(run: RunRecord) -> list[str]:
    """The keys of the panels that the run recorded anything for."""
    recorded = {key for row in run.training + run.evaluations for key, value in row.items() if value is not None}
    return [key for key in PANELS if key in recorded or (key == "train_accuracy" and "eval_accuracy" in recorded)]


def panel_title(run: RunRecord, key: str) -> str:
    return metric_label("accuracy", run.is_multi_label) if key == "train_accuracy" else PANELS[key][0]


def draw_panel(axes: Axes, key: str, run: RunRecord, theme: Theme):
    """Draws one panel with its title, axes and grid."""
    draw = PANELS[key][1]
    style_axes(axes, theme)
    axes.set_title(panel_title(run, key), loc="left", fontsize=11, fontweight="bold", color=theme.text)
    axes.set_xlabel("step", color=theme.muted, fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=theme.grid, linewidth=0.8)
    draw(axes, run, theme)


def style_axes(axes: Axes, theme: Theme):
    axes.set_facecolor(theme.background)
    axes.tick_params(which="both", colors=theme.muted, labelsize=9, length=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)


def curves_figure(run: RunRecord, theme: Theme) -> Figure | None:
    """All panels of a run in one picture; None for a run that logged nothing."""
    keys = panels_of(run)
    if not keys:
        return None
    num_columns = min(len(keys), 3)
    num_rows = math.ceil(len(keys) / num_columns)
    width, height = 5 * num_columns, 3.4 * num_rows
    figure = Figure(figsize=(width, height), facecolor=theme.background)
    # fixed margins, in inches: a layout engine would draw every text once more to measure it
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.25 / width, bottom=0.55 / height, top=1 - 0.4 / height, wspace=0.21, hspace=0.38
    )
    for place, key in enumerate(keys, start=1):
        draw_panel(figure.add_subplot(num_rows, num_columns, place), key, run, theme)
    return figure


# ---------------------------------------------------------------- confusion


def confusion_csv(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """The matrix as CSV: a row for each true class, a column for each answer, names in the first of both."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["true class \\ answer", *class_names])
    table.writerows([name, *row] for name, row in zip(class_names, counts, strict=True))
    return buffer.getvalue()


def confusion_figure(run: RunRecord, theme: Theme) -> Figure | None:
    """Counts by true and predicted class, coloured by their share of the true class; None over fifty classes."""
    split = judged_split(run.results.get("confusion"))
    if split is None or len(run.class_names) > MOST_CLASSES_DRAWN:
        return None
    counts = np.asarray(run.results["confusion"][split])
    # a class without images has a row of zeros: no share, not a division by zero
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(counts)
    cell = 0.55 if num_classes <= MOST_CLASSES_COUNTED else 0.36 if num_classes <= 30 else 0.24
    side = max(2.2, cell * num_classes)
    figure = Figure(figsize=(side + 2.6, side + 1.8), facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, theme)
    # the square root of the share: a mistake in a hundred is still seen
    colours = LinearSegmentedColormap.from_list("shares", theme.heat)
    image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1))
    label_classes(axes, run.class_names, theme, small=num_classes > 30)
    axes.set_xlabel("predicted class", color=theme.muted, fontsize=9)
    axes.set_ylabel("true class", color=theme.muted, fontsize=9)
    axes.set_title(f"Confusion, {split} split", loc="left", fontsize=11, fontweight="bold", color=theme.text)
    if num_classes <= MOST_CLASSES_COUNTED:
        write_counts(axes, counts, shares, theme)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.02, format=PercentFormatter(1))
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class", color=theme.muted, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    return figure


def label_classes(axes: Axes, class_names: list[str], theme: Theme, small: bool):
    """Writes the class names on both axes, below slanted or upright where they are long."""
    labels = [plot_label(index, name) for index, name in enumerate(class_names)]
    longest = max(map(len, labels))
    rotation = 0 if longest <= 3 else 45 if longest <= 12 else 90
    # names are not formulas: a dollar in one must not start one
    style = {"fontsize": 7 if small else 9, "color": theme.text, "parse_math": False}
    axes.set_yticks(range(len(labels)), labels, **style)
    axes.set_xticks(range(len(labels)), labels, rotation=rotation, **style)
    if rotation == 45:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def plot_label(index: int, name: str) -> str:
    """The class name, shortened; the number of the class where matplotlib's font cannot write its name."""
    return _cut(name) if _has_letters_of(name) else f"class {index}"


def name_of(label: str) -> str:
    """The class name, shortened, and escaped where matplotlib's font cannot write it."""
    return _cut(label) if _has_letters_of(label) else ascii(label)[1:-1][:20]


def _has_letters_of(name: str) -> bool:
    font = get_font(findfont("DejaVu Sans"))
    return all(font.get_char_index(ord(letter)) for letter in name)


def _cut(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, theme: Theme):
    """Writes each count that is not zero into its cell, in the colour that stands out from the cell's."""
    for row, column in zip(*np.nonzero(counts), strict=True):
        is_deep = shares[row, column] > 0.35
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8,
                  color=theme.background if is_deep else theme.text)  # fmt: skip
