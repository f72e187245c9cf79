"""What a finished run leaves: results.json, plots, model card, report and the folder model/."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..configuration_vit_scratch import ViTScratchConfig
from ..data.decoding import Processor
from ..data.splits import Source
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.examined import telling_images
from ..results.model_card import write_model_card
from ..results.model_folder import save_model_folder
from ..results.plots import write_plots
from ..results.report import write_report
from .evaluation import Evaluation
from .finetuning import has_adapter, merged, save_adapter
from .machine import command, commit, hardware, versions
from .recipe import PLACES, Recipe
from .recipes import RECIPES
from .run_folder import write_json
from .state import TrainingState

SPECIMEN = (
    "This folder holds no weights. The network was trained with bugs put into it on purpose ({bugs}), so that its "
    "weights would mean something else in a plain Vision Transformer; the run's checkpoints/ keep them."
)


def final_scores(results: dict[str, Any]) -> dict[str, float]:
    """The scores among the fields of results.json: test_accuracy and its like."""
    return {n: v for n, v in results.items() if n.startswith(("test_", "validation_")) and isinstance(v, float)}


def collect_results(
    recipe: Recipe,
    chosen: frozenset[str],
    accelerator: Accelerator,
    source: Source,
    state: TrainingState,
    finals: dict[str, Evaluation],
    weights: str,
) -> dict[str, Any]:
    """What results.json holds. finals: the last evaluation of each split; weights: which ones they score."""
    position = state.position
    details = {split: evaluation.details(source.class_names) for split, evaluation in finals.items()}
    return {
        **{f"{split}_{name}": value for split, e in finals.items() for name, value in e.scores.items()},
        "command": command(accelerator, recipe, chosen),
        "recipe": recipe.recipe,
        "specimen": recipe.specimen,
        "seed": recipe.seed,
        "steps": position.step,
        "stopped_early": position.has_stopped_early,
        "train_seconds": round(position.train_seconds, 2),
        "images_per_second": round(position.step * recipe.train_batch_size / max(position.train_seconds, 1e-9), 1),
        "weights": weights,
        "best_step": position.best_step,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "hardware": hardware(accelerator),
        "versions": versions(),
        "commit": commit(),
        "dataset": {
            "name": source.name,
            "repository": source.repository,
            "splits": {name: len(split) for name, split in source.splits.items()},
        },
        "class_names": source.class_names,
        "is_multi_label": source.is_multi_label,
        "changed_fields": changed_fields(recipe),
        "examples": {split: telling_images(e.kept, e.references, e.losses) for split, e in finals.items()},
        **{
            kind: {split: found[kind] for split, found in details.items() if kind in found}
            for kind in ("per_class", "confusion", "calibration")
        },
    }


def changed_fields(recipe: Recipe) -> dict[str, Any]:
    """The named recipe's own values of the fields in which this run differs; where it is written to is none of them."""
    named = RECIPES[recipe.recipe].to_dict()
    return {n: named[n] for n, value in recipe.to_dict().items() if value != named[n] and n not in PLACES}


def save_model(
    output_dir: Path,
    model: ViTScratchForImageClassification,
    processor: Processor,
    start: tuple[str | None, str | None],
):
    """Writes model/, with LoRA merged into the matrices, and where there is LoRA, the adapter alone to adapter/.

    start: the checkpoint that the network was before, and its revision.

    A specimen is not published: its weights would load as another network. A line says so.
    """
    if (bugs := getattr(model, "specimen", None)) is not None:
        print(f"{output_dir}/model: {SPECIMEN.format(bugs=bugs)}", flush=True)
        return
    if has_adapter(model):
        save_adapter(model, output_dir / "adapter", *start)
    plain = merged(model)
    save_model_folder(output_dir / "model", plain, plain.state_dict(), processor)


def checkpoint_documents(
    config: ViTScratchConfig, processor: Processor, recipe: Recipe, patch_drop_rate: float
) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json, by which a checkpoint is read as any model is; none where its tensors
    are not those of a published network: LoRA's matrices stand for themselves, a specimen is never published."""
    if recipe.finetune == "lora" or recipe.specimen is not None:
        return {}
    fields = json.loads(config.to_json_string())
    fields["architectures"] = [ViTScratchForImageClassification.__name__]
    if recipe.finetune != "head":  # whose backbone is as it was
        fields["patch_drop_rate"] = patch_drop_rate
    return {"config.json": fields, "preprocessor_config.json": json.loads(processor.to_json_string())}


def publish(output_dir: Path, results: dict[str, Any], source: Source):
    """Writes results.json, and from it the plots, the report and the model card, or for a specimen a note instead.

    source: the run's data, from which the report takes the images that it shows.
    """
    write_json(output_dir / "results.json", results)
    write_plots(output_dir)
    if results.get("specimen") is None:
        write_model_card(output_dir)
    else:
        (output_dir / "model").mkdir(exist_ok=True)
        note = f"# A specimen\n\n{SPECIMEN.format(bugs=results['specimen'])}\n"
        (output_dir / "model" / "README.md").write_text(note, encoding="utf-8")
    write_report(output_dir, source)
