"""Scores of a split, counted over all processes: no sample twice, none left out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..data.augmentation import normalise
from ..data.loading import EvaluationData
from .machine import in_sample_order
from .objectives import Objective
from .sharding import is_in_shards, reshard


class EvaluationStopped(Exception):
    """An evaluation was given up for a signal, by all processes after the same batch."""


@dataclass
class Evaluation:
    """Scores by name, and what they were counted from, in the order of the split: what the objective keeps of the
    logits, the labels, and the losses (N,)."""

    scores: dict[str, float]
    kept: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    objective: Objective

    def details(self, class_names: list[str]) -> dict[str, Any]:
        """Scores by class and, where an image has one class, the confusion matrix."""
        return self.objective.details(self.kept, self.references, class_names)


def uncompiled(model: torch.nn.Module) -> AbstractContextManager:
    """Within it a compiled network runs as it was written. Scores are few: their graphs, of other batches and without
    gradients, would be compiled too, and those of training then anew, for batches of any size."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    data: EvaluationData,
    normalisation: tuple[torch.Tensor, torch.Tensor],
    accelerator: Accelerator,
    objective: Objective,
    dtype: torch.dtype = torch.float32,
    is_stopped: Callable[[int], bool] | None = None,
) -> Evaluation:
    """The model's scores on a split: the mean loss, and what the objective scores.

    dtype: of pixels and logits, that of the weights. is_stopped: whether to give up after so many batches, asked by all
    processes as often, before the last one. Raises EvaluationStopped then.
    """
    modes = {module: module.training for module in model.modules()}  # frozen parts stay in eval mode in training
    model.eval()
    device = accelerator.device
    # a rank may have no sample of a small split: an empty start gives the columns their shapes all the same
    nothing = torch.empty(0, objective.num_labels, dtype=dtype, device=device)
    no_labels = torch.empty(0, *data.label_shape, dtype=data.label_dtype, device=device)
    parts = [[torch.empty(0, dtype=torch.int64, device=device), objective.kept(nothing), no_labels, nothing[:, 0]]]

    def logits_of(pixel_values: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():  # averaged weights are a network of their own, which accelerate did not wrap
            return model(pixel_values=pixel_values).logits.to(dtype)

    in_shards, batches, num_turns = is_in_shards(model), data.batches(), -(-len(data.split) // data.batch_size)
    try:
        with uncompiled(model):
            for turn in range(1, num_turns + 1):  # as many in each process: the last ones may have no batch
                if (batch := next(batches, None)) is not None:
                    batch = batch.to(device)
                    logits = logits_of(normalise(batch.images, *normalisation, dtype))
                    samples = batch.positions.to(device, non_blocking=True)
                    losses = objective.losses(logits, batch.labels)
                    parts.append([samples, objective.kept(logits), batch.labels, losses])
                elif in_shards:  # its layers are gathered by all processes together, as often by each
                    size = (model.config.num_channels, *model.config.image_height_width)
                    logits_of(torch.zeros(1, *size, dtype=dtype, device=device))
                if turn < num_turns and is_stopped is not None and is_stopped(turn):
                    raise EvaluationStopped
    finally:
        if in_shards:
            reshard(model)
        for module, was_training in modes.items():
            module.training = was_training
    columns = in_sample_order(accelerator, [torch.cat(column) for column in zip(*parts, strict=True)])
    sample_ids, kept, true, loss = (column.cpu().numpy() for column in columns)
    assert len(np.unique(sample_ids)) == len(sample_ids) == len(data.split), "a sample was lost or counted twice"
    scores = {"loss": float(loss.astype(np.float64).mean()), **objective.scores(kept, true)}
    return Evaluation(scores, kept, true, loss, objective)
