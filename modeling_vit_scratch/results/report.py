"""report.html: a finished run on one page that needs no network, made from the run's records alone."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .plots import (
    DARK,
    LIGHT,
    MOST_CLASSES_COUNTED,
    MOST_CLASSES_DRAWN,
    PANELS,
    confusion_figure,
    panel_figure,
    panels_of,
    png_bytes,
)
from .record import (
    METRICS,
    RunRecord,
    accuracy_margin,
    command_text,
    dataset_label,
    duration_text,
    judged_split,
    metric_label,
    metric_text,
    most_confused,
    overfitting_note,
    printable,
    read_run,
    scores,
    split_sizes,
    weights_text,
)

MOST_CLASSES_UNFOLDED = 30
PIXELS_PER_INCH = 80  # of a picture on a phone, where one too wide for the screen scrolls: nine points are ten pixels

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --text: #1f2328; --muted: #59636e;
  --line: #d8dee4; --accent: #0072b2; --warning: #fff4e5; --warning-line: #d55e00; --bar: #cfe4f3; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9198a1;
  --line: #2d333b; --accent: #56b4e9; --warning: #2b2117; --warning-line: #f0883e; --bar: #1d3b53; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.75rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
.lead, .note { color: var(--muted); }
.note { font-size: 0.875rem; margin-top: 0.5rem; }
.warning { max-width: none; margin: 1.25rem 0 0; padding: 0.75rem 1rem; background: var(--warning);
  border-left: 4px solid var(--warning-line); border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.75rem;
  margin-top: 1.25rem; }
.tile, figure, .scroll, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 0.75rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 0.875rem; }
.tile:first-child { border-color: var(--accent); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0.75rem; }
figure { margin: 0; padding: 0.5rem; }
figure img { display: block; height: auto; }
.curves img { width: 100%; }
.side { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; align-items: flex-start; }
.side > * { max-width: 100%; }
.side > p { flex-basis: 100%; }
figure.matrix { overflow-x: auto; }
@media (min-width: 40rem) { figure.matrix img { width: auto; max-width: 100%; max-height: 38rem; }
  figure.large img { max-height: none; } }
h3 { font-size: 1rem; margin: 0.5rem 0 0.75rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9375rem; }
th, td { padding: 0.4rem clamp(0.4rem, 2vw, 0.9rem); text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
table.facts th { white-space: nowrap; }
table.facts td { overflow-wrap: anywhere; min-width: 8rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.share { background: linear-gradient(to left, var(--bar) var(--share), transparent var(--share)); }
pre { margin: 0; padding: 0.75rem 1rem; overflow-x: auto; white-space: pre-wrap; font-size: 0.875rem; }
pre span { white-space: nowrap; }
summary { cursor: pointer; margin-bottom: 0.75rem; color: var(--accent); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1.5rem;
  align-items: start; }
.columns .scroll { width: auto; }
.columns table { width: 100%; }
"""


def write_report(run_dir: str | Path) -> Path:
    """The path of the report.html it writes into the run's folder: one file, nothing to fetch, no scripts."""
    run = read_run(run_dir)
    path = run.folder / "report.html"
    path.write_text(page(run), encoding="utf-8", newline="\n")
    return path


def page(run: RunRecord) -> str:
    """The whole page as text."""
    sections = [heading(run), curves(run), confusion(run), per_class(run), how_it_was_made(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(run.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- sections


def heading(run: RunRecord) -> str:
    """Name, one sentence, the scores as tiles, all scores as a table, and what to be wary of."""
    results = run.results
    parts = [f"<h1>{text(run.name)}</h1>", f'<p class="lead">{text(lead(run))}</p>']
    by_split = scores(results)
    tiles = [
        tile(metric_text(metric, value), f"{metric_label(metric)}, {split}{margin(run, split, metric, value)}")
        for split, found in by_split.items()
        for metric, value in found.items()
        if metric in METRICS and METRICS[metric].is_share
    ]
    parts.append(f'<div class="tiles">{"".join(tiles[:4])}</div>' if tiles else "")
    warning = overfitting_note(run.evaluations)
    parts.append(f'<p class="warning">{text(warning)}</p>' if warning else "")
    if by_split:
        metrics = list(dict.fromkeys(metric for found in by_split.values() for metric in found))
        rows = [
            [metric_label(metric)]
            + [metric_text(metric, found[metric]) if metric in found else "–" for found in by_split.values()]
            for metric in metrics
        ]
        parts.append(f"<h2>Scores</h2>{table(['', *map(str.capitalize, by_split)], rows)}")
        parts.append(f'<p class="note">The weights scored, and kept in model/, are {text(weights_text(results))}.</p>')
    return "".join(parts)


def lead(run: RunRecord) -> str:
    """One sentence on what was trained, on what, for how long."""
    results = run.results
    recipe = run.recipe.get("recipe")
    sentence = f"Recipe {recipe}" if recipe else "A run without a named recipe"
    sentence += f" on {dataset_label(run)}"
    if run.recipe.get("model_name_or_path"):
        sentence += f", starting from {run.recipe['model_name_or_path']}"
    if results.get("num_parameters"):
        sentence += f", {results['num_parameters']:,} parameters"
    if results.get("steps"):
        sentence += f", {results['steps']:,} steps"
    if results.get("train_seconds"):
        sentence += f" in {duration_text(results['train_seconds'])}"
    if results.get("images_per_second"):
        sentence += f" ({results['images_per_second']:,.0f} images per second)"
    return sentence + "."


def margin(run: RunRecord, split: str, metric: str, value: float) -> str:
    """The 95% margin of an accuracy, where the number of images is recorded."""
    num_images = split_sizes(run.results).get(split)
    if metric != "accuracy" or not num_images:
        return ""
    return f", ± {100 * accuracy_margin(value, num_images):.1f} points on {num_images:,} images"


def curves(run: RunRecord) -> str:
    """The training curves, each a picture of its own so that a phone stacks them."""
    pictures = [
        picture(PANELS[key][0], [panel_figure(run, key, theme) for theme in (LIGHT, DARK)]) for key in panels_of(run)
    ]
    return f'<h2>Curves</h2><div class="curves">{"".join(pictures)}</div>' if pictures else ""


def confusion(run: RunRecord) -> str:
    """The confusion matrix as a picture, and the most frequent mistakes as a table."""
    split = judged_split(run.results.get("confusion"))
    if split is None:
        return ""
    parts = []
    figures = [confusion_figure(run, theme) for theme in (LIGHT, DARK)]
    if figures[0] is not None:
        is_large = len(run.class_names) > MOST_CLASSES_COUNTED
        parts.append(picture("Confusion matrix", figures, css_class="matrix large" if is_large else "matrix"))
    else:
        parts.append(f'<p class="note">The matrix is drawn for up to {MOST_CLASSES_DRAWN} classes.</p>')
    mistakes = most_confused(run.results["confusion"][split], run.class_names)
    if mistakes:
        rows = [[true, predicted, f"{count:,}"] for true, predicted, count in mistakes]
        found = table(["True class", "Taken for", "Images"], rows, first_number=2)
        parts.append(f"<div><h3>Most frequent mistakes</h3>{found}</div>")
    return f'<h2>Which class is taken for which ({split} split)</h2><div class="side">{"".join(parts)}</div>'


def per_class(run: RunRecord) -> str:
    """Precision, recall and F1 of each class; folded where classes are many."""
    split = judged_split(run.results.get("per_class"))
    if split is None:
        return ""
    rows = run.results["per_class"][split]
    body = [
        table_row(
            [
                row_header(row["class"]),
                *(share_cell(row[name]) for name in ("precision", "recall", "f1")),
                *cells("td", [f"{row['support']:,}"], first_number=0),
            ]
        )
        for row in rows
    ]
    full = framed_table(body, ["Class", "Precision", "Recall", "F1", "Images"])
    if len(rows) > MOST_CLASSES_UNFOLDED:
        full = f"<details><summary>All {len(rows)} classes</summary>{full}</details>"
    return f"<h2>Each class ({split} split)</h2>{full}"


def how_it_was_made(run: RunRecord) -> str:
    """Command, data, machine, versions and recipe: what it takes to do it again."""
    results = run.results
    parts = []
    if results.get("command"):
        # word by word, so that a line never breaks within a flag
        words = " ".join(f"<span>{text(word)}</span>" for word in command_text(results["command"]).split(" "))
        parts.append(f"<h2>Command</h2><pre>{words}</pre>")
    machine = {
        **{name.replace("_", " "): value for name, value in (results.get("hardware") or {}).items()},
        "processes": results.get("num_processes"),
        "mixed precision": results.get("mixed_precision"),
        "seed": results.get("seed"),
        "commit": results.get("commit"),
    }
    facts = {
        "Machine and run": machine,
        "Versions": results.get("versions") or {},
        "Images by split": split_sizes(results),
    }
    known = {
        title: {name: value for name, value in found.items() if value is not None} for title, found in facts.items()
    }
    tables = [f"<div><h2>{title}</h2>{fact_table(found)}</div>" for title, found in known.items() if found]
    parts.append(f'<div class="columns">{"".join(tables)}</div>')
    parts.append(f"<h2>Recipe</h2><details><summary>All {len(run.recipe)} fields</summary>")
    parts.append(f"{fact_table(run.recipe)}</details>")
    return "".join(parts)


# ---------------------------------------------------------------- pieces


def text(value: Any) -> str:
    """The value as text of a page: names of classes and folders come from strangers."""
    return html.escape(printable(value))


def tile(number: str, label: str) -> str:
    return f'<div class="tile"><b>{text(number)}</b><span>{text(label)}</span></div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 1) -> str:
    """A table whose columns from `first_number` on are numbers, set to the right."""
    body = [table_row([row_header(row[0]), *cells("td", row[1:], first_number - 1)]) for row in rows]
    return framed_table(body, headers, first_number)


def framed_table(body: Iterable[str], headers: Sequence[str] = (), first_number: int = 1) -> str:
    """The rows as a table that scrolls by itself where a screen is too narrow for it; without headers, of facts."""
    head = f"<thead>{table_row(cells('th', headers, first_number))}</thead>" if headers else ""
    opening = "<table>" if headers else '<table class="facts">'
    return f'<div class="scroll">{opening}{head}<tbody>{"".join(body)}</tbody></table></div>'


def table_row(row: Iterable[str]) -> str:
    return f"<tr>{''.join(row)}</tr>"


def row_header(value: Any) -> str:
    return f'<th scope="row">{text(value)}</th>'


def cells(tag: str, values: Sequence[Any], first_number: int) -> list[str]:
    """The values as cells, from `first_number` on as numbers."""
    plain = [f"<{tag}>{text(value)}</{tag}>" for value in values[:first_number]]
    return plain + [f'<{tag} class="number">{text(value)}</{tag}>' for value in values[first_number:]]


def share_cell(share: float) -> str:
    """A share of one as a cell with a bar behind it."""
    return f'<td class="number share" style="--share: {100 * share:.1f}%">{100 * share:.1f}%</td>'


def fact_table(facts: dict[str, Any]) -> str:
    """Names and values."""
    return framed_table(table_row([row_header(name), *cells("td", [value_text(facts[name])], 1)]) for name in facts)


def value_text(value: Any) -> str:
    """A recorded value for people: numbers grouped, what is not set as a dash, lists and tables as JSON."""
    if value is None:
        return "–"
    if isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:,}" if isinstance(value, int) else str(value)


def picture(title: str, figures: Sequence[Figure], css_class: str = "curve") -> str:
    """A figure in its light and its dark version, as data within the page."""
    width = PIXELS_PER_INCH * figures[0].get_figwidth()
    light, dark = (f"data:image/png;base64,{base64.b64encode(png_bytes(figure)).decode()}" for figure in figures)
    return (
        f'<figure class="{css_class}"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"/>'
        f'<img alt="{text(title)}" width="{width:.0f}" src="{light}"/></picture></figure>'
    )
