"""--torch_compile: what is compiled is the training step, and nothing else."""

import pytest
import torch
from test_run_train import TINY, equal, run, weights

from modeling_vit_scratch.training import loop


@pytest.fixture
def compiled(monkeypatch):
    """(batch, whether gradients are computed) of each graph that is compiled, by a compiler that leaves it as it is."""
    graphs, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        images = [value for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 4 and len(value) > 1]
        graphs.append((len(images[0]) if images else None, torch.is_grad_enabled()))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend=backend))
    yield graphs
    torch.compiler.reset()


def test_scores_are_computed_by_the_network_as_it_was_written(tmp_path, compiled):
    arguments = ["--max_steps", 4, "--eval_steps", 2, "--train_batch_size", 32, "--gradient_accumulation_steps", 1]
    results = run(tmp_path / "compiled", *arguments, "--torch_compile", "true")
    assert compiled and set(compiled) == {(32, True)}
    plain = run(tmp_path / "plain", *arguments)
    assert loop.final_scores(results) == pytest.approx(loop.final_scores(plain), rel=1e-4)


def test_a_budget_does_not_time_the_compilation_of_scores(tmp_path, compiled):
    run(tmp_path / "run", "--time_budget", "4s", "--train_batch_size", 32, "--torch_compile", "true",
        "--gradient_accumulation_steps", 1)  # fmt: skip
    assert compiled and set(compiled) == {(32, True)}


def test_the_network_changes_over_to_all_patches(tmp_path, compiled):
    flags = ["--max_steps", 4, "--full_size_step", 2, "--eval_steps", 4, "--train_batch_size", 32]
    flags += ["--config_overrides", f"{TINY},patch_drop_rate=0.5", "--gradient_accumulation_steps", 1]
    run(tmp_path / "compiled", *flags, "--torch_compile", "true")
    run(tmp_path / "plain", *flags)
    assert compiled and equal(weights(tmp_path / "compiled"), weights(tmp_path / "plain"))
