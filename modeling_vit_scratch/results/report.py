"""report.html: a finished run on one page that needs no network and no scripts.

report_html.py holds the page's pieces, report_charts.py its charts, report_network.py what shows images and weights.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ..data.splits import Source
from .examined import Examination, examine
from .plots import MOST_CLASSES_DRAWN, panels_of
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
    read_run,
    risen_loss,
    risen_loss_text,
    scores,
    split_sizes,
    weights_text,
)
from .report_charts import confusion_chart, panel_chart, reliability_chart
from .report_html import (
    Section,
    cells,
    document,
    fact_table,
    folded,
    framed_table,
    note,
    row_header,
    share_cell,
    table,
    table_row,
    text,
    tile,
    value_text,
)
from .report_network import attention_section, hardest_section, parameters_section, weights_section

MOST_CLASSES_UNFOLDED = 30
SHARES = ("precision", "recall", "f1")
CALIBRATED = 0.02  # mean confidence and accuracy closer than this are called alike


def write_report(run_dir: str | Path, source: Source | None = None) -> Path:
    """The path of the report.html it writes into the run's folder: one file, nothing to fetch, no scripts.

    source: the run's data, for the images; without it the report says that they are missing.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    path.write_text(page(run, examine(run, source)), encoding="utf-8", newline="\n")
    return path


def page(run: RunRecord, found: Examination) -> str:
    """The whole page as text."""
    sections = [
        curves(run),
        calibration(run),
        confusion(run),
        per_class(run),
        hardest_section(run, found),
        attention_section(run, found),
        weights_section(found),
        parameters_section(found),
        repetition(run),
        machine(run),
    ]
    opening = heading(run) + "".join(map(note, found.missing))
    return document(run.name, opening, [section for section in sections if section is not None])


# ---------------------------------------------------------------- the scores


def heading(run: RunRecord) -> str:
    """Name, one sentence, the scores as tiles, all scores as a table, and what to be wary of."""
    results = run.results
    parts = [f"<h1>{text(run.name)}</h1>", f'<p class="lead">{text(lead(run))}</p>']
    by_split, label = scores(results), partial(metric_label, is_multi_label=run.is_multi_label)
    tiles = [
        tile(
            metric_text(metric, value),
            f"{label(metric)}, {split}{margin(run, split, metric, value)}",
        )
        for split, found in by_split.items()
        for metric, value in found.items()
        if metric in METRICS and METRICS[metric].is_share
    ]
    parts.append(f'<div class="tiles">{"".join(tiles[:4])}</div>' if tiles else "")
    warning = overfitting_note(run.evaluations, run.is_multi_label) or surer_note(run.evaluations, run.is_multi_label)
    parts.append(f'<p class="warning">{text(warning)}</p>' if warning else "")
    if by_split:
        metrics = list(dict.fromkeys(metric for found in by_split.values() for metric in found))
        rows = [
            [label(metric)]
            + [metric_text(metric, found[metric]) if metric in found else "–" for found in by_split.values()]
            for metric in metrics
        ]
        parts.append(f"<h2>Scores</h2>{table(['', *map(str.capitalize, by_split)], rows)}")
        kept = "" if results.get("specimen") else ", and kept in model/,"  # a specimen is scored, not published
        parts.append(note(f"The weights scored{kept} are {weights_text(results)}."))
    return "".join(parts)


def lead(run: RunRecord) -> str:
    """One sentence on what was trained, on what, for how long."""
    results = run.results
    recipe = run.recipe.get("recipe")
    sentence = f"Recipe {recipe}" if recipe else "A run without a named recipe"
    sentence += f" on {dataset_label(run)}"
    if run.recipe.get("model_name_or_path"):
        sentence += f", starting from {run.recipe['model_name_or_path']}"
    if run.recipe.get("model_revision"):
        sentence += f" at {run.recipe['model_revision']}"
    if run.recipe.get("teacher_name_or_path"):
        sentence += f", taught by {run.recipe['teacher_name_or_path']}"
        if run.recipe.get("teacher_revision"):
            sentence += f" at {run.recipe['teacher_revision']}"
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


def surer_note(evaluations: list[dict[str, Any]], is_multi_label: bool) -> str | None:
    """A sentence for a run whose validation loss has risen from its lowest value while accuracy rose too; else None.

    Where accuracy did not rise, `overfitting_note` speaks.
    """
    rows = risen_loss(evaluations)
    if rows is None or rows[1]["eval_accuracy"] <= rows[0]["eval_accuracy"]:
        return None
    return risen_loss_text(*rows, "did not fall", is_multi_label) + (
        "the model is right more often, but too sure where it is wrong. Its answers can be used; its probabilities say "
        "too much. Label smoothing or mixup would help."
    )


def curves(run: RunRecord) -> Section | None:
    """The training curves, each a picture of its own so that a phone stacks them, and the evaluations as a table."""
    charts = "".join(panel_chart(run, key) for key in panels_of(run))
    if not charts:
        return None
    body = f'<div class="curves">{charts}</div>'
    if run.evaluations:
        metrics = [key for key in run.evaluations[-1] if key.startswith("eval_")]
        rows = [
            [
                f"{row['step']:,}",
                *(
                    metric_text(key.removeprefix("eval_"), row[key]) if row.get(key) is not None else "–"
                    for key in metrics
                ),
            ]
            for row in run.evaluations
        ]
        headers = ["Step", *(metric_label(key.removeprefix("eval_"), run.is_multi_label) for key in metrics)]
        body += folded(f"All {len(rows)} evaluations on the validation split", table(headers, rows))
    return Section("curves", "Curves", body)


# ---------------------------------------------------------------- the answers


def calibration(run: RunRecord) -> Section | None:
    """Whether the network is as often right as it is sure."""
    split = judged_split(run.results.get("calibration"))
    if split is None:
        return None
    found = run.results["calibration"][split]
    num_images = sum(row["count"] for row in found["bins"])
    right = sum(row["count"] * row["accuracy"] for row in found["bins"] if row["count"]) / num_images
    gap = found["mean_confidence"] - right
    verdict = "as it should be" if abs(gap) < CALIBRATED else "too sure" if gap > 0 else "less sure than it may be"
    said = (
        f"On average the network is {100 * found['mean_confidence']:.1f}% sure and {100 * right:.1f}% of its answers "
        f"are right: {verdict}. Its expected calibration error is {100 * found['expected_calibration_error']:.2f}%: "
        "by so much confidence and share of right answers differ, over the images."
    )
    reading = (
        "Blue bars: how many answers of a confidence are right. On the dashed line a network is as often right as it "
        "is sure. Orange: what is missing or too much. Below: how many images have that confidence."
    )
    rows = [
        [f"{row['above']:.2f} to {row['up_to']:.2f}", f"{row['count']:,}"]
        + [f"{100 * row[key]:.1f}%" if row[key] is not None else "–" for key in ("confidence", "accuracy")]
        for row in found["bins"]
    ]
    numbers = folded("The bins in numbers", table(["Confidence", "Images", "Mean confidence", "Right"], rows))
    body = f'<p>{text(said)}</p><div class="side">{reliability_chart(found)}<div>{note(reading)}{numbers}</div></div>'
    return Section("calibration", f"How sure, and how often right ({split} split)", body)


def confusion(run: RunRecord) -> Section | None:
    """The confusion matrix as a picture, and the most frequent mistakes as a table."""
    split = judged_split(run.results.get("confusion"))
    if split is None:
        return None
    counts, parts = run.results["confusion"][split], []
    if len(run.class_names) <= MOST_CLASSES_DRAWN:
        reading = note(
            "Rows: the true class. Columns: the answer. The stronger the colour, the larger the share of the row."
        )
        parts.append(f"<div>{confusion_chart(counts, run.class_names)}{reading}</div>")
    else:
        parts.append(note(f"The matrix is drawn for up to {MOST_CLASSES_DRAWN} classes."))
    mistakes = most_confused(counts, run.class_names)
    if mistakes:
        rows = [[true, predicted, f"{count:,}"] for true, predicted, count in mistakes]
        found = table(["True class", "Taken for", "Images"], rows, first_number=2)
        parts.append(f"<div><h3>Most frequent mistakes</h3>{found}</div>")
    return Section(
        "confusion", f"Which class is taken for which ({split} split)", f'<div class="side">{"".join(parts)}</div>'
    )


def per_class(run: RunRecord) -> Section | None:
    """Precision, recall and F1 of each class; folded where classes are many."""
    split = judged_split(run.results.get("per_class"))
    if split is None:
        return None
    rows = run.results["per_class"][split]
    body = [
        table_row(
            [
                row_header(row["class"]),
                # without an image of the class there is nothing that could have been found
                *(share_cell(row[name] if row["support"] or name == "precision" else None) for name in SHARES),
                *cells("td", [f"{row['support']:,}"], first_number=0),
            ]
        )
        for row in rows
    ]
    full = framed_table(body, ["Class", "Precision", "Recall", "F1", "Images"])
    full = folded(f"All {len(rows)} classes", full) if len(rows) > MOST_CLASSES_UNFOLDED else full
    return Section("classes", f"Each class ({split} split)", full)


# ---------------------------------------------------------------- what it takes to do it again


def repetition(run: RunRecord) -> Section:
    """The command, and the recipe's fields: those that differ from the named recipe first."""
    parts = []
    if run.results.get("command"):
        # word by word, so that a line never breaks within a flag
        words = " ".join(f"<span>{text(word)}</span>" for word in command_text(run.results["command"]).split(" "))
        parts.append(f"<p>The command that repeats this run:</p><pre>{words}</pre>")
    changed = run.results.get("changed_fields")
    if changed:
        rows = [[name, value_text(run.recipe.get(name)), value_text(usual)] for name, usual in changed.items()]
        headers = ["Field", "This run", f"Recipe {run.recipe.get('recipe')}"]
        parts.append(f"<h3>What differs from the recipe</h3>{table(headers, rows, first_number=3)}")
    elif changed is not None:
        parts.append(note(f"Every field is as the recipe {run.recipe.get('recipe')} has it."))
    parts.append(folded(f"All {len(run.recipe)} fields of the recipe", fact_table(run.recipe)))
    return Section("recipe", "Command and recipe", "".join(parts))


def machine(run: RunRecord) -> Section | None:
    """Machine, versions and data."""
    results = run.results
    facts = {
        "Machine and run": {
            **{name.replace("_", " "): value for name, value in (results.get("hardware") or {}).items()},
            "processes": results.get("num_processes"),
            "mixed precision": results.get("mixed_precision"),
            "seed": results.get("seed"),
            "commit": results.get("commit"),
        },
        "Versions": results.get("versions") or {},
        "Images by split": split_sizes(results),
    }
    known = {
        title: {name: value for name, value in found.items() if value is not None} for title, found in facts.items()
    }
    tables = [f"<div><h3>{title}</h3>{fact_table(found)}</div>" for title, found in known.items() if found]
    return (
        Section("machine", "Machine, versions, data", f'<div class="columns">{"".join(tables)}</div>')
        if tables
        else None
    )
