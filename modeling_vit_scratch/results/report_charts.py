"""The charts of report.html, written as SVG: curves, reliability diagram and confusion matrix.

Colours are classes of the page's style, so that one picture serves light and dark. matplotlib draws the same curves for
plots/, but takes seconds where this takes milliseconds; its ticks are used here too.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from .plots import LOG_SPAN, MOST_CLASSES_COUNTED, MOST_POINTS_UNSMOOTHED, panel_title, running_mean
from .record import RunRecord, series, training_label
from .report_html import text

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 32  # margins, where ticks are written
MOST_DOTS = 40  # evaluations that can be told apart
MOST_POINTS = 1_000  # of a curve
READABLE = 0.78  # of its size a confusion matrix can still be read

thousands = EngFormatter(sep="")


def short(value: float) -> str:
    """A number in few letters, to four digits: 12.5k, 0.5, 2.5e-4."""
    value = float(f"{value:.4g}")
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return thousands(value) if abs(value) >= 1000 else f"{value:g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


class Axis(NamedTuple):
    """How a panel's values are written and where its axis begins and, at the least, ends."""

    write: Callable[[float], str]
    bottom: float | None = None
    least_top: float | None = None
    evaluation: str | None = None  # the key of the validation's curve
    is_noisy: bool = True


AXES = {
    "loss": Axis(short, evaluation="eval_loss"),
    "train_accuracy": Axis(percent, evaluation="eval_accuracy"),
    "learning_rate": Axis(short, bottom=0, is_noisy=False),
    "grad_norm": Axis(short, bottom=0),
    "images_per_second": Axis(short, bottom=0),
    "data_wait": Axis(percent, 0, 0.2),  # a well fed run must not look like a starved one
}


@dataclass(frozen=True)
class Curve:
    """Values over steps; css_class: first (training) or second (validation), with `faint` where a mean lies on top."""

    label: str
    css_class: str
    steps: Sequence[float]
    values: Sequence[float]
    has_dots: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to places in the picture."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (map(math.log10, (self.low, self.high, value)) if self.is_log
                            else (self.low, self.high, value))  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


# ---------------------------------------------------------------- curves over the steps


def panel_chart(run: RunRecord, key: str) -> str:
    """One panel of the run's log as a figure; its numbers are those of metrics.jsonl."""
    title, axis = panel_title(run, key), AXES[key]
    curves = training_curves(training_label(run, key), *series(run.training, key), axis.is_noisy)
    if axis.evaluation is not None:
        steps, values = series(run.evaluations, axis.evaluation)
        curves.append(Curve("validation", "second", steps, values, len(steps) <= MOST_DOTS))
    curves = [curve for curve in curves if any(map(math.isfinite, curve.values))]
    if not curves:
        return ""
    logged = [curve for index, curve in enumerate(curves) if curve.label not in {c.label for c in curves[:index]}]
    keys = "".join(f'<i class="{curve.css_class.split()[-1]}"></i>{curve.label}' for curve in logged)
    key_line = f'<div class="key" aria-hidden="true">{keys}</div>' if axis.evaluation else ""
    label = text(f"{title} over the steps: {'; '.join(said_of(curve, axis.write) for curve in logged)}.")
    return f"<figure><h3>{title}</h3>{key_line}{svg(WIDTH, HEIGHT, label, curve_shapes(curves, axis, key))}</figure>"


def training_curves(label: str, steps: list[int], values: list[float], is_noisy: bool) -> list[Curve]:
    """The curve as it is; where points are many and noisy, faint, with its running mean on top."""
    if len(steps) <= MOST_POINTS_UNSMOOTHED or not is_noisy:
        return [Curve(label, "first", *thinned(steps, values), len(steps) == 1)]
    mean = running_mean(values, len(values) // 50).tolist()
    return [
        Curve(label, "faint first", *thinned(steps, values)),
        Curve(label, "first", *thinned(steps, mean)),
    ]


def said_of(curve: Curve, write: Callable[[float], str]) -> str:
    """The curve in words, for those who cannot see it."""
    finite = [(step, value) for step, value in zip(curve.steps, curve.values) if math.isfinite(value)]
    (first_step, first), (last_step, last) = finite[0], finite[-1]
    values = [value for _, value in finite]
    return (
        f"{curve.label} {write(first)} at step {first_step:,}, {write(last)} at step {last_step:,}, "
        f"lowest {write(min(values))}, highest {write(max(values))}"
    )


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS of the points: of each stretch of steps its lowest and its highest, so that peaks stay."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    places = np.flatnonzero(np.isfinite(values))
    kept: list[int] = []
    for stretch in np.array_split(places, MOST_POINTS // 2):
        own = np.asarray(values)[stretch]
        kept += sorted({int(stretch[own.argmin()]), int(stretch[own.argmax()])}) if len(own) else []
    return [steps[place] for place in kept], [values[place] for place in kept]


def curve_shapes(curves: list[Curve], axis: Axis, key: str) -> str:
    """Grid, ticks and curves."""
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    is_log = key == "grad_norm" and 0 < LOG_SPAN * min(values) < max(values)
    low, high = value_range(values, axis, is_log)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, is_log)
    steps = [step for curve in curves for step in curve.steps]
    x = Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, LEFT, WIDTH - RIGHT)
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if is_log else MaxNLocator(4)
    y_ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    x_ticks = [tick for tick in MaxNLocator(5, integer=True).tick_values(x.low, x.high) if x.low <= tick <= x.high]
    shapes = []
    for tick in y_ticks:
        place = y(tick)
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.2f}" y2="{place:.2f}"/>')
        shapes.append(f'<text class="y" x="{LEFT - 6}" y="{place + 4:.2f}" text-anchor="end">'
                      f"{axis.write(tick)}</text>")  # fmt: skip
    for tick in x_ticks:
        shapes.append(f'<text class="x" x="{x(tick):.2f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
                      f"{short(tick)}</text>")  # fmt: skip
    shapes.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    return "".join(shapes) + "".join(curve_shape(curve, x, y, axis.write) for curve in curves)


def value_range(values: list[float], axis: Axis, is_log: bool) -> tuple[float, float]:
    """(lowest, highest) value of the axis, with a little room around the curves."""
    low, high = min(values), max([*values, *filter(None, [axis.least_top])])
    if is_log:
        return low / 1.2, high * 1.2
    if axis.bottom is not None:
        return axis.bottom, axis.bottom + 1.06 * (high - axis.bottom) if high > axis.bottom else axis.bottom + 1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def curve_shape(curve: Curve, x: Scale, y: Scale, write: Callable[[float], str]) -> str:
    """The curve as a path that breaks where a value is not finite, and a dot with its number for each evaluation."""
    points, command = [], "M"
    dots = []
    for step, value in zip(curve.steps, curve.values):
        if not math.isfinite(value):
            command = "M"
            continue
        place = f"{x(step):.2f},{y(value):.2f}"
        points.append(command + place)
        command = "L"
        if curve.has_dots:
            across, down = place.split(",")
            said = f"{curve.label}, step {step:,}: {write(value)}"
            dots.append(
                f'<circle class="{curve.css_class}" cx="{across}" cy="{down}" r="3"><title>{said}</title></circle>'
            )
    return f'<path class="{curve.css_class}" d="{"".join(points)}"/>{"".join(dots)}'


def svg(width: float, height: float, label: str, shapes: str, least_width: float = 0) -> str:
    """The shapes as a picture; `label`, escaped, says what is to be seen. On a screen that is narrower than least_width
    it scrolls."""
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" style="min-width: {least_width:g}px">{shapes}</svg>'
    )


# ---------------------------------------------------------------- reliability


def reliability_chart(calibration: dict[str, Any]) -> str:
    """Share of right answers by confidence, the gap to the mean confidence, and below how many images a bin has."""
    bins = calibration["bins"]
    side, low_height = 240, 46
    x = Scale(0, 1, LEFT, LEFT + side)
    y = Scale(0, 1, TOP + side, TOP)
    base = TOP + side + 14 + low_height
    most = max(row["count"] for row in bins) or 1
    shapes = []
    for row in bins:
        if not row["count"]:
            continue
        left, width = x(row["above"]) + 0.75, x(row["up_to"]) - x(row["above"]) - 1.5
        ends = sorted((y(row["accuracy"]), y(row["confidence"])))
        said = (
            f"Confidence {row['above']:.2f} to {row['up_to']:.2f}: {row['count']:,} images, "
            f"{percent_1(row['accuracy'])} right at a mean confidence of {percent_1(row['confidence'])}"
        )
        height = low_height * row["count"] / most
        shapes.append(
            f"<g><title>{said}</title>"
            + rect("bar", left, y(row["accuracy"]), width, y(0) - y(row["accuracy"]))
            + rect("gap", left, ends[0], width, ends[1] - ends[0])
            + rect("bar", left, base - height, width, height)
            + "</g>"
        )
    for tick in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:g}" text-anchor="end">{percent(tick)}</text>')
        shapes.append(f'<text x="{x(tick):g}" y="{base + 15:g}" text-anchor="middle">{percent(tick)}</text>')
    shapes.append(rect("frame", x(0), y(1), side, side))
    shapes.append(f'<line class="ideal" x1="{x(0):g}" y1="{y(0):g}" x2="{x(1):g}" y2="{y(1):g}"/>')
    shapes.append(
        f'<text x="{LEFT - 6}" y="{base - low_height / 2 + 4:g}" text-anchor="end" font-size="10">images</text>'
    )
    shapes.append(f'<text x="{x(1):g}" y="{base + 30:g}" text-anchor="end">confidence</text>')
    shapes.append(f'<text x="{x(0) + 6:g}" y="{y(1) + 14:g}">right answers</text>')
    error = percent_1(calibration["expected_calibration_error"])
    label = f"Reliability diagram: share of right answers by confidence; expected calibration error {error}."
    return f'<figure class="wide">{svg(LEFT + side + 22, base + 36, text(label), "".join(shapes))}</figure>'


def percent_1(share: float) -> str:
    return f"{100 * share:.1f}%"


def rect(css_class: str, x: float, y: float, width: float, height: float, more: str = "") -> str:
    return (
        f'<rect class="{css_class}" x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"'
        f"{more}/>"
    )


# ---------------------------------------------------------------- confusion


def confusion_chart(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Counts by true class (rows) and predicted class, coloured by the square root of their share of the true class:
    a mistake in a hundred is still seen."""
    table = np.asarray(counts)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)  # a class without images has no share
    num_classes = len(table)
    cell = 27 if num_classes <= MOST_CLASSES_COUNTED else 16 if num_classes <= 30 else 13
    names = [shortened(name) for name in class_names]
    room = max(map(letters_width, names)) + 10
    is_slanted = room > 30
    head = 0.72 * room + 12 if is_slanted else 20
    shapes = []
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        shapes.append(
            f'<text class="name" x="{room - 6:g}" y="{head + middle + 4:g}" text-anchor="end">{text(name)}</text>'
        )
        turn = f' transform="rotate(-45 {room + middle:g} {head - 6:g})"' if is_slanted else ' text-anchor="middle"'
        shapes.append(f'<text class="name" x="{room + middle:g}" y="{head - 6:g}"{turn}>{text(name)}</text>')
    for row, column in zip(*np.nonzero(table), strict=True):
        share, x, y = shares[row, column], room + column * cell, head + row * cell
        said = f"{names[row]}, taken for {names[column]}: {table[row, column]:,} images, {percent_1(share)}"
        drawn = rect("cell", x, y, cell, cell, f' fill-opacity="{math.sqrt(share):.3f}"')
        if num_classes <= MOST_CLASSES_COUNTED:
            deep = " deep" if share > 0.35 else ""
            size = ' font-size="9"' if table[row, column] >= 1000 else ""
            drawn += (f'<text class="count{deep}" x="{x + cell / 2:g}" y="{y + cell / 2 + 4:g}" '
                      f'text-anchor="middle"{size}>{table[row, column]}</text>')  # fmt: skip
        shapes.append(f"<g><title>{text(said)}</title>{drawn}</g>")
    side = num_classes * cell
    shapes.append(rect("frame", room, head, side, side))
    label = f"Confusion matrix: {np.trace(table):,} of {table.sum():,} images on the diagonal, where answers are right."
    over = head if is_slanted else 8  # the last name leans out
    width = room + side + over * 0.9
    picture = svg(width, head + side + 4, label, "".join(shapes), READABLE * width)
    return f'<figure class="wide">{picture}</figure>'


def shortened(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def letters_width(name: str) -> float:
    """About how wide the name is in the page's font, in pixels; a little more is no harm."""
    return sum(11.5 if unicodedata.east_asian_width(letter) in "WF" else 6.4 for letter in name)
