"""mixup and CutMix: what is mixed with what, by how much, and the same for any number of processes."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from modeling_vit_scratch.data.augmentation import Draws, Mixing
from modeling_vit_scratch.data.augmentation.mixing import num_groups, partner_positions
from modeling_vit_scratch.data.order import ResidentOrder

BOTH = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.8)


def batch(size: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 10, generator=generator, dtype=dtype), torch.arange(size) % 7


def draws_of(size: int, step: int = 0) -> Draws:
    return Draws(3, step, size, torch.arange(size))


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.0)])
def test_nothing_is_mixed_where_mixing_is_off(mixing):
    images, labels = batch(16)
    mixed, targets = mixing(images, labels, draws_of(16), 7)
    assert not mixing.is_on and mixed is images
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 7).float())


@pytest.mark.parametrize("mixing", [Mixing(mixup_alpha=0.2), Mixing(cutmix_alpha=1.0), BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_keeps_total_label_mass_and_the_dtype(mixing, dtype):
    mixed, targets = mixing(*batch(64, dtype), draws_of(64), 7)
    assert mixed.dtype == targets.dtype == dtype and targets.shape == (64, 7)
    assert torch.allclose(targets.sum(1), torch.ones(64, dtype=dtype), atol=1e-6, rtol=0)  # one rounding of 1 - share
    assert (targets >= 0).all()


def own_shares(size: int, mixing: Mixing, step: int = 0):
    """(mixed images, originals, own shares, partners): each sample is its own class, so targets tell both."""
    images, _ = batch(size, torch.float64)
    draws = draws_of(size, step)
    mixed, targets = mixing(images, torch.arange(size), draws, size)
    return mixed, images, targets[torch.arange(size), torch.arange(size)], partner_positions(draws)


def test_mixup_is_the_convex_combination_that_the_targets_say():
    mixed, images, shares, partners = own_shares(64, Mixing(mixup_alpha=0.8))
    weights = shares[:, None, None, None]
    assert torch.allclose(mixed, weights * images + (1 - weights) * images[partners], atol=1e-12)
    assert len(shares.unique()) == 64  # a share a sample
    assert (partners != torch.arange(64)).all()


def test_mixup_shares_follow_the_beta_distribution():
    shares = torch.cat([own_shares(500, Mixing(mixup_alpha=0.4), step)[2] for step in range(8)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)) = 0.139; standard errors of 4000: 0.006 and 0.002
    assert abs(shares.mean() - 0.5) < 0.025 and abs(shares.var() - 1 / (4 * 1.8)) < 0.01


def test_cutmix_shares_are_the_share_of_pixels_left():
    mixed, images, shares, partners = own_shares(128, Mixing(cutmix_alpha=1.0))
    is_own, is_partners = mixed == images, mixed == images[partners]
    assert (is_own | is_partners).all()
    assert torch.allclose(is_own[:, 0].double().mean((1, 2)), shares, atol=1e-12)
    boxes = is_partners[:, 0]
    assert torch.equal(boxes.any(2).sum(1) * boxes.any(1).sum(1), boxes.sum((1, 2)))  # each is one full rectangle
    assert torch.equal(is_partners[:, 0], is_partners[:, 2])
    assert len(shares.unique()) > 20


def test_cutmix_boxes_lie_where_torchvisions_lie():
    ours, theirs = torch.zeros(8, 10), torch.zeros(8, 10)
    for step in range(10):
        mixed, images, _, partners = own_shares(400, Mixing(cutmix_alpha=1.0), step)
        ours += (mixed == images[partners])[:, 0].float().mean(0) / 10
    torch.manual_seed(0)
    transform = v2.CutMix(alpha=1.0, num_classes=2)
    for _ in range(2000):
        left, top, right, bottom = transform.make_params([torch.zeros(2, 3, 8, 10)])["box"]
        theirs[top:bottom, left:right] += 1 / 2000
    assert (ours - theirs).abs().max() < 0.04  # a pixel's standard error is 0.01


def test_as_many_samples_are_mixed_and_cut_as_asked():
    mixing = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)
    mixed, images, shares, partners = own_shares(2000, mixing)
    is_cut = ((mixed == images) | (mixed == images[partners])).flatten(1).all(1) & (shares < 1)
    # standard errors 0.011 and 0.009; one box in a hundred is empty
    assert abs((shares < 1).float().mean() - 0.6) < 0.05
    assert abs(is_cut.float().mean() - 0.6 * 0.25) < 0.04
    untouched = shares == 1
    assert torch.equal(mixed[untouched], images[untouched])


@pytest.mark.parametrize("size", [8, 16, 37, 64, 200])
def test_partners_are_drawn_evenly_among_the_others_of_a_residue_class(size):
    groups = num_groups(size)
    assert 24 % groups == 0 and groups <= max(1, size // 8)
    pairs = np.zeros((size, size))
    for step in range(300):
        pairs[np.arange(size), partner_positions(draws_of(size, step))] += 1 / 300
    classes = np.arange(size) % groups
    is_possible = (classes[:, None] == classes) & ~np.eye(size, dtype=bool)
    assert (pairs[~is_possible] == 0).all()
    expected = is_possible / is_possible.sum(1, keepdims=True)
    assert np.abs(pairs - expected).max() < 0.16  # standard error 0.02 of one in seven, over up to 40,000 pairs


@pytest.mark.parametrize(
    "size, world_sizes", [(128, (2, 3, 4, 6, 12)), (1024, (2, 3, 4, 6, 8, 12, 16, 32)), (4096, (8, 16, 24, 64, 128))]
)
def test_usual_numbers_of_processes_find_partners_at_home(size, world_sizes):
    assert all(num_groups(size) % world_size == 0 for world_size in world_sizes)


def test_a_batch_of_one_image_is_not_mixed():
    images, labels = batch(1)
    mixed, targets = BOTH(images, labels, draws_of(1), 7)
    assert torch.equal(mixed, images) and targets[0].tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [12, 37, 48, 200])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_processes_mixes_the_same_images(size, world_size):
    images, labels = batch(size)
    whole, whole_targets = BOTH(images, labels, draws_of(size), 7)
    assert not torch.equal(whole, images)
    num_gathered = 0

    def gather(local_images, local_labels, positions):
        nonlocal num_gathered
        num_gathered += 1
        assert torch.equal(local_images, images[positions])
        order = torch.randperm(size)  # gathered by rank, not by position
        return images[order], labels[order], order

    for rank in range(world_size):
        positions = ResidentOrder.local_positions(size, rank, world_size)
        draws = Draws(3, 0, size, positions, world_size)
        mixed, targets = BOTH(images[positions], labels[positions], draws, 7, gather)
        assert torch.equal(mixed, whole[positions]) and torch.equal(targets, whole_targets[positions])
    assert num_gathered == (0 if num_groups(size) % world_size == 0 else world_size)


def test_a_stream_whose_epoch_ends_in_the_batch_gathers_too():
    images, labels = batch(48)
    whole, _ = BOTH(images, labels, draws_of(48), 7)
    positions = torch.cat((torch.arange(0, 20, 2), torch.arange(21, 48, 2)))  # the lanes start anew at 20
    draws = Draws(3, 0, 48, positions, world_size=2, is_interleaved=False)
    gathered = (images, labels, torch.arange(48))
    mixed, _ = BOTH(images[positions], labels[positions], draws, 7, lambda *_: gathered)
    assert torch.equal(mixed, whole[positions])
    broken = Draws(3, 0, 48, positions, world_size=2)
    with pytest.raises(AssertionError, match="not one residue class"):
        BOTH(images[positions], labels[positions], broken, 7)


def test_partners_elsewhere_without_a_way_to_them_are_an_error():
    positions = ResidentOrder.local_positions(40, 0, 5)
    images, labels = batch(40)
    with pytest.raises(AssertionError, match="needs `gather`"):
        BOTH(images[positions], labels[positions], Draws(3, 0, 40, positions, 5), 7)


def test_mixing_waits_for_no_number_from_the_device():
    images, labels = batch(64)
    mixed, targets = BOTH(images.to("meta"), labels.to("meta"), draws_of(64), 7)
    assert mixed.device.type == targets.device.type == "meta"
