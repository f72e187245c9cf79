"""examples/tour.ipynb: its cells run and show what its text says, and what is stored in it is what running gives.

A notebook is JSON and its code plain Python: no Jupyter is needed to run it.
"""

import base64
import copy
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_vit_scratch.results.record import read_run
from modeling_vit_scratch.specimens import SPECIMENS

TOUR = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"
NOTEBOOK = json.loads(TOUR.read_text(encoding="utf-8"))
MOST_BYTES = 700_000
HOMES = re.compile(r"/(home|root|tmp|Users|usr|opt|mnt|var)/|[A-Z]:\\")


class Executed(NamedTuple):
    """What running the tour left: its variables, what each code cell printed, and how many pictures it drew."""

    names: dict[str, Any]
    printed: list[str]
    num_pictures: list[int]
    folder: Path


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored_text(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def stored_pictures(cell: dict[str, Any]) -> list[Image.Image]:
    encoded = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode("".join(text)))) for text in encoded]


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The tour, run from its first cell to its last in a folder of its own."""
    folder, names, printed, num_pictures = tmp_path_factory.mktemp("tour"), {"__name__": "tour"}, [], []
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]), plt.rc_context():
        patch.chdir(folder)
        plt.switch_backend("Agg")
        patch.setattr(plt, "show", lambda: [plt.figure(number).canvas.draw() for number in plt.get_fignums()])
        for number, cell in enumerate(code_cells(NOTEBOOK), 1):
            output = io.StringIO()
            with redirect_stdout(output):
                exec(compile("".join(cell["source"]), f"tour.ipynb, code cell {number}", "exec"), names)
            printed.append(output.getvalue())
            num_pictures.append(len(plt.get_fignums()))
            plt.close("all")
    return Executed(names, printed, num_pictures, folder)


# ---------------------------------------------------------------- what the tour shows


def test_the_patches_of_the_tour_are_the_rectangles_of_the_photograph(tour):
    photo, patches = np.asarray(tour.names["photo"]), tour.names["patches"][0]
    for row, column in ((0, 0), (2, 5), (6, 6)):
        rectangle = photo[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        shown = (patches[7 * row + column].view(3, 16, 16).permute(1, 2, 0) + 1) * 127.5
        np.testing.assert_allclose(shown.numpy(), rectangle, atol=1e-4)


def test_what_the_tour_computes_by_hand_is_what_the_network_computes(tour):
    names, close = tour.names, {"rtol": 0, "atol": 1e-5}  # float32: values up to 10, sums of 768 products
    model, photo = names["model"], names["pixels"]
    with torch.no_grad():
        torch.testing.assert_close(names["by_hand"], model.vit.embeddings(photo), **close)
        torch.testing.assert_close(names["logits"], model(photo).logits, **close)
        first = model.vit.layers[0]
        torch.testing.assert_close(names["attended"], first.attention(names["x"])[0], **close)
    torch.testing.assert_close(names["weights"].sum(-1), torch.ones_like(names["weights"][..., 0]), **close)


def test_without_positions_shuffled_patches_have_the_same_logits_and_with_them_others(tour):
    changes = [float(text) for text in re.findall(r"differ by (\S+)", "".join(tour.printed))]
    with_positions, without = changes
    assert without < 1e-5 < 1e-4 < with_positions


def test_the_doctor_names_the_bug_of_the_tour_and_passes_the_mended_network(tour):
    bug, mended = tour.names["diagnoses"].values()
    failed = {finding.check for finding in bug if finding.passed is False}
    assert SPECIMENS["merged_without_transpose"].check in failed
    assert failed <= {"layer_equivariance", "token_equivariance"}
    assert not [finding for finding in mended if finding.passed is False]


def test_the_network_of_the_tour_learns_the_digits_and_the_pipeline_scores_the_same(tour):
    assert tour.names["results"]["test_accuracy"] > 0.93
    right = tour.names["right"]
    assert len(right) == 360 and np.mean(right) == pytest.approx(tour.names["results"]["test_accuracy"], abs=1e-9)
    as_they_are, shuffled = (float(text) for text in re.findall(r"^(?:as they are|shuffled): accuracy (\S+)%$",
                             "".join(tour.printed), flags=re.MULTILINE))  # fmt: skip
    assert as_they_are == pytest.approx(100 * np.mean(right), abs=0.06)
    assert shuffled < 40


def test_finetuning_from_the_digits_beats_random_weights_by_much(tour):
    finetuned, scratch = (
        read_run(tour.folder / "outputs" / "tour" / name).results for name in ("finetuned", "scratch")
    )
    assert finetuned["dataset"]["splits"] == scratch["dataset"]["splits"] == {"train": 60, "validation": 250}
    assert finetuned["steps"] == scratch["steps"]
    assert finetuned["validation_accuracy"] > 0.8
    assert finetuned["validation_accuracy"] > scratch["validation_accuracy"] + 0.1


def test_the_tour_writes_nowhere_but_into_its_outputs(tour):
    assert [path.name for path in tour.folder.iterdir()] == ["outputs"]
    assert [path.name for path in (tour.folder / "outputs").iterdir()] == ["tour"]


# ---------------------------------------------------------------- what is stored in the notebook


def without_numbers(text: str) -> list[str]:
    """The lines of a text with # for each number, without those that say on which machine it was."""
    lines = [line for line in text.splitlines() if "process(es) on" not in line]
    return [re.sub(r"\s*\d[\d.,:]*(e[+-]\d+)?", " #", line) for line in lines]


def test_the_stored_text_is_what_running_prints_but_for_numbers(tour):
    for cell, printed in zip(code_cells(NOTEBOOK), tour.printed, strict=True):
        assert without_numbers(stored_text(cell)) == without_numbers(printed)


def test_each_cell_stores_as_many_pictures_as_it_draws(tour):
    assert [len(stored_pictures(cell)) for cell in code_cells(NOTEBOOK)] == tour.num_pictures
    assert sum(tour.num_pictures) >= 10


def stored_breaches(notebook: dict[str, Any]) -> list[str]:
    """One line for each thing stored in a notebook that a reader should not meet."""
    cells = code_cells(notebook)
    breaches = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        breaches.append("the code cells were not run once, in order")
    for number, cell in enumerate(cells, 1):
        kinds = {output.get("name", output["output_type"]) for output in cell["outputs"]}
        breaches += [f"code cell {number}: stores {kind}" for kind in sorted(kinds - {"stdout", "display_data"})]
        if found := HOMES.search(stored_text(cell)):
            breaches.append(f"code cell {number}: names a path of a machine, {found[0]}")
        if any(picture.convert("RGB").getpixel((0, 0)) != (255, 255, 255) for picture in stored_pictures(cell)):
            breaches.append(f"code cell {number}: a picture's ground is not white")
    return breaches


def test_the_notebook_is_stored_with_clean_outputs_and_small():
    assert stored_breaches(NOTEBOOK) == []
    assert TOUR.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        (lambda cell: cell.update(execution_count=None), "the code cells were not run once, in order"),
        (lambda cell: cell["outputs"].append({"output_type": "error"}), "code cell 2: stores error"),
        (
            lambda cell: cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["a warning"]}),
            "code cell 2: stores stderr",
        ),
        (
            lambda cell: cell["outputs"][0].update(text=["saved to /home/me/model"]),
            "code cell 2: names a path of a machine, /home/",
        ),
    ],
)
def test_what_should_not_be_stored_is_found(change, breach):
    notebook = copy.deepcopy(NOTEBOOK)
    change(code_cells(notebook)[1])
    assert stored_breaches(notebook) == [breach]


def test_the_links_of_the_tour_lead_to_files():
    text = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert "../docs/doctor.md" in links
    assert [link for link in links if not (TOUR.parent / link).is_file()] == []
