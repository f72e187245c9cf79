"""The table and the picture of a sweep, against scores made up so that they can be computed by hand."""

import statistics

import pytest

from modeling_vit_scratch.results.plots import LIGHT
from modeling_vit_scratch.results.sweep_plot import markdown, numeric_axis, ranking, sweep_figure, table, value_text


def record(scores, axes=(("optim", ["adamw", "sgd", "muon"]),), metric="accuracy", seeds=(1, 2, 3)):
    """A sweep's record: scores by value, one (validation accuracy, validation loss) a seed; a text: it failed."""
    runs = []
    for value, results in scores.items():
        for seed, result in zip(seeds or [None], results, strict=True):
            run = {"name": f"{axes[0][0]}-{value}_seed-{seed}", "values": {axes[0][0]: value}, "seed": seed, "note": ""}
            if result is None:
                run["status"] = "waiting"
            elif isinstance(result, str):
                run |= {"status": "failed", "note": result}
            else:
                run |= {"status": "finished", "validation_accuracy": result[0], "validation_loss": result[1]}
                run |= {"test_accuracy": 1 - result[0], "train_seconds": 10.0 * seed if seed else 1.0, "steps": 3,
                        "images_per_second": 1234.5}  # fmt: skip
            runs.append(run)
    listed = [{"names": [name], "values": [[value] for value in values]} for name, values in axes]
    return {"recipe": "digits", "metric": metric, "axes": listed, "seeds": list(seeds) or None, "runs": runs}


def test_the_table_is_sorted_by_the_mean_and_shows_deviations_over_seeds():
    found = record({"adamw": [(0.8, 1), (0.9, 1), (0.85, 1)], "sgd": [(0.9, 2), (0.9, 2), (0.96, 2)]})
    best, second = ranking(found)
    assert (best.values, second.values) == ({"optim": "sgd"}, {"optim": "adamw"})
    # by hand: mean (90 + 90 + 96) / 3 = 92; deviation sqrt((4 + 4 + 16) / 2) = 3.46
    lines = table(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["optim", "validation accuracy", "validation loss", "test accuracy", "train seconds", "steps",
                        "images/s", "note"]  # fmt: skip
    assert cells[2][:4] == ["sgd", "92.00% ± 3.46%", "2.0000 ± 0.0000", "8.00% ± 3.46%"]
    assert cells[2][4:] == ["20.0", "3", "1,234", ""]
    assert cells[3][:2] == ["adamw", f"85.00% ± {100 * statistics.stdev([0.8, 0.9, 0.85]):.2f}%"]
    assert len({len(line) for line in lines}) == 1


def test_equal_accuracies_are_ranked_by_loss_and_then_by_the_grid():
    found = record({"adamw": [(0.9, 2)], "sgd": [(0.9, 1)], "muon": [(0.9, 2)]}, seeds=(1,))
    assert [group.values["optim"] for group in ranking(found)] == ["sgd", "adamw", "muon"]


def test_loss_is_better_when_it_is_lower():
    found = record({"adamw": [(0.9, 2)], "sgd": [(0.1, 1)]}, metric="loss", seeds=(1,))
    assert ranking(found)[0].values == {"optim": "sgd"}
    assert "Sorted by validation loss" in markdown(found) and "validation loss 1.0000." in markdown(found)


def test_a_combination_in_which_a_seed_failed_ranks_below_all_that_went_through():
    found = record({"adamw": [(0.99, 1), (0.99, 1), "it diverged"], "sgd": [(0.5, 1)] * 3, "muon": ["bad | worse"] * 3})
    assert [group.values["optim"] for group in ranking(found)] == ["sgd", "adamw", "muon"]
    text = markdown(found)
    assert "| 1 of 3 seeds failed |" in text and "- optim-adamw_seed-3 failed: it diverged" in text
    assert "Best: optim sgd, validation accuracy 50.00% ± 0.00%." in text


def test_waiting_runs_are_shown_last_and_named():
    found = record({"adamw": [None] * 3, "sgd": [(0.5, 1), None, None]})
    assert [group.values["optim"] for group in ranking(found)] == ["sgd", "adamw"]
    assert "2 of 3 seeds waiting" in table(found) and "3 of 3 seeds waiting" in table(found)


def test_values_read_as_they_are_typed():
    assert [value_text(v) for v in (1e-3, 1e-5, 0.1234567, 3, True, None, [4, 8], "cls")] == [
        "0.001", "1e-05", "0.1234567", "3", "true", "none", "[4,8]", "cls",
    ]  # fmt: skip


def test_a_rate_is_drawn_on_a_logarithmic_axis_with_a_line_for_each_other_value():
    scores = {0.1: [(0.5, 1)], 0.01: [(0.7, 1)], 0.001: ["it diverged"]}
    found = record(scores, (("learning_rate", list(scores)),), seeds=(1,))
    axes = sweep_figure(found, LIGHT).axes[0]
    assert axes.get_xscale() == "log" and numeric_axis(found) == "learning_rate"
    drawn = axes.containers[0].lines[0]
    assert list(drawn.get_xdata()) == [0.01, 0.1] and list(drawn.get_ydata()) == [0.7, 0.5]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"] == [[0.001]]
    assert "failed" in axes.get_xlabel()


def test_error_bars_are_the_deviation_over_seeds():
    found = record({2: [(0.5, 1), (0.7, 1), (0.6, 1)]}, (("num_hidden_layers", [2, 4]),))
    axes = sweep_figure(found, LIGHT).axes[0]
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    # by hand: deviation sqrt((0.01 + 0.01 + 0) / 2) = 0.1; the tolerance is float64's
    assert [y for _, y in segment] == pytest.approx([0.5, 0.7], abs=1e-12)
    assert axes.get_xscale() == "linear"


def test_names_are_drawn_as_bars_with_the_best_on_top():
    found = record({"adamw": [(0.5, 1)] * 3, "sgd": [(0.9, 1)] * 3})
    axes = sweep_figure(found, LIGHT).axes[0]
    assert numeric_axis(found) is None and axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["optim sgd", "optim adamw"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.9, 0.5])


def test_nothing_is_drawn_before_a_score():
    assert sweep_figure(record({"adamw": [None] * 3}), LIGHT) is None
