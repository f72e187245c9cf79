"""Scores of a split, counted over all processes: no sample twice, none left out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..data.augmentation import normalise
from ..data.loading import EvaluationData
from ..results.metrics import classification_scores, confusion, per_class_scores


@dataclass
class Evaluation:
    """Scores by name, and what they were counted from."""

    scores: dict[str, float]
    predictions: np.ndarray
    references: np.ndarray

    def details(self, class_names: list[str]) -> dict[str, Any]:
        found = {"per_class": per_class_scores(self.predictions, self.references, class_names)}
        return {**found, "confusion": confusion(self.predictions, self.references, len(class_names))}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    data: EvaluationData,
    normalisation: tuple[torch.Tensor, torch.Tensor],
    accelerator: Accelerator,
    num_labels: int,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """The model's scores on a split: loss (mean cross-entropy), accuracy, f1_macro, accuracy_top5.

    dtype: of pixels and logits, that of the weights.
    """
    was_training = model.training
    model.eval()
    width = min(5, num_labels)
    device = accelerator.device
    samples = [torch.empty(0, dtype=torch.int64, device=device)]
    rankings = [torch.empty(0, width, dtype=torch.int64, device=device)]
    references, losses = [samples[0]], [torch.empty(0, dtype=dtype, device=device)]
    for batch in data.batches():
        batch = batch.to(device)
        with accelerator.autocast():  # averaged weights are a network of their own, which accelerate did not wrap
            logits = model(pixel_values=normalise(batch.images, *normalisation, dtype)).logits.to(dtype)
        samples.append(batch.positions.to(device, non_blocking=True))
        rankings.append(logits.topk(width, dim=1).indices)
        references.append(batch.labels)
        losses.append(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none"))
    model.train(was_training)
    columns = [torch.cat(parts) for parts in (samples, rankings, references, losses)]
    if accelerator.num_processes > 1:  # ranks may hold one sample more or less: rows of padding have sample -1
        columns = [accelerator.gather(accelerator.pad_across_processes(c, pad_index=-1)) for c in columns]
    order = columns[0].argsort()
    order = order[columns[0][order] >= 0]
    sample_ids, ranked, true, loss = (column[order].cpu().numpy() for column in columns)
    assert len(np.unique(sample_ids)) == len(sample_ids) == len(data.split), "a sample was lost or counted twice"
    scores = {"loss": float(loss.astype(np.float64).mean()), **classification_scores(ranked, true, num_labels)}
    return Evaluation(scores, ranked[:, 0], true)
