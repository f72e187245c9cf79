"""What to look at in a finished run: single images, where the network looks in them, and what its first weights are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_vit_scratch import ViTScratchConfig
from ..data.augmentation import normalise
from ..data.decoding import Decoder, Processor, normalisation
from ..data.listing import shown
from ..data.loading import RowReader
from ..data.splits import Source
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .attention import attention_maps, patch_map, rollout
from .prediction import open_model
from .record import RunRecord, judged_split

# N images, K labels, D hidden size, C channels, Ph Pw patch, Gh Gw patch rows and columns

NUM_TELLING = 12
NUM_SPACED = 6
NUM_FILTERS = 28  # as many as figure 7 of 2010.11929 shows

HIGHEST_LOSS, LEAST_CONFIDENT, EVENLY_SPACED = "highest_loss", "least_confident", "evenly_spaced"


def telling_images(kept: np.ndarray, references: np.ndarray, losses: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """The images of a split to look at, as rows of results.json: the twelve of the highest loss, the twelve of which
    the network is least sure, and six evenly spaced over the split.

    kept, references: as `training.objectives` keeps them: class ids, best first, and the probability of the best, with
    labels (N,); or logits (N, K) with labels (N, K) of 0 and 1, whose confidence is the mean over the classes of
    max(p, 1 - p). losses: (N,). A row holds sample (its place in the split), loss, confidence, answer and label; the
    last two are class ids, or lists of them.
    """
    if references.ndim == 1:
        confidences, answers = kept[:, -1], kept[:, 0].astype(np.int64)
    else:
        confidences, answers = (1 / (1 + np.exp(-np.abs(kept.astype(np.float64))))).mean(axis=1), kept > 0
    num_images = len(losses)
    chosen = {
        HIGHEST_LOSS: np.argsort(-losses, kind="stable")[:NUM_TELLING],
        LEAST_CONFIDENT: np.argsort(confidences, kind="stable")[:NUM_TELLING],
        EVENLY_SPACED: np.linspace(0, num_images - 1, min(NUM_SPACED, num_images)).round().astype(np.int64),
    }
    return {
        kind: [
            {
                "sample": sample,
                "loss": float(losses[sample]),
                "confidence": float(confidences[sample]),
                "answer": _class_ids(answers[sample]),
                "label": _class_ids(references[sample]),
            }
            for sample in samples.tolist()
        ]
        for kind, samples in chosen.items()
    }


def _class_ids(value: Any) -> int | list[int]:
    """A class id as it is; a row of 0 and 1 as the ids of its classes."""
    return int(value) if np.ndim(value) == 0 else np.flatnonzero(value).tolist()


@dataclass
class Examination:
    """What was seen of a run. Images are uint8 (C, H, W) as the network sees them, by their sample in the judged split;
    missing: in plain words, what could not be had and why."""

    config: ViTScratchConfig | None = None
    images: dict[int, np.ndarray] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    attention: dict[int, np.ndarray] = field(default_factory=dict)  # (Gh, Gw)
    filters: np.ndarray | None = None  # (n, C, Ph, Pw)
    filters_share: float = 0.0
    similarities: np.ndarray | None = None  # (Gh, Gw, Gh, Gw)
    missing: list[str] = field(default_factory=list)


def examine(run: RunRecord, source: Source | None = None) -> Examination:
    """What the published network in model/ makes of the images that results.json names under `examples`.

    source: the run's data; without it there are no images. No random state changes, and nothing of the run does.
    """
    found = Examination()
    if not (run.folder / "model" / "config.json").is_file():
        found.missing.append("model/ holds no network: images, attention, filters and parameters by layer are missing.")
        return found
    with torch.random.fork_rng(devices=[]):  # what loading draws, on the CPU, is not the run's
        model, processor, _ = open_model(str(run.folder))
    found.config = model.config
    found.filters, found.filters_share = patch_filters(model)
    found.similarities = position_similarities(model)
    examples = run.results.get("examples") or {}
    split = judged_split(examples)
    if split is None:
        found.missing.append("No images are shown: results.json names none.")
    elif source is None:
        found.missing.append("The images are missing: the report was written without the run's data.")
    else:
        _see_images(found, model, processor, source, split, examples[split])
    return found


def _see_images(
    found: Examination,
    model: ViTScratchForImageClassification,
    processor: Processor,
    source: Source,
    split: str,
    examples: dict[str, list[dict[str, Any]]],
):
    samples = sorted({row["sample"] for rows in examples.values() for row in rows})
    try:
        found.images, found.names = read_images(source, split, processor, samples)
    except UserError as error:
        found.missing.append(f"The images of the {split} split could not be read again: {error}")
        return
    spaced = [row["sample"] for row in examples[EVENLY_SPACED]]
    found.attention = attention_on(model, processor, [found.images[sample] for sample in spaced], spaced)


def read_images(
    source: Source, split: str, processor: Processor, samples: Sequence[int]
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """(images, names) of samples of a split, by sample: pixels as the network sees them, and names for people.

    Reads these rows alone, of a streamed set too: of a parquet shard their row groups. Raises UserError for what cannot
    be read.
    """
    reader, decoder = RowReader(source, source.splits[split], Decoder(processor)), Decoder(processor)
    examples = dict(zip(samples, reader.examples(np.asarray(samples, dtype=np.int64)), strict=True))
    images = {sample: decoder(example).numpy() for sample, example in examples.items()}
    return images, {sample: shown(Path(example.name).name) for sample, example in examples.items()}


def attention_on(
    model: ViTScratchForImageClassification, processor: Processor, images: Sequence[np.ndarray], keys: Sequence[int]
) -> dict[int, np.ndarray]:
    """Attention rollout on the patches (Gh, Gw) of each image, uint8 (C, H, W), by its key."""
    if not images or not model.config.num_hidden_layers:
        return {}
    pixels = torch.from_numpy(np.stack(images))
    pixel_values = normalise(pixels, *normalisation(processor, torch.device("cpu")), model.dtype)
    grid = model.config.patch_grid_of(*pixels.shape[-2:])
    maps = patch_map(rollout(attention_maps(model, pixel_values)), model.config, grid)
    return dict(zip(keys, maps.float().numpy(), strict=True))


@torch.no_grad()
def patch_filters(model: ViTScratchForImageClassification, num_filters: int = NUM_FILTERS) -> tuple[np.ndarray, float]:
    """(the principal components of the patch projection's filters, each (C, Ph, Pw) of length 1, the largest first;
    the share of the filters' squared length in them). Figure 7 of 2010.11929; not centred, so that the components span
    what the projection sees of a patch."""
    config = model.config
    weight = model.vit.embeddings.patch_embeddings.projection.weight.double().flatten(1)  # (D, C*Ph*Pw)
    lengths, components = torch.linalg.eigh(weight.T @ weight)  # ascending
    count = min(num_filters, *weight.shape)
    chosen = components.T.flip(0)[:count]
    chosen = chosen * chosen.gather(1, chosen.abs().argmax(dim=1, keepdim=True)).sign()  # a component's sign is free
    share = (lengths.flip(0)[:count].sum() / lengths.sum()).item()
    return chosen.unflatten(1, (config.num_channels, *config.patch_height_width)).float().numpy(), share


@torch.no_grad()
def position_similarities(model: ViTScratchForImageClassification) -> np.ndarray | None:
    """Cosine similarity of each patch's learned position with every other's, (Gh, Gw, Gh, Gw); None where positions are
    not learned. Figure 7 of 2010.11929."""
    positions = model.vit.embeddings.position_embeddings
    if positions is None:
        return None
    patches = positions[0, -model.config.num_patches :].double()  # without those of prefix tokens
    patches = torch.nn.functional.normalize(patches, dim=1)
    return (patches @ patches.T).unflatten(1, model.config.patch_grid).unflatten(0, model.config.patch_grid).numpy()
