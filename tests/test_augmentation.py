"""Augmentation on the device against torchvision's operations, one image at a time; its draws; what ranks draw."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

from modeling_vit_scratch.data.augmentation import (
    POLICIES,
    Augmentation,
    Draws,
    affine,
    flip,
    normalise,
    pad_and_crop,
    resized_crop,
)
from modeling_vit_scratch.data.augmentation.draws import NUM_BOX_DRAWS, draw_boxes
from modeling_vit_scratch.data.augmentation.geometry import central_boxes
from modeling_vit_scratch.data.order import ResidentOrder
from modeling_vit_scratch.errors import UserError

IMAGES = torch.randint(0, 256, (6, 3, 11, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws_of(batch_size: int, seed: int = 0, step: int = 0) -> Draws:
    return Draws(seed, step, batch_size, torch.arange(batch_size))


# ---------------------------------------------------------------- single operations


def test_flip_mirrors_the_chosen_images_alone():
    chosen = torch.tensor([True, False, True, False, False, True])
    for image, flipped, was_chosen in zip(IMAGES, flip(IMAGES, chosen), chosen, strict=True):
        assert torch.equal(flipped, tvF.horizontal_flip(image) if was_chosen else image)
    for image, flipped, was_chosen in zip(IMAGES, flip(IMAGES, chosen, axis=-2), chosen, strict=True):
        assert torch.equal(flipped, tvF.vertical_flip(image) if was_chosen else image)


def test_pad_and_crop_equals_torchvision():
    draws = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    corners = (draws * 9).long().tolist()
    for image, cropped, (top, left) in zip(IMAGES, pad_and_crop(IMAGES, 4, draws), corners, strict=True):
        assert torch.equal(cropped, tvF.crop(tvF.pad(image, [4] * 4), top, left, 11, 13))


def test_crops_reach_every_corner_and_no_further():
    edges = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])  # the least and greatest numbers that are drawn
    padded = torch.nn.functional.pad(IMAGES[:2], (4,) * 4)
    cropped = pad_and_crop(IMAGES[:2], 4, edges)
    assert torch.equal(cropped[0], padded[0, :, :11, :13])
    assert torch.equal(cropped[1], padded[1, :, 8:, 8:])


@pytest.mark.parametrize(
    "degrees, shift, scale", [(0, (0, 0), 1.0), (0, (2, -3), 1.0), (90, (0, 0), 1.0), (17, (1, 2), 1.2)]
)
def test_affine_equals_torchvision(degrees, shift, scale):
    images = IMAGES.float()
    angles, scales = torch.full((6,), math.radians(degrees)), torch.full((6,), scale)
    ours = affine(images, angles, torch.tensor([shift] * 6, dtype=torch.float32), scales)
    theirs = tvF.affine(images, degrees, list(shift), scale, [0.0, 0.0], interpolation=tvF.InterpolationMode.BILINEAR)
    # pixel values go to 255; a coordinate's rounding of 1e-6 of an image moves them by less than 1e-2
    assert torch.allclose(ours, theirs, atol=1e-2)


def test_affine_keeps_angles_on_images_that_are_not_square():
    image = torch.zeros(1, 1, 21, 41)
    image[0, 0, 10, 25] = 1.0  # five pixels right of the centre
    turned = affine(image, torch.tensor([math.pi / 2]), torch.zeros(1, 2), torch.ones(1))
    assert turned[0, 0].argmax().item() == 15 * 41 + 20  # five pixels below it


def test_resized_crops_equal_torchvisions():
    boxes = np.array([[0, 0, 11, 13], [2, 3, 5, 4], [10, 12, 1, 1], [4, 0, 7, 13], [0, 6, 11, 2], [1, 1, 9, 9]])
    for image, ours, box in zip(IMAGES, resized_crop(IMAGES, boxes), boxes.tolist(), strict=True):
        theirs = tvF.resized_crop(image.float(), *box, size=[11, 13])
        assert (ours - theirs).abs().max() < 0.5 + 1e-4  # rounded once, from float32
        # torchvision's uint8 kernel rounds twice, after the columns and after the rows
        assert (ours.int() - tvF.resized_crop(image, *box, size=[11, 13]).int()).abs().max() <= 1


def test_normalise_keeps_float64():
    mean, std = torch.tensor([[[100.0]]]), torch.tensor([[[50.0]]])
    assert normalise(IMAGES, mean, std).dtype == torch.float32
    whole = normalise(IMAGES, mean.double(), std.double(), torch.float64)
    assert torch.equal(whole, (IMAGES.double() - 100) / 50)


# ---------------------------------------------------------------- boxes


def test_a_box_that_fills_the_image_is_left_out_where_boxes_must_lie_inside():
    uniforms = torch.rand(500, NUM_BOX_DRAWS, generator=torch.Generator().manual_seed(2))
    boxes, has_fit = draw_boxes(uniforms, (0.9, 1.0), (0.9, 1.1), 9, 9)
    assert has_fit.all() and boxes[:, 2:].max() == 9
    boxes, has_fit = draw_boxes(uniforms, (0.7, 1.0), (0.9, 1.1), 9, 9, is_inside=True)
    assert not has_fit.all() and boxes[has_fit, 2:].max() == 8


def test_random_resized_crops_are_drawn_as_torchvision_draws_them():
    uniforms = torch.rand(4000, NUM_BOX_DRAWS, generator=torch.Generator().manual_seed(3))
    boxes, has_fit = draw_boxes(uniforms, (0.08, 1.0), (3 / 4, 4 / 3), 32, 24)
    boxes[~has_fit] = central_boxes((3 / 4, 4 / 3), 32, 24)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop((32, 24)), torch.zeros(1, 32, 24)
    drawn = [crop.make_params([image]) for _ in range(2000)]
    theirs = np.array([[box[name] for name in ("top", "left", "height", "width")] for box in drawn])
    # standard errors of the means are 0.14 (a side's deviation of 6 over the root of 2000) and less
    assert np.abs(boxes.mean(0) - theirs.mean(0)).max() < 0.6
    assert np.abs(boxes.std(0) - theirs.std(0)).max() < 0.6
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= (32, 24)).all()


@pytest.mark.parametrize(("size", "box"), [((8, 24), (0, 6, 8, 11)), ((24, 8), (6, 0, 11, 8)), ((8, 9), (0, 0, 8, 9))])
def test_the_central_box_is_torchvisions_fallback(size, box):
    crop = v2.RandomResizedCrop(size, scale=(5.0, 5.0))  # five times the area never fits
    theirs = crop.make_params([torch.zeros(1, *size)])
    ours = central_boxes((3 / 4, 4 / 3), *size).tolist()
    assert ours == [theirs[name] for name in ("top", "left", "height", "width")] == list(box)


# ---------------------------------------------------------------- the whole


EVERYTHING = Augmentation(
    horizontal_flip_prob=0.5, vertical_flip_prob=0.5, color_jitter=0.3, crop_padding=2, rotation_degrees=10,
    translate_pixels=1.0, scale_range=0.1, random_resized_crop_scale=0.3, auto_augment="randaugment",
    random_erasing_prob=0.5,
)  # fmt: skip
SINGLY = {
    "flip": Augmentation(horizontal_flip_prob=0.5),
    "vertical flip": Augmentation(vertical_flip_prob=0.5),
    "colour jitter": Augmentation(color_jitter=0.4),
    "padded crop": Augmentation(crop_padding=2),
    "affine": Augmentation(rotation_degrees=20),
    "resized crop": Augmentation(random_resized_crop_scale=0.2),
    "erasing": Augmentation(random_erasing_prob=0.6),
    **{policy: Augmentation(auto_augment=policy) for policy in POLICIES},
    "everything": EVERYTHING,
}
MANY = torch.randint(0, 256, (37, 3, 11, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def augmented(augment: Augmentation, images: torch.Tensor, draws: Draws) -> torch.Tensor:
    mean = torch.full((3, 1, 1), 127.5)
    return augment.erase(normalise(augment(images, draws), mean, mean), draws)


def test_nothing_switched_on_changes_nothing():
    assert Augmentation()(IMAGES, draws_of(6)) is IMAGES
    assert Augmentation().erase(IMAGES, draws_of(6)) is IMAGES


@pytest.mark.parametrize("name", SINGLY)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_see_the_images_that_one_process_sees(name, world_size):
    whole = augmented(SINGLY[name], MANY, draws_of(37, seed=5, step=3))
    for rank in range(world_size):
        positions = ResidentOrder.local_positions(37, rank, world_size)
        part = augmented(SINGLY[name], MANY[positions], Draws(5, 3, 37, positions, world_size))
        assert torch.equal(part, whole[positions])


@pytest.mark.parametrize("name", SINGLY)
def test_each_switch_changes_images_and_another_step_changes_them_otherwise(name):
    plain = augmented(Augmentation(), MANY, draws_of(37))
    first, second = (augmented(SINGLY[name], MANY, draws_of(37, step=step)) for step in (1, 2))
    changed = (first != plain).flatten(1).any(1).float().mean()
    assert changed > 0.2 and not torch.equal(first, second)


@pytest.mark.parametrize("name", SINGLY)
def test_identical_images_leave_as_different_ones(name):
    same = MANY[:1].expand(37, -1, -1, -1).contiguous()
    results = {tuple(image.flatten().tolist()) for image in augmented(SINGLY[name], same, draws_of(37))}
    assert len(results) >= (2 if "flip" in name else 10)


@pytest.mark.parametrize("num_channels", [1, 2, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_any_number_of_channels_is_augmented(policy, num_channels):
    images = torch.randint(0, 256, (50, num_channels, 9, 7), dtype=torch.uint8)
    changed = Augmentation(auto_augment=policy)(images, draws_of(50))
    assert changed.shape == images.shape and changed.dtype == torch.uint8 and not torch.equal(changed, images)


def test_a_rank_without_images_gets_none():
    none = Draws(0, 0, 4, np.arange(0), world_size=5)
    assert augmented(EVERYTHING, MANY[:0], none).shape == (0, 3, 11, 13)


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(UserError, match="Did you mean 'randaugment'.*Known: autoaugment_cifar10"):
        Augmentation(auto_augment="randaug")


def test_a_ratio_whose_ends_are_swapped_is_refused():
    with pytest.raises(UserError, match="least and greatest width / height"):
        Augmentation(random_resized_crop_ratio=(2.0, 0.5))


# ---------------------------------------------------------------- draws


def test_ranks_draw_what_one_process_draws():
    whole = draws_of(16, seed=5, step=3)
    for rank in range(3):
        positions = ResidentOrder.local_positions(16, rank, 3)
        part = Draws(5, 3, 16, positions, 3)
        assert torch.equal(part.uniform("crop", 3), whole.uniform("crop", 3)[positions])
        assert torch.equal(part.beta("mixup", 0.8), whole.beta("mixup", 0.8)[positions])
        assert torch.equal(part.noise("erasing", 1, 7), whole.noise("erasing", int(positions[1]), 7))


def test_draws_differ_between_steps_samples_seeds_and_purposes():
    draws = draws_of(16, seed=5, step=3).uniform("crop", 8)
    assert len(draws.flatten().unique()) > 100
    for other in (draws_of(16, seed=5, step=4), draws_of(16, seed=6, step=3)):
        assert not torch.equal(draws, other.uniform("crop", 8))
    assert not torch.equal(draws, draws_of(16, seed=5, step=3).uniform("flip", 8))


def test_draws_leave_the_global_generators_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    augmented(EVERYTHING, MANY, draws_of(37))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_affine_draws_fill_their_ranges_evenly():
    pixel = torch.zeros(2000, 1, 9, 9)
    pixel[:, :, 4, 4] = 1.0
    moved = Augmentation(translate_pixels=2.0)(pixel, draws_of(2000))
    coordinates = torch.arange(9.0) - 4
    shifts = torch.stack(((moved.sum((1, 2)) * coordinates).sum(-1), (moved.sum((1, 3)) * coordinates).sum(-1)))
    # uniform on [-2, 2]: mean 0 +- 0.026 (standard error), extremes within 0.02 of the ends
    assert shifts.mean(-1).abs().max() < 0.1
    assert shifts.min() < -1.95 and shifts.max() > 1.95 and shifts.abs().max() <= 2.0001


# A tensor on the meta device has no values: whatever waits for one of a GPU fails there.


@pytest.mark.parametrize("name", SINGLY)
def test_nothing_waits_for_a_number_from_the_device(name):
    mean = torch.full((3, 1, 1), 127.5, device="meta")
    for step in range(3):
        draws = draws_of(37, step=step)
        images = SINGLY[name](MANY.to("meta"), draws)
        assert SINGLY[name].erase(normalise(images, mean, mean), draws).device.type == "meta"


def test_waiting_for_a_number_would_be_seen():
    chosen = torch.zeros(37, dtype=torch.bool, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        MANY.to("meta")[chosen]


# ---------------------------------------------------------------- erasing


def test_erased_rectangles_have_the_papers_areas_and_hold_standard_noise():
    images = torch.full((3000, 2, 20, 16), 100.0)
    erased = Augmentation(random_erasing_prob=0.25).erase(images, draws_of(3000))
    assert (images == 100).all()  # the images that came stay as they are
    is_noise = erased != 100
    assert torch.equal(is_noise[:, 0], is_noise[:, 1])
    touched = is_noise.flatten(1).any(1)
    # standard errors: 0.008 of the share of images, 0.0033 of the mean area (0.09 / root of 750), 0.003 of the noise
    assert abs(touched.float().mean() - 0.25) < 0.03
    areas = is_noise[touched, 0].float().mean((1, 2))
    assert abs(areas.mean() - (0.02 + 0.33) / 2) < 0.015 and areas.min() < 0.03 and 0.31 < areas.max() < 0.36
    assert abs(erased[is_noise].mean()) < 0.02 and abs(erased[is_noise].std() - 1) < 0.02
    rows, columns = is_noise[touched, 0].any(2).sum(1), is_noise[touched, 0].any(1).sum(1)
    assert torch.equal(rows * columns, is_noise[touched, 0].sum((1, 2)))  # each is one full rectangle
    assert (rows > columns).any() and (rows < columns).any()


def test_erasing_is_drawn_as_torchvision_draws_it():
    is_noise = Augmentation(random_erasing_prob=1.0).erase(torch.full((3000, 1, 20, 16), 9.0), draws_of(3000)) != 9
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1.0, value="random")
    their_noise = torch.stack([theirs(torch.full((1, 20, 16), 9.0)) for _ in range(1500)]) != 9
    # where erasing happens: deviations of 0.4 over the root of 1500 are 0.01 a pixel
    assert (is_noise.float().mean(0) - their_noise.float().mean(0)).abs().max() < 0.06
    for axis in (2, 3):
        sides, their_sides = is_noise.any(axis).sum(-1).float(), their_noise.any(axis).sum(-1).float()
        assert abs(sides.mean() - their_sides.mean()) < 0.4 and abs(sides.std() - their_sides.std()) < 0.4


def test_erasing_keeps_float64():
    erased = Augmentation(random_erasing_prob=1.0).erase(torch.zeros(4, 1, 8, 8, dtype=torch.float64), draws_of(4))
    assert erased.dtype == torch.float64 and erased.any()
