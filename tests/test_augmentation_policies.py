"""The policies' tables and operations against torchvision's: every row, every magnitude, image by image."""

import inspect

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

from modeling_vit_scratch.data.augmentation import Draws, apply_stages, contrast, gaussian_blur, saturation, sharpness
from modeling_vit_scratch.data.augmentation.policies import (
    COLOUR,
    GEOMETRY,
    OPERATIONS,
    RANGES,
    SUB_POLICIES,
    Stage,
    auto_augment,
    color_jitter,
    magnitude_table,
    rand_augment,
    three_augment,
    trivial_augment,
)

THEIR_NAMES = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "color": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip
THEIR_POLICIES = {
    "autoaugment_cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "autoaugment_imagenet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
}
SPACES = {
    "standard": (v2.RandAugment()._AUGMENTATION_SPACE, 31),
    "wide": (v2.TrivialAugmentWide()._AUGMENTATION_SPACE, 31),
    "autoaugment": (v2.AutoAugment()._AUGMENTATION_SPACE, 10),
}


def smooth_images(count: int, num_channels: int = 3, height: int = 24, width: int = 31) -> torch.Tensor:
    """Gradients, grey areas, a black and a white corner, noise: what colour operations stumble on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, num_channels, 4, 5), dtype=torch.uint8, generator=generator)
    images = tvF.resize(images, [height, width])
    images[:, :, :6, :9] = torch.arange(54, dtype=torch.uint8).view(6, 9) * 4  # grey: all channels alike
    images[:, :, -3:, -3:], images[:, :, -3:, :3] = 255, 0
    noise = torch.randint(0, 256, (count, num_channels, 6, 6), dtype=torch.uint8, generator=generator)
    images[:, :, 10:16, 10:16] = noise
    return images


def theirs(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    transform = v2.RandAugment(fill=[128.0] * image.shape[0])
    options = {"interpolation": transform.interpolation, "fill": transform._fill}
    return transform._apply_image_or_video_transform(image, THEIR_NAMES[name], magnitude, **options)


def every_magnitude(ranges: str, name: str, height: int, width: int) -> np.ndarray:
    """All bins' magnitudes of an operation, with both signs where they are drawn."""
    row = list(RANGES[ranges]).index(name)
    _, table, is_signed = magnitude_table(ranges, SPACES[ranges][1], height, width)
    return np.concatenate((table[row], -table[row])) if is_signed[row] else table[row]


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("size", [(32, 32), (24, 31), (224, 160)])
def test_ranges_are_torchvisions(ranges, size):
    space, num_bins = SPACES[ranges]
    assert {THEIR_NAMES[name] for name in RANGES[ranges]} == set(space)
    numbers, table, is_signed = magnitude_table(ranges, num_bins, *size)
    for number, row, signed in zip(numbers, table, is_signed, strict=True):
        magnitudes, their_sign = space[THEIR_NAMES[OPERATIONS[number]]]
        expected = magnitudes(num_bins, *size)
        assert signed == their_sign
        assert np.array_equal(row, np.zeros(num_bins) if expected is None else expected.double().numpy())


@pytest.mark.parametrize("name", SUB_POLICIES)
def test_sub_policies_are_torchvisions(name):
    ours = [tuple((THEIR_NAMES[kind], prob, bin) for kind, prob, bin in row) for row in SUB_POLICIES[name]]
    assert ours == THEIR_POLICIES[name]._policies


def test_a_changed_sub_policy_would_be_seen():
    first, *others = SUB_POLICIES["autoaugment_cifar10"]
    changed = [(first[0], (first[1][0], 0.3, first[1][2])), *others]
    assert [tuple((THEIR_NAMES[k], p, b) for k, p, b in row) for row in changed] != THEIR_POLICIES[
        "autoaugment_cifar10"
    ]._policies


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("ranges", ["standard", "wide"])
@pytest.mark.parametrize("name", [*sorted(set(COLOUR) - {"blur"}), "identity"])
def test_colour_operations_equal_torchvisions_to_the_last_bit(name, ranges, num_channels):
    ranges = "autoaugment" if name == "invert" else ranges
    magnitudes = every_magnitude(ranges, name, 24, 31)
    images = smooth_images(len(magnitudes), num_channels)
    ours = apply_stages(images, [Stage(np.full(len(images), OPERATIONS.index(name)), magnitudes)])
    for image, result, magnitude in zip(images, ours, magnitudes.tolist(), strict=True):
        assert torch.equal(result, theirs(image, name, magnitude)), magnitude


def test_a_rounding_of_its_own_would_be_seen():
    image = smooth_images(1)[0]
    grey = tvF.rgb_to_grayscale(image)
    factors = (1 + every_magnitude("wide", "color", 24, 31)).tolist()
    plain = [(image * factor + grey * (1 - factor)).clamp(0, 255).to(torch.uint8) for factor in factors]
    pairs = zip(plain, factors, strict=True)
    assert any(not torch.equal(result, tvF.adjust_saturation(image, factor)) for result, factor in pairs)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_blur_is_torchvisions_with_a_kernel_that_reaches_as_far(num_channels):
    sigmas = torch.linspace(0.1, 2.0, 20, dtype=torch.float64)
    images = smooth_images(20, num_channels)
    expected = torch.stack([tvF.gaussian_blur(*pair, 13, sigma) for *pair, sigma in zip(images, sigmas.tolist())])
    apart = (gaussian_blur(images, sigmas).int() - expected.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.001  # where a sum lies about halfway between two numbers
    assert torch.equal(gaussian_blur(images, sigmas)[0], images[0])  # a tenth of a pixel


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (7, 6)])
def test_a_blur_of_small_images_keeps_what_is_even(size):
    images = torch.full((2, 3, *size), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(images, torch.tensor([0.5, 2.0], dtype=torch.float64)), images)
    side = min(size) - 1  # as far as the image can be mirrored
    image = smooth_images(1, height=size[0] + 23, width=size[1] + 23)[:, :, : size[0], : size[1]]
    expected = tvF.gaussian_blur(image, 2 * min(side, 6) + 1, 2.0)
    assert (gaussian_blur(image, torch.tensor([2.0], dtype=torch.float64)).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (24, 31)])
@pytest.mark.parametrize("ranges", ["standard", "wide"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operations_equal_torchvisions(name, ranges, size):
    magnitudes = every_magnitude(ranges, name, *size)
    images = torch.randint(0, 256, (len(magnitudes), 3, *size), dtype=torch.uint8)
    ours = apply_stages(images, [Stage(np.full(len(images), OPERATIONS.index(name)), magnitudes)])
    expected = torch.stack([theirs(*pair[:1], name, pair[1]) for pair in zip(images, magnitudes.tolist(), strict=True)])
    if name.startswith("translate"):
        assert torch.equal(ours, expected)
        return
    # A place halfway between two pixels has no nearest one: torchvision's matrix product and our sums, both float32,
    # then round it to different sides. Everything else is equal.
    is_halfway = halfway(torch.from_numpy(GEOMETRY[name](magnitudes, *size)), *size)[:, None].expand_as(ours)
    assert torch.equal(ours[~is_halfway], expected[~is_halfway])
    assert is_halfway.float().mean() < 0.05


def halfway(matrices: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H, W): whether a pixel's source lies within 1e-4 pixels of the middle between two, in float64."""
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None]
    is_halfway = torch.zeros(len(matrices), height, width, dtype=torch.bool)
    for row, side in ((0, width), (1, height)):
        a, b, c = matrices[:, row, :, None, None].unbind(1)
        places = a * x + b * y + c + (side - 1) / 2
        is_halfway |= ((places % 1) - 0.5).abs() < 1e-4
    return is_halfway


def test_samples_of_one_stage_do_not_disturb_each_other():
    images = smooth_images(60)
    rng = np.random.default_rng(0)
    numbers, table, _ = magnitude_table("autoaugment", 10, 24, 31)
    rows, bins = rng.integers(len(numbers), size=(2, 60)), rng.integers(10, size=(2, 60))
    stages = [Stage(numbers[row], table[row, bin]) for row, bin in zip(rows, bins, strict=True)]
    before = images.clone()
    together = apply_stages(images, stages)
    assert torch.equal(images, before)
    for index in range(60):
        single = [Stage(stage.operations[index : index + 1], stage.magnitudes[index : index + 1]) for stage in stages]
        assert torch.equal(together[index], apply_stages(images[index : index + 1], single)[0])


def test_channels_that_are_no_colours_keep_their_saturation_and_are_treated_alike():
    images, factors = smooth_images(7, num_channels=5), torch.linspace(0.1, 1.9, 7, dtype=torch.float64)
    assert torch.equal(saturation(images, factors), images)
    singly = [sharpness(images[:, channel : channel + 1], factors) for channel in range(5)]
    assert torch.equal(sharpness(images, factors), torch.cat(singly, dim=1))
    means = contrast(images, torch.zeros(7, dtype=torch.float64))
    assert torch.equal(means.flatten(1).float().amax(1), images.float().mean((1, 2, 3)).floor())


# ---------------------------------------------------------------- draws


def frequencies(stage: Stage) -> dict[str, float]:
    counts = np.bincount(stage.operations, minlength=len(OPERATIONS)) / len(stage.operations)
    return dict(zip(OPERATIONS, counts.tolist(), strict=True))


def draws_of(batch_size: int) -> Draws:
    return Draws(1, 2, batch_size, torch.arange(batch_size))


def test_randaugment_draws_its_operations_and_signs_evenly_and_apart():
    first, second = rand_augment(draws_of(14_000), 2, 9, 32, 32)
    for stage in (first, second):
        shares = frequencies(stage)
        # standard error of a share of 1/14 is 0.0022
        assert all(abs(shares[name] - 1 / 14) < 0.01 for name in RANGES["standard"])
        turns = stage.magnitudes[stage.operations == OPERATIONS.index("rotate")]
        assert np.allclose(np.abs(turns), 9.0) and abs((turns > 0).mean() - 0.5) < 0.06
    # with replacement: the same operation twice happens in one of fourteen samples
    assert abs((first.operations == second.operations).mean() - 1 / 14) < 0.01


def test_randaugments_magnitudes_may_be_drawn_around_theirs():
    plain = rand_augment(draws_of(14_000), 1, 9, 32, 32)[0]
    (stage,) = rand_augment(draws_of(14_000), 1, 9, 32, 32, 2.0)
    assert np.array_equal(stage.operations, plain.operations)  # only how strong they are is drawn besides
    assert np.array_equal(np.sign(stage.magnitudes), np.sign(plain.magnitudes))
    turns = np.abs(stage.magnitudes[stage.operations == OPERATIONS.index("rotate")])  # a degree is a bin
    assert abs(turns.mean() - 9) < 0.3 and abs(turns.std() - 2) < 0.2  # standard errors 0.06 and 0.04
    assert len(np.unique(turns)) > 900
    bits = stage.magnitudes[stage.operations == OPERATIONS.index("posterize")]
    assert np.array_equal(bits, np.rint(bits)) and len(np.unique(bits)) > 1
    for magnitude, edge in ((30, 30.0), (0, 0.0)):  # cut off at both ends: half of them lie there
        (cut,) = rand_augment(draws_of(14_000), 1, magnitude, 32, 32, 2.0)
        turns = np.abs(cut.magnitudes[cut.operations == OPERATIONS.index("rotate")])
        assert abs((turns == edge).mean() - 0.5) < 0.06 and turns.max() <= 30
    levels = np.linspace(0, 0.3, 31)
    (stage,) = rand_augment(draws_of(14_000), 1, 9, 32, 32, 0.3)
    shears = np.abs(stage.magnitudes[stage.operations == OPERATIONS.index("shear_x")])
    assert abs(shears.mean() - levels[9]) < 0.001 and shears.std() > 0.002


def test_trivialaugment_draws_its_operations_and_magnitudes_evenly():
    (stage,) = trivial_augment(draws_of(14_000), 32, 32)
    shares = frequencies(stage)
    assert all(abs(shares[name] - 1 / 14) < 0.01 for name in RANGES["wide"])
    turns = np.abs(stage.magnitudes[stage.operations == OPERATIONS.index("rotate")])
    bins = np.bincount(np.rint(turns / 4.5).astype(int), minlength=31) / len(turns)  # 135 degrees in 30 steps
    assert len(bins) == 31 and np.abs(bins - 1 / 31).max() < 0.025  # standard error 0.0056


@pytest.mark.parametrize("name", SUB_POLICIES)
def test_autoaugment_draws_sub_policies_evenly_and_operations_with_their_probabilities(name):
    for place, stage in enumerate(auto_augment(draws_of(20_000), name, 32, 32)):
        expected = dict.fromkeys(OPERATIONS, 0.0)
        for row in SUB_POLICIES[name]:
            operation, probability, _ = row[place]
            expected[operation] += probability / 25
            expected["identity"] += (1 - probability) / 25
        shares = frequencies(stage)
        # standard error of the largest share, 0.5, is 0.0035
        assert max(abs(shares[key] - expected[key]) for key in OPERATIONS) < 0.016


@pytest.mark.parametrize("name", SUB_POLICIES)
def test_both_operations_of_a_sample_come_from_one_sub_policy(name):
    stages = auto_augment(draws_of(3000), name, 32, 32)
    pairs = {tuple(kind for kind, _, _ in row) for row in SUB_POLICIES[name]}
    drawn = set(zip(*([OPERATIONS[number] for number in stage.operations] for stage in stages), strict=True))
    full = {pair for pair in drawn if "identity" not in pair}
    assert full <= pairs and len(full) > 10


def test_three_augment_is_grey_solarized_or_blurred():
    """2204.07118, section 3: each as likely, solarized from 128 on, a blur of 0.1 to 2 pixels."""
    images = smooth_images(3000)
    (stage,) = stages = three_augment(draws_of(3000))
    shares = frequencies(stage)
    # standard error 0.0086
    assert {name for name, share in shares.items() if share} == {"color", "solarize", "blur"}
    assert all(abs(shares[name] - 1 / 3) < 0.03 for name in ("color", "solarize", "blur"))
    sigmas = stage.magnitudes[stage.operations == OPERATIONS.index("blur")]
    assert 0.1 <= sigmas.min() < 0.11 and 1.99 < sigmas.max() <= 2.0 and abs(sigmas.mean() - 1.05) < 0.05
    results = apply_stages(images, stages)
    expected = {
        "color": lambda image, _: tvF.rgb_to_grayscale(image, num_output_channels=3),
        "solarize": lambda image, _: tvF.solarize(image, 128),
        "blur": lambda image, sigma: tvF.gaussian_blur(image, 13, sigma),
    }
    for index in range(60):
        name = OPERATIONS[stage.operations[index]]
        wanted = expected[name](images[index], float(stage.magnitudes[index]))
        assert (results[index].int() - wanted.int()).abs().max() <= (name == "blur"), name


@pytest.mark.parametrize("strength, low, high", [(0.3, 0.7, 1.3), (1.0, 0.0, 2.0)])
def test_colour_jitter_draws_factors_and_orders_as_torchvisions_does(strength, low, high):
    jitter = v2.ColorJitter(strength, strength, strength)
    assert jitter.brightness == jitter.contrast == jitter.saturation == (low, high)
    stages = color_jitter(draws_of(6000), strength)
    orders = np.stack([stage.operations for stage in stages], axis=1)
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == 6 and all(len(set(row)) == 3 for row in kinds.tolist())
    assert np.abs(counts / 6000 - 1 / 6).max() < 0.025  # standard error 0.0048
    factors = 1 + np.concatenate([stage.magnitudes for stage in stages])
    assert low <= factors.min() < low + 0.01 * strength and high - 0.01 * strength < factors.max() <= high
    images = smooth_images(20)
    ours = apply_stages(images, [Stage(*(part[:20] for part in stage)) for stage in stages])
    functions = {"brightness": tvF.adjust_brightness, "contrast": tvF.adjust_contrast, "color": tvF.adjust_saturation}
    for index, image in enumerate(images):
        for stage in stages:
            image = functions[OPERATIONS[stage.operations[index]]](image, 1 + float(stage.magnitudes[index]))
        assert torch.equal(ours[index], image)


def test_torchvision_still_applies_policies_the_way_the_oracle_calls_it():
    names = inspect.signature(v2.RandAugment._apply_image_or_video_transform).parameters
    assert list(names) == ["self", "image", "transform_id", "magnitude", "interpolation", "fill"]
