"""Positions: the fixed table, the rotary angles, interpolation to another image size."""

import itertools
import json

import numpy as np
import pytest
import torch
from small_vit import SMALL, build, images

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.modeling_vit_scratch import (
    interpolate_position_embeddings,
    rope2d_tables,
    rotate,
    sincos2d_positions,
)
from modeling_vit_scratch.training.run_folder import keep_positions
from modeling_vit_scratch.weights import load_pretrained


def big_vision_sincos_2d(height, width, hidden_size, temperature=10_000.0):
    """The formula of 2205.01580's code, in numpy's double precision."""
    y, x = np.mgrid[:height, :width]
    omega = np.arange(hidden_size // 4) / (hidden_size // 4 - 1)
    omega = 1.0 / temperature**omega
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


@pytest.mark.parametrize(("grid", "hidden_size"), [((3, 5), 8), ((14, 14), 192), ((1, 7), 12)])
def test_sincos2d_is_big_visions_formula(grid, hidden_size):
    expected = big_vision_sincos_2d(*grid, hidden_size)
    # float32 angles of up to 13 radians are off by up to 1e-6
    np.testing.assert_allclose(sincos2d_positions(grid, hidden_size)[0].numpy(), expected, rtol=0, atol=2e-6)


def test_sincos2d_of_the_narrowest_network_is_finite():
    assert torch.isfinite(sincos2d_positions((2, 3), 4)).all()


def test_sincos2d_positions_are_added_to_patches_only():
    with_table, without = (
        build(position_embedding_type=kind, num_register_tokens=1).vit.embeddings(images())
        for kind in ("sincos2d", "none")
    )
    difference = with_table - without
    assert torch.equal(difference[:, :2], torch.zeros(3, 2, 32))
    table = sincos2d_positions((4, 4), 32).expand(3, -1, -1)
    torch.testing.assert_close(difference[:, 2:], table, rtol=0, atol=1e-6)  # one addition and one subtraction


@pytest.mark.parametrize("image_size", [(40, 32), (24, 48)])
def test_at_another_size_fixed_positions_cover_the_same_range(image_size):
    """The coarse grid's centres stay where they were: a grid twice as fine has them half way between its own."""
    config = ViTScratchConfig(**{**SMALL, "image_size": image_size, "position_embedding_type": "rope2d"})
    rows, columns = config.patch_grid
    coarse = torch.atan2(*reversed(rope2d_tables(config, (rows, columns))))[1:].unflatten(0, (rows, columns))
    fine = torch.atan2(*reversed(rope2d_tables(config, (2 * rows, 2 * columns))))[1:].unflatten(
        0, (2 * rows, 2 * columns)
    )
    means = (fine[::2, ::2] + fine[1::2, 1::2]) / 2
    slow = [1, 3]  # the second frequency of rows and of columns: slow enough not to wrap around at pi
    torch.testing.assert_close(means[..., slow], coarse[..., slow], rtol=0, atol=1e-5)


ROPE = ViTScratchConfig(
    **{**SMALL, "image_size": (24, 40), "head_dim": 12, "num_register_tokens": 2, "position_embedding_type": "rope2d"}
)


def test_rope2d_scores_depend_only_on_the_difference_of_coordinates():
    tables = rope2d_tables(ROPE, (3, 5))
    query, key = images(2, 12).split(1)
    tokens = 3 + 15
    scores = (rotate(query.expand(1, 1, tokens, 12), tables) @ rotate(key.expand(1, 1, tokens, 12), tables).mT)[0, 0]
    scores = scores[3:, 3:]  # patches
    coordinates = list(itertools.product(range(3), range(5)))
    by_difference = {}
    for (i, (row, column)), (j, (other_row, other_column)) in itertools.product(enumerate(coordinates), repeat=2):
        by_difference.setdefault((row - other_row, column - other_column), []).append(scores[i, j].item())
    assert len(by_difference) == 5 * 9
    spread = max(max(values) - min(values) for values in by_difference.values())
    assert spread < 1e-5  # float32 sums of 12 products of size 1
    distinct = sorted(values[0] for values in by_difference.values())
    assert min(np.diff(distinct)) > 1e-5  # and every difference has a score of its own: rows and columns both count


def test_rope2d_leaves_prefix_tokens_and_norms_alone():
    states = images(2, 4, 3 + 15, 12)
    turned = rotate(states, rope2d_tables(ROPE, (3, 5)))
    assert torch.equal(turned[:, :, :3], states[:, :, :3])
    assert torch.equal(turned[:, :, 3], states[:, :, 3])  # the patch at row 0, column 0
    assert (turned[:, :, 4:] - states[:, :, 4:]).abs().amax((0, 1, 3)).min() > 0.1
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))


def test_rope2d_turns_by_the_frequencies_of_2403_13298():
    """theta_t = 100^(-t / (F/4)), t = 0..F/4-1, for rows and for columns alike (section 3.2)."""
    frequencies = 100.0 ** -(np.arange(3) / 3)
    cos, sin = rope2d_tables(ROPE, (3, 5))
    for row, column in itertools.product(range(3), range(5)):
        angles = np.concatenate((row * frequencies, column * frequencies))
        angles = np.concatenate((angles, angles))
        np.testing.assert_allclose(cos[3 + row * 5 + column], np.cos(angles), rtol=0, atol=1e-6)
        np.testing.assert_allclose(sin[3 + row * 5 + column], np.sin(angles), rtol=0, atol=1e-6)


def test_rotary_attention_is_that_of_queries_and_keys_turned_in_the_complex_plane():
    """Re(q e^ia conj(k e^ib)), summed over pairs of channels and divided by the root of the head's width."""
    torch.manual_seed(0)
    model = ViTScratchModel(ROPE).eval()
    model.set_attn_implementation("eager")
    pixel_values = images(1, 3, 24, 40)
    weights = model(pixel_values, output_attentions=True).attentions[0][0].detach().numpy()

    layer = model.layers[0]
    states = layer.layernorm_before(model.embeddings(pixel_values))[0]
    frequencies = 100.0 ** -(np.arange(3) / 3)
    rows, columns = (axis.ravel()[:, None] * frequencies for axis in np.mgrid[:3, :5])
    angles = np.concatenate((np.zeros((3, 6)), np.concatenate((rows, columns), axis=1)))
    turned = []
    for projection in (layer.attention.q_proj, layer.attention.k_proj):
        channels = projection(states).detach().double().numpy().reshape(18, 4, 12)
        turned.append((channels[..., :6] + 1j * channels[..., 6:]) * np.exp(1j * angles)[:, None])
    scores = np.exp(np.einsum("ihc,jhc->hij", turned[0], turned[1].conj()).real / np.sqrt(12))
    # float32 against double precision
    np.testing.assert_allclose(weights, scores / scores.sum(2, keepdims=True), rtol=1e-4, atol=1e-6)


def test_interpolation_to_the_same_grid_gives_the_same_object():
    table = images(1, 1 + 12, 8)
    assert interpolate_position_embeddings(table, (3, 4), (3, 4)) is table


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_interpolation_leaves_prefix_positions_untouched(num_prefix, antialias):
    table = images(1, num_prefix + 12, 8)
    resampled = interpolate_position_embeddings(table, (3, 4), (7, 5), antialias)
    assert resampled.shape == (1, num_prefix + 35, 8)
    assert torch.equal(resampled[:, :num_prefix], table[:, :num_prefix])


def test_interpolation_of_a_constant_grid_is_that_constant():
    table = torch.full((1, 1 + 12, 8), 0.7)
    torch.testing.assert_close(interpolate_position_embeddings(table, (3, 4), (9, 2)), torch.full((1, 19, 8), 0.7))


def test_interpolation_keeps_the_kind_of_numbers():
    table = images(1, 13, 8).to(torch.bfloat16)
    assert interpolate_position_embeddings(table, (3, 4), (6, 8)).dtype is torch.bfloat16


def test_positions_that_do_not_fill_the_old_grid_are_refused():
    with pytest.raises(ValueError, match="10 positions do not fill a grid of 3 x 4 patches"):
        interpolate_position_embeddings(images(1, 10, 8), (3, 4), (6, 8))


@pytest.mark.parametrize("position_embedding_type", ["learned", "sincos2d", "rope2d", "none"])
def test_asking_for_interpolation_at_the_same_size_changes_nothing(position_embedding_type):
    model = build(position_embedding_type=position_embedding_type)
    assert torch.equal(model(images()).logits, model(images(), interpolate_pos_encoding=True).logits)


# ---------------------------------------------------------------- a checkpoint at another size


@pytest.mark.parametrize("kind", ["learned", "sincos2d", "rope2d"])
def test_a_checkpoint_for_another_size_is_the_network_that_interpolates(kind, tmp_path):
    """... whatever its positions are, after a second saving too; at its own size again it is as it was."""
    model = build(position_embedding_type=kind, initializer_range=0.2, num_register_tokens=1)
    model.save_pretrained(tmp_path / "own")
    for size in ((64, 64), (16, 48)):
        pixels = images(2, 3, *size)
        with torch.no_grad():
            expected = model(pixels, interpolate_pos_encoding=True).logits
        loaded, report = load_pretrained(str(tmp_path / "own"), image_size=size)
        assert len(report.interpolated) == 1 and expected.std() > 1e-2
        loaded.save_pretrained(tmp_path / "again")
        for other in (loaded, ViTScratchForImageClassification.from_pretrained(tmp_path / "again")):
            assert other.config.image_height_width == size
            with torch.no_grad():
                torch.testing.assert_close(other(pixels).logits, expected)
    if kind != "learned":  # whose table has been resampled
        back, _ = load_pretrained(str(tmp_path / "again"), image_size=32)
        assert back.config.position_image_size is None
        with torch.no_grad():
            torch.testing.assert_close(back(images()).logits, model(images()).logits, rtol=0, atol=0)


def test_a_configuration_for_another_size_spans_the_saved_one(tmp_path):
    """... for who loads it by itself, as a repository's own code is loaded without this package."""
    for kind, spanned in (("rope2d", 32), ("sincos2d", 32), ("learned", None)):
        build(position_embedding_type=kind).config.save_pretrained(tmp_path / kind)
        config = ViTScratchConfig.from_pretrained(tmp_path / kind, image_size=64)
        assert config.position_image_size == spanned and config.patch_grid == (8, 8)
        config.save_pretrained(tmp_path / "again")
        assert ViTScratchConfig.from_pretrained(tmp_path / "again").position_image_size == spanned
        assert ViTScratchConfig.from_pretrained(tmp_path / "again", image_size=96).position_image_size == spanned
        assert ViTScratchConfig.from_pretrained(tmp_path / "again", image_size=32).position_image_size is None


def test_a_run_goes_on_with_the_positions_of_its_checkpoint(tmp_path):
    """Those of older versions spanned the new size."""
    config = ViTScratchConfig(
        **{**SMALL, "position_embedding_type": "rope2d", "position_image_size": 32, "image_size": 64}
    )
    for saved in ({}, {"position_image_size": 48}):
        (tmp_path / "config.json").write_text(json.dumps(saved))
        keep_positions(config, tmp_path)
        assert config.position_image_size == saved.get("position_image_size")
    keep_positions(config, None)
    assert config.position_image_size == 48


def test_positions_of_a_table_span_nothing():
    with pytest.raises(ValueError, match="position_image_size has no effect with position_embedding_type 'learned'"):
        ViTScratchConfig(position_image_size=32)


def test_a_size_of_positions_is_checked_as_that_of_images():
    with pytest.raises(ValueError, match="position_image_size: a height of 33 .* nearest sizes that are: 32 and"):
        ViTScratchConfig(image_size=32, patch_size=8, position_embedding_type="rope2d", position_image_size=33)
