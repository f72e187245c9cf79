"""Augmentation on the device against torchvision's operations, one image at a time."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tvF

from modeling_vit_scratch.data.augmentation import NUM_DRAWS, Augmentation, affine, batch_draws, flip, pad_and_crop
from modeling_vit_scratch.data.order import ResidentOrder

IMAGES = torch.randint(0, 256, (6, 3, 11, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_flip_mirrors_the_chosen_images_alone():
    chosen = torch.tensor([True, False, True, False, False, True])
    for image, flipped, was_chosen in zip(IMAGES, flip(IMAGES, chosen), chosen, strict=True):
        assert torch.equal(flipped, tvF.horizontal_flip(image) if was_chosen else image)


def test_pad_and_crop_equals_torchvision():
    draws = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    corners = (draws * 9).long().tolist()
    for image, cropped, (top, left) in zip(IMAGES, pad_and_crop(IMAGES, 4, draws), corners, strict=True):
        assert torch.equal(cropped, tvF.crop(tvF.pad(image, [4] * 4), top, left, 11, 13))


def test_crops_reach_every_corner_and_no_further():
    edges = torch.tensor([[0.0, 0.0], [0.9999, 0.9999]])
    padded = torch.nn.functional.pad(IMAGES[:2], (4,) * 4)
    cropped = pad_and_crop(IMAGES[:2], 4, edges)
    assert torch.equal(cropped[0], padded[0, :, :11, :13])
    assert torch.equal(cropped[1], padded[1, :, 8:, 8:])


@pytest.mark.parametrize(
    "degrees, shift, scale", [(0, (0, 0), 1.0), (0, (2, -3), 1.0), (90, (0, 0), 1.0), (17, (1, 2), 1.2)]
)
def test_affine_equals_torchvision(degrees, shift, scale):
    images = IMAGES[:, :, :, :11].float()  # square: torchvision turns pixels, so must we
    ours = affine(
        images,
        torch.full((6,), math.radians(degrees)),
        torch.tensor([shift] * 6, dtype=torch.float32),
        torch.full((6,), scale),
    )
    theirs = tvF.affine(images, degrees, list(shift), scale, [0.0, 0.0], interpolation=tvF.InterpolationMode.BILINEAR)
    # pixel values go to 255; a coordinate's rounding of 1e-6 of an image moves them by less than 1e-2. Inside only:
    # torchvision fills the border differently from zeros mixed in by interpolation
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    assert torch.allclose(ours[inner], theirs[inner], atol=1e-2)


def test_affine_keeps_angles_on_images_that_are_not_square():
    image = torch.zeros(1, 1, 21, 41)
    image[0, 0, 10, 25] = 1.0  # five pixels right of the centre
    turned = affine(image, torch.tensor([math.pi / 2]), torch.zeros(1, 2), torch.ones(1))
    assert turned[0, 0].argmax().item() == 15 * 41 + 20  # five pixels below it


def test_nothing_switched_on_changes_nothing():
    assert Augmentation()(IMAGES, torch.rand(6, NUM_DRAWS)) is IMAGES


def test_ranks_draw_what_one_process_draws():
    whole = batch_draws(5, 3, 16, torch.arange(16))
    for rank in range(3):
        positions = torch.from_numpy(ResidentOrder.local_positions(16, rank, 3))
        assert torch.equal(batch_draws(5, 3, 16, positions), whole[positions])


def test_draws_differ_between_steps_samples_and_seeds():
    draws = batch_draws(5, 3, 16, torch.arange(16))
    assert len(draws.flatten().unique()) > 100
    assert not torch.equal(draws, batch_draws(5, 4, 16, torch.arange(16)))
    assert not torch.equal(draws, batch_draws(6, 3, 16, torch.arange(16)))


def test_affine_draws_fill_their_ranges_evenly():
    pixel = torch.zeros(2000, 1, 9, 9)
    pixel[:, :, 4, 4] = 1.0
    moved = Augmentation(translate_pixels=2.0)(pixel, batch_draws(0, 0, 2000, torch.arange(2000)))
    coordinates = torch.arange(9.0) - 4
    shifts = torch.stack(((moved.sum((1, 2)) * coordinates).sum(-1), (moved.sum((1, 3)) * coordinates).sum(-1)))
    # uniform on [-2, 2]: mean 0 +- 0.026 (standard error), extremes within 0.02 of the ends
    assert shifts.mean(-1).abs().max() < 0.1
    assert shifts.min() < -1.95 and shifts.max() > 1.95 and shifts.abs().max() <= 2.0001
