"""What a sweep shows: its runs grouped over seeds and ranked by validation, as a Markdown table and as a picture.

A sweep's record is the content of sweep.json. Its "axes" are lists of {"names", "values"}: the fields that change
together, and the list of their values. Each of its "runs" has "name", "values" (field -> value), "seed", "status"
(waiting, finished or failed), "note", and where it finished, its scores.
"""

import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .plots import LIGHT, Theme, png_bytes, style_axes
from .record import METRICS, accuracy_margin, command_text, metric_label, metric_text, printable

Record = dict[str, Any]

SCORES = (
    "validation_accuracy", "validation_loss", "validation_f1_macro", "validation_f1_micro",
    "validation_mean_average_precision", "test_accuracy",
)  # fmt: skip
ALWAYS_SHOWN = ("validation_accuracy", "validation_loss", "test_accuracy")
COSTS = ("train_seconds", "steps", "images_per_second")
WHOLE, PARTLY_FAILED, FAILED, WAITING = range(4)  # the order in which groups are ranked
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe and Ito
LINES = ("-", "--", ":", "-.")
MOST_BARS = 40


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; no deviation for one seed."""

    mean: float
    deviation: float | None


class Group(NamedTuple):
    """The runs that differ in nothing but the seed, and what they scored."""

    values: dict[str, Any]
    runs: list[dict[str, Any]]
    scores: dict[str, Spread]
    tier: int

    @property
    def note(self) -> str:
        """What a reader must know before trusting the row: seeds that failed or are missing; else empty."""
        counts = {status: sum(run["status"] == status for run in self.runs) for status in ("failed", "waiting")}
        if len(self.runs) == 1:
            return next((status for status, count in counts.items() if count), "")
        return ", ".join(f"{count} of {len(self.runs)} seeds {status}" for status, count in counts.items() if count)


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation of at least one number."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def ranking(record: Record) -> list[Group]:
    """The groups of a sweep, best first by the mean of its validation metric.

    Equal ones are ranked by validation loss, then in the grid's order. A group in which a seed failed comes after all
    that went through, whatever its other seeds scored; then those without a score.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        groups.setdefault(repr(run["values"]), []).append(run)
    return sorted(map(_group, groups.values()), key=lambda group: _rank(group, record["metric"]))


def _group(runs: list[dict[str, Any]]) -> Group:
    finished = [run for run in runs if run["status"] == "finished"]
    has_failed = any(run["status"] == "failed" for run in runs)
    scores = {
        name: spread([run[name] for run in finished])
        for name in (*SCORES, *COSTS)
        if finished and all(run.get(name) is not None for run in finished)
    }
    tier = (PARTLY_FAILED if has_failed else WHOLE) if finished else FAILED if has_failed else WAITING
    return Group(runs[0]["values"], runs, scores, tier)


def _rank(group: Group, metric: str) -> tuple[float, ...]:
    if f"validation_{metric}" not in group.scores:
        return group.tier, math.inf, math.inf
    value = group.scores[f"validation_{metric}"].mean
    loss = group.scores["validation_loss"].mean if "validation_loss" in group.scores else math.inf
    cost = value if metric == "loss" else -value
    return group.tier, cost if math.isfinite(cost) else math.inf, loss if math.isfinite(loss) else math.inf


# ---------------------------------------------------------------- text


def value_text(value: Any) -> str:
    """A value as a person types it: 0.001, true, none, [4,8]."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(value_text, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def values_text(values: dict[str, Any]) -> str:
    """The values with their names: learning_rate 0.001, optim adam."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def spread_text(metric: str, found: Spread | None) -> str:
    """A score for people: 97.22% ± 0.56%, or an en dash where there is none."""
    if found is None:
        return "–"
    text = metric_text(metric, found.mean)
    return text if found.deviation is None else f"{text} ± {metric_text(metric, found.deviation)}"


def score_columns(metric: str) -> list[str]:
    """The scores a table shows: those of ALWAYS_SHOWN, and the one that decides."""
    return [name for name in SCORES if name in ALWAYS_SHOWN or name == f"validation_{metric}"]


def table(record: Record) -> str:
    """The ranking as a Markdown table: the swept fields, the scores, the costs, a note; below it why runs failed."""
    fields = [name for axis in record["axes"] for name in axis["names"]]
    scores = score_columns(record["metric"])
    heads = [name.replace("_", " ", 1) for name in scores] + ["train seconds", "steps", "images/s"]
    rows = [[*fields, *heads, "note"]]
    for group in ranking(record):
        found = group.scores
        costs = [f"{found[name].mean:,.{digits}f}" if name in found else "–" for name, digits in zip(COSTS, (1, 0, 0))]
        cells = [value_text(group.values[name]) for name in fields]
        cells += [spread_text(name.partition("_")[2], found.get(name)) for name in scores]
        rows.append([cell.replace("|", "\\|") for cell in map(printable, [*cells, *costs, group.note])])
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    is_text = [True] * len(fields) + [False] * len(heads) + [True]
    lines = [
        "| " + " | ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(row, widths, is_text, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if t else "-" * (w + 1) + ":" for w, t in zip(widths, is_text)) + "|"
    failures = [printable(f"- {r['name']} failed: {r['note']}") for r in record["runs"] if r["status"] == "failed"]
    return "\n".join([lines[0], rule, *lines[1:], *([""] if failures else []), *failures])


def markdown(record: Record) -> str:
    """sweep.md: what was compared and by what it is judged, the table, the best and the command that repeats it."""
    metric, groups = record["metric"], ranking(record)
    fields = [name for axis in record["axes"] for name in axis["names"]]
    counts = {status: sum(run["status"] == status for run in record["runs"]) for status in ("finished", "failed")}
    seeds = record["seeds"] or []
    state = f"{counts['finished']} of {len(record['runs'])} runs finished, {counts['failed']} failed."
    order = f"Sorted by validation {metric_label(metric).lower()}, best first"
    if len(seeds) > 1:
        order += f"; mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"
    lines = [
        f"# Sweep of {record['recipe']}: {', '.join(fields)}",
        "",
        f"{state} {order}. The choice is made by validation; the test score is only shown.",
        "",
        table(record),
    ]
    best = groups[0]
    if best.tier == WHOLE:
        score = spread_text(metric, best.scores[f"validation_{metric}"])
        lines += ["", f"Best: {values_text(best.values)}, validation {metric_label(metric).lower()} {score}."]
        run = next(run for run in best.runs if run["status"] == "finished")
        if run.get("command"):
            lines += ["Again: `" + command_text(run["command"]) + "`"]
        accuracy, images = best.scores.get("validation_accuracy"), run.get("num_validation_images")
        if accuracy is not None and images:
            margin = metric_text("accuracy", accuracy_margin(accuracy.mean, images))
            lines += [f"An accuracy counted once on {images:,} validation images is known to about ±{margin} (95%)."]
    return "\n".join([*lines, ""])


def write_sweep(folder: Path, record: Record):
    """Writes sweep.md, and sweep.png where a run has a score."""
    figure = sweep_figure(record, LIGHT)
    picture = "" if figure is None else "\n![validation scores of the sweep](sweep.png)\n"
    (folder / "sweep.md").write_text(markdown(record) + picture, encoding="utf-8")
    if figure is not None:
        (folder / "sweep.png").write_bytes(png_bytes(figure))


# ---------------------------------------------------------------- the picture


def numeric_axis(record: Record) -> str | None:
    """The field that the picture goes over: the learning rate, else the axis of numbers with most values; else None."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    sizes = {
        axis["names"][0]: len(axis["values"])
        for axis in record["axes"]
        if len(axis["names"]) == 1 and len(axis["values"]) > 1 and all(is_number(v) for (v,) in axis["values"])
    }
    return "learning_rate" if "learning_rate" in sizes else max(sizes, key=lambda name: sizes[name], default=None)


def sweep_figure(record: Record, theme: Theme) -> Figure | None:
    """The validation metric over the axis of numbers, a line for each combination of the others; without such an axis
    a bar for each combination, best on top. Error bars are standard deviations over seeds. None before any score."""
    groups = ranking(record)
    scored = [group for group in groups if f"validation_{record['metric']}" in group.scores]
    if not scored:
        return None
    field = numeric_axis(record)
    height = 4.2 if field else 1.4 + 0.34 * min(len(scored), MOST_BARS)
    figure = Figure(figsize=(7.4, height), facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, theme)
    title = f"Validation {metric_label(record['metric']).lower()}"
    if field is not None:
        draw_lines(axes, record, groups, field, theme)
        title += f" over {field}"
    else:
        draw_bars(axes, record["metric"], scored[:MOST_BARS], theme)
        title += f", the best {MOST_BARS} of {len(scored)}" if len(scored) > MOST_BARS else ""
    if len(record["seeds"] or []) > 1:
        seeds = f"mean and deviation over {len(record['seeds'])} seeds"
        axes.set_xlabel(", ".join(filter(None, [axes.get_xlabel(), seeds])), color=theme.muted, fontsize=9)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.text)
    return figure


def draw_lines(axes: Axes, record: Record, groups: list[Group], field: str, theme: Theme):
    """Draws a line for each combination of the other axes; a cross on the ground where no seed went through."""
    metric = record["metric"]
    others = [axis for axis in record["axes"] if axis["names"] != [field]]
    points = sorted(value for axis in record["axes"] if axis["names"] == [field] for (value,) in axis["values"])
    for place, combination in enumerate(product(*(axis["values"] for axis in others))):
        fixed = {n: v for axis, vs in zip(others, combination) for n, v in zip(axis["names"], vs)}
        line = [group for group in groups if all(group.values[name] == value for name, value in fixed.items())]
        line.sort(key=lambda group: group.values[field])
        colour, style = COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]
        drawn = [(group.values[field], group.scores[f"validation_{metric}"]) for group in line
                 if f"validation_{metric}" in group.scores]  # fmt: skip
        axes.errorbar(
            [value for value, _ in drawn], [score.mean for _, score in drawn],
            yerr=[score.deviation or 0.0 for _, score in drawn], color=colour, linestyle=style, linewidth=1.8,
            marker="o", markersize=4, elinewidth=1.2, capsize=3, label=printable(values_text(fixed)),
        )  # fmt: skip
        fallen = [group.values[field] for group in line if group.tier == FAILED]
        axes.plot(fallen, [0.02] * len(fallen), color=colour, linestyle="", marker="x", markersize=6,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    if field == "learning_rate" or (points[0] > 0 and points[-1] >= 10 * points[0]):
        axes.set_xscale("log")
    axes.set_xticks(points, [value_text(point) for point in points])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        field + (" (× failed)" if any(g.tier == FAILED for g in groups) else ""), color=theme.muted, fontsize=9
    )
    axes.yaxis.set_major_formatter(_score_formatter(metric))
    axes.grid(color=theme.grid, linewidth=0.8)
    if others:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=8)


def draw_bars(axes: Axes, metric: str, groups: list[Group], theme: Theme):
    """Draws a bar for each group, the first on top, its score written beside it."""
    scores = [group.scores[f"validation_{metric}"] for group in groups]
    places = range(len(groups))
    axes.barh(places, [score.mean for score in scores], xerr=[score.deviation or 0.0 for score in scores], height=0.66,
              color=theme.training, error_kw={"ecolor": theme.text, "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    for place, score in zip(places, scores):
        axes.annotate(spread_text(metric, score), (score.mean + (score.deviation or 0.0), place), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8, color=theme.text)  # fmt: skip
    axes.set_yticks(places, [printable(values_text(group.values)) for group in groups], fontsize=8, color=theme.text,
                    parse_math=False)  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.35)  # room for the scores beside the bars
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_score_formatter(metric))
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)


def _score_formatter(metric: str):
    if metric in METRICS and METRICS[metric].is_share:
        return PercentFormatter(1, decimals=None)
    return FuncFormatter(lambda value, _: f"{value:.3g}")
