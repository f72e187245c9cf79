"""model/README.md: the model card of a finished run, made from the run's records alone, and what it shows beside it."""

import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from .record import (
    METRICS,
    RunRecord,
    accuracy_margin,
    dataset_hub_id,
    dataset_label,
    duration_text,
    hub_id,
    judged_split,
    metric_label,
    metric_text,
    overfitting_note,
    printable,
    public_command,
    public_word,
    read_run,
    scores,
    split_sizes,
    weights_text,
)

MOST_CLASSES_NAMED = 20
# those of the run's plots/ that the card shows, with what they say to who cannot see them
PICTURES = {
    "curves.png": "Loss, accuracy and learning rate over the steps of training",
    "confusion.png": "Confusion matrix: rows are the true classes, columns the answers",
}

USE = """\
## How to use

The code travels with the weights, so `trust_remote_code=True` runs it from this repository; read it first. Where the
package `modeling_vit_scratch` is installed, `import modeling_vit_scratch` takes its place.

```python
from transformers import pipeline

classifier = pipeline("image-classification", model="{model}", trust_remote_code=True)
print(classifier("picture.jpg"))
```

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained("{model}", trust_remote_code=True)
inputs = processor(Image.open("picture.jpg"), return_tensors="pt")
with torch.inference_mode():
    probabilities = model(**inputs).logits.{probabilities}[0]
{answer}
```"""
ONE_CLASS = ("softmax(-1)", "print(model.config.id2label[probabilities.argmax().item()], probabilities.max().item())")
ANY_CLASSES = (
    "sigmoid()",
    "print({model.config.id2label[i]: p for i, p in enumerate(probabilities.tolist()) if p > 0.5})",
)


def write_model_card(run_dir: str | Path) -> Path:
    """The path of the model card it writes: README.md beside the weights in the run's model/ folder.

    With it come what it shows, plots/*.png, and for data on the Hub .eval_results/*.yaml.
    """
    run = read_run(run_dir)
    model = run.folder / "model"
    model.mkdir(exist_ok=True)
    for name in pictures(run):
        (model / "plots").mkdir(exist_ok=True)
        shutil.copyfile(run.folder / "plots" / name, model / "plots" / name)
    if (entry := benchmark_result(run)) is not None:
        path = model / ".eval_results" / f"{entry.dataset_id.replace('/', '_')}.yaml"
        path.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    path = model / "README.md"
    path.write_text(f"---\n{metadata(run).to_yaml()}\n---\n\n{body(run)}\n", encoding="utf-8", newline="\n")
    return path


def card_of(run: RunRecord, repository: str) -> bytes:
    """The card as it lies in model/, its examples made out to the repository on the Hub. What was edited stays."""
    text = (run.folder / "model" / "README.md").read_text(encoding="utf-8")
    return text.replace(f'"{model_id(run)}"', f'"{repository}"').encode()


# ---------------------------------------------------------------- metadata


def metadata(run: RunRecord) -> ModelCardData:
    """The card's YAML, its scores those of results.json to the last digit."""
    results = evaluation_results(run)
    data = dataset_hub_id(run)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        # this code's; weights that started from a checkpoint keep that one's, which the run does not know
        license=None if run.recipe.get("model_name_or_path") else "apache-2.0",
        tags=["image-classification", "vision", "vit_scratch"],
        datasets=[data] if data else None,
        base_model=hub_id(run.recipe.get("model_name_or_path")),
        metrics=sorted({result.metric_type for result in results} - {"loss"}) or None,
        model_name=run.name if results else None,
        eval_results=results or None,
    )


def evaluation_results(run: RunRecord) -> list[EvalResult]:
    """One entry for each finite score that has a name on the Hub."""
    label = dataset_label(run)
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset_hub_id(run) or label,
            dataset_name=label,
            dataset_split=split,
            metric_type=METRICS[metric].hub_type,
            metric_name=metric_label(metric, run.is_multi_label),
            metric_value=value,
        )
        for split, found in scores(run.results).items()
        for metric, value in found.items()
        if metric in METRICS and math.isfinite(value)
    ]


def benchmark_result(run: RunRecord) -> EvalResultEntry | None:
    """The score that the run is judged by, in the Hub's newer format, which is for data on the Hub; else None.

    The format has one value a dataset: accuracy, or where images have several classes mean average precision. The Hub
    shows it where the dataset is registered as a benchmark; the card's model-index has all scores of all data.
    https://huggingface.co/docs/hub/eval-results
    """
    data = dataset_hub_id(run)
    for split, found in scores(run.results).items():
        metric = next((name for name in ("mean_average_precision", "accuracy") if name in found), None)
        if data and metric and math.isfinite(found[metric]):
            notes = f"{METRICS[metric].label} on the {split} split"
            return EvalResultEntry(dataset_id=data, task_id="default", value=found[metric], notes=notes)
    return None


# ---------------------------------------------------------------- text


def body(run: RunRecord) -> str:
    """The card's text."""
    parts = [f"# {markdown(run.name)}", introduction(run), score_table(run), use(run)]
    parts += [training(run), *(f"![{text}](plots/{name})" for name, text in pictures(run).items())]
    parts += [f"## Limits\n\n{bullets(limits(run))}"]
    return "\n\n".join(filter(None, parts))


def use(run: RunRecord) -> str:
    """How the model is loaded and asked, in code."""
    probabilities, answer = ANY_CLASSES if run.is_multi_label else ONE_CLASS
    return USE.format(model=model_id(run), probabilities=probabilities, answer=answer)


def introduction(run: RunRecord) -> str:
    """What the model is and which classes it knows."""
    names = run.class_names
    size = f" with {run.results['num_parameters']:,} parameters" if run.results.get("num_parameters") else ""
    start, revision = (run.recipe.get(name) for name in ("model_name_or_path", "model_revision"))
    at = f" at {markdown(revision)}" if revision else ""
    origin = f", fine-tuned from {markdown(public_word(start))}{at}," if start else ""
    does = "tells which of" if run.is_multi_label else "sorts images into"
    classes = f"{len(names)} classes" + (" an image has, any number of them" if run.is_multi_label else "")
    sentence = f"A plain Vision Transformer (`vit_scratch`){size}{origin} that {does} {classes}"
    if len(names) <= MOST_CLASSES_NAMED:
        return f"{sentence}: {', '.join(map(markdown, names))}."
    return f"{sentence}; `config.json` lists them under `id2label`."


def score_table(run: RunRecord) -> str:
    """The recorded scores by split."""
    by_split = scores(run.results)
    if not by_split:
        return "## Scores\n\nNo split was scored."
    metrics = list(dict.fromkeys(metric for found in by_split.values() for metric in found))
    lines = [f"| | {' | '.join(by_split)} |", f"|---|{'---:|' * len(by_split)}"]
    for metric in metrics:
        cells = [metric_text(metric, found[metric]) if metric in found else "–" for found in by_split.values()]
        lines.append(f"| {metric_label(metric, run.is_multi_label)} | {' | '.join(cells)} |")
    return "\n".join(["## Scores", "", *lines])


def pictures(run: RunRecord) -> dict[str, str]:
    """Those of PICTURES that the run has drawn."""
    return {name: text for name, text in PICTURES.items() if (run.folder / "plots" / name).is_file()}


def model_id(run: RunRecord) -> str:
    """A stand-in for the model's id on the Hub, which the run does not know."""
    return re.sub(r"[^\w./-]+", "-", f"your-name/{run.name}")


def training(run: RunRecord) -> str:
    """Command, data, budget and machine."""
    results = run.results
    data = dataset_hub_id(run)
    counts = ", ".join(f"{markdown(name)} {count:,} images" for name, count in split_sizes(results).items())
    facts = {
        "Data": f"[{data}](https://huggingface.co/datasets/{data})" if data else markdown(dataset_label(run)),
        "Splits": counts,
        "Teacher": teacher(run.recipe),
        "Budget": budget(results),
        "Seed": markdown(results["seed"]) if "seed" in results else "",
        "Weights": markdown(weights_text(results)),
        "Hardware": named_values(results.get("hardware")),
        "Processes": markdown(results.get("num_processes") or ""),
        "Mixed precision": markdown(results.get("mixed_precision") or ""),
        "Versions": named_values(results.get("versions")),
        "Commit": markdown(results.get("commit") or ""),
    }
    listed = bullets(f"{name}: {value}" for name, value in facts.items() if value)
    command = f"{fenced(public_command(results['command']))}\n\n" if results.get("command") else ""
    return f"## Training\n\n{command}{listed}"


def teacher(recipe: dict[str, Any]) -> str:
    """The network whose answers were learned, and how; empty where there was none."""
    name = recipe.get("teacher_name_or_path")
    if not name:
        return ""
    at = f" at {markdown(recipe['teacher_revision'])}" if recipe.get("teacher_revision") else ""
    kind, share = recipe["distillation_type"], recipe["distillation_alpha"]
    softened = f", temperature {recipe['distillation_temperature']:g}" if kind == "soft" else ""
    return f"{markdown(public_word(name))}{at} ({kind}, {share:g} of the loss{softened})"


def budget(results: dict[str, Any]) -> str:
    parts = [f"{results['steps']:,} steps"] if results.get("steps") else []
    if results.get("train_seconds"):
        parts.append(duration_text(results["train_seconds"]))
    if results.get("images_per_second"):
        parts.append(f"{results['images_per_second']:,.0f} images per second")
    return ", ".join(parts)


def limits(run: RunRecord) -> list[str]:
    """What the records do not show, and what they show that a user should know."""
    results, by_split = run.results, scores(run.results)
    calibration = results.get("calibration") or {}
    trust = "its probabilities were not calibrated"
    if split := judged_split(calibration):
        error = calibration[split]["expected_calibration_error"]
        trust += f": on the {split} split they are off by {100 * error:.1f} points on average (calibration error)"
    always = f"answers with one of its {len(run.class_names)} classes whatever the image shows"
    if run.is_multi_label:
        always = f"gives each of its {len(run.class_names)} classes a probability of its own and knows no other"
    found = [
        f"It {always}, and {trust}.",
        "On images unlike those it was trained and scored on it may do worse than its scores.",
        "The scores are those of one run; another seed gives others.",
    ]
    if run.recipe.get("model_name_or_path"):
        found.append("The license of the checkpoint it was fine-tuned from holds for it too.")
    if "test" not in by_split:
        found.append("It was not scored on a test split: nothing here was measured on images kept aside to the end.")
    for split, values in by_split.items():
        num_images = split_sizes(results).get(split)
        if num_images and "accuracy" in values:
            points = 100 * accuracy_margin(values["accuracy"], num_images)
            score = "exact match" if run.is_multi_label else "accuracy"
            found.append(f"The {split} {score} was counted on {num_images:,} images: ± {points:.1f} points (95%).")
    split = judged_split(results.get("per_class"))
    rows = [row for row in results["per_class"][split] if row["support"]] if split else []
    if rows:
        weakest = min(rows, key=lambda row: row["recall"])
        found.append(
            f"Its weakest class is {markdown(weakest['class'])}: {100 * weakest['recall']:.1f}% of its "
            f"{weakest['support']:,} {split} images were recognised."
        )
    return [*found, *filter(None, [overfitting_note(run.evaluations, run.is_multi_label)])]


# ---------------------------------------------------------------- Markdown


def markdown(value: Any) -> str:
    """The value as plain text of a Markdown page: no tags, links, emphasis or table cells of its own."""
    escaped = printable(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escaped)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def named_values(values: dict[str, Any] | None) -> str:
    """`name value` pairs in one line; a local path is cut to its last component."""
    pairs = [(name, public_word(str(value))) for name, value in (values or {}).items() if value is not None]
    return ", ".join(f"{markdown(name.replace('_', ' '))} {markdown(value)}" for name, value in pairs)


def fenced(command: str) -> str:
    """The command as a code block whose fence is longer than any run of backticks within."""
    longest = max(map(len, re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{command}\n{fence}"
