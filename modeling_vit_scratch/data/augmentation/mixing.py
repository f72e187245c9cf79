"""mixup (1710.09412) and CutMix (1905.04899), drawn per sample, with partners that a rank finds at home."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .draws import Draws, choose, send

# B batch, C channels, H W image, K labels

# which the usual numbers of processes divide; small batches have the first ones
NUMS_OF_GROUPS = (1, 2, 3, 4, 6, 8, 12, 24, 48, 96, 192, 384)

Gather = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Mixing:
    """Each image mixed with another one of its global batch, and its label likewise.

    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha), from which each sample's own share is drawn; 0: not done. The
    papers draw one share a batch. mixup_prob: share of samples that are mixed. mixup_switch_prob: share of mixed ones
    that are CutMix, where both are on.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5

    @property
    def is_on(self) -> bool:
        return bool((self.mixup_alpha or self.cutmix_alpha) and self.mixup_prob)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Draws, num_labels: int, gather: Gather | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(mixed images, targets (B, K) whose rows sum to 1, in the images' dtype).

        images: normalised floats (B, C, H, W). labels: int64 (B,), or (B, K) from 0 to 1 where an image has several;
        the targets are then weighted means of such rows. gather(images, labels, positions) gives those of
        the whole global batch, in any order, positions on the CPU; it is called on all ranks or on none, where a
        rank's partners may be another's.
        """
        if not self.is_on:
            return images, rows_of_labels(labels, num_labels).to(images.dtype)
        partners = partner_positions(draws)
        pool, pool_labels, positions = images, labels, draws.positions
        if draws.world_size > 1 and not (draws.is_interleaved and num_groups(draws.batch_size) % draws.world_size == 0):
            assert gather is not None, (
                f"{draws.world_size} processes do not divide the {num_groups(draws.batch_size)} groups of partners in "
                f"a batch of {draws.batch_size}: mixing needs `gather`"
            )
            pool, pool_labels, positions = gather(images, labels, draws.positions)
        rows = send(_rows_of(partners, positions, draws.batch_size), images.device)
        own, is_cut, boxes = self._shares(draws, *images.shape[-2:])
        own[partners == draws.positions] = 1.0  # alone in its class: mixed with itself
        share = send(own.to(images.dtype), images.device)[:, None]  # (B, 1)
        weights = 1 - share[:, :, None, None]  # of the partner: mixup's are the same everywhere
        if self.cutmix_alpha:
            inside = _inside(send(boxes, images.device), *images.shape[-2:]).to(images.dtype)  # (B, 1, H, W)
            weights = torch.where(send(is_cut, images.device)[:, None, None, None], inside, weights)
        own_labels, partners_labels = (
            rows_of_labels(values, num_labels) for values in (labels, pool_labels.index_select(0, rows))
        )
        targets = own_labels * share + partners_labels * (1 - share)
        return torch.lerp(images, pool.index_select(0, rows), weights), targets

    def _shares(self, draws: Draws, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each sample, on the CPU: its own share (B,) float64, whether it is CutMix (B,), and the box that its
        partner fills (B, 4: top, bottom, left, right), empty where it is not."""
        uniforms = draws.uniform("mixing", 4).double().numpy()
        is_mixed = uniforms[:, 0] < self.mixup_prob
        switch_prob = self.mixup_switch_prob if self.mixup_alpha else 1.0
        is_cut = is_mixed & (uniforms[:, 1] < switch_prob) if self.cutmix_alpha else np.zeros_like(is_mixed)
        own = np.ones(len(uniforms))
        if self.mixup_alpha:
            own = np.where(is_mixed, draws.beta("mixup", self.mixup_alpha).numpy(), own)
        boxes = np.zeros((len(uniforms), 4), dtype=np.int64)
        if self.cutmix_alpha:
            # half a side is that of an area of 1 - share; the centre lies anywhere, what lies outside is lost
            halves = 0.5 * np.sqrt(1 - draws.beta("cutmix", self.cutmix_alpha).double().numpy())
            for axis, side in enumerate((height, width)):
                centres, reach = choose(uniforms[:, 2 + axis], side), (halves * side).astype(np.int64)
                boxes[:, 2 * axis] = np.where(is_cut, np.maximum(centres - reach, 0), 0)
                boxes[:, 2 * axis + 1] = np.where(is_cut, np.minimum(centres + reach, side), 0)
            areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
            own = np.where(is_cut, 1 - areas / (height * width), own)
        return torch.from_numpy(own), torch.from_numpy(is_cut), torch.from_numpy(boxes)


def rows_of_labels(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """(B, K): true at the class of ids (B,); labels that are rows already as they are."""
    return labels if labels.ndim == 2 else labels[:, None] == torch.arange(num_labels, device=labels.device)


def _inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 1, H, W), True inside the boxes (B, 4: top, bottom, left, right)."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


# ---------------------------------------------------------------- partners


def num_groups(batch_size: int) -> int:
    """Into how many groups of partners a global batch is dealt: as many processes, or a divisor, need no exchange.

    The largest of NUMS_OF_GROUPS that leaves each group eight members or more; it does not depend on the processes, and
    so neither do the partners.
    """
    return max(number for number in NUMS_OF_GROUPS if number <= max(1, batch_size // 8))


def partner_positions(draws: Draws) -> torch.Tensor:
    """The position in the global batch of each sample's partner (B,): any other of its residue class modulo
    num_groups, each as likely; a sample that is alone there is its own."""
    groups = num_groups(draws.batch_size)
    positions = draws.positions.numpy()
    places, residues = np.divmod(positions, groups)
    sizes = -(-(draws.batch_size - residues) // groups)
    steps = choose(draws.uniform("partner", 1)[:, 0].numpy(), np.maximum(sizes - 1, 1)) + 1
    return torch.from_numpy((places + steps) % sizes * groups + residues)


def _rows_of(wanted: torch.Tensor, positions: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Where in `positions` each wanted one stands, on the CPU."""
    rows = torch.full((batch_size,), -1)
    rows[positions.cpu()] = torch.arange(len(positions))
    found = rows[wanted]
    assert bool((found >= 0).all()), (
        "a partner is not among this process's samples: its positions are not one residue class modulo the processes"
    )
    return found
