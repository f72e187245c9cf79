"""The grid of augmented images: a panel an image, a caption under each, in one PNG file."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling_vit_scratch.results.augmentation_grid import (
    caption_lines,
    grid_figure,
    pixels_of,
    write_augmentation_grid,
)
from modeling_vit_scratch.results.plots import LIGHT

RNG = np.random.default_rng(0)


def rows_of(num_rows: int, num_columns: int, shape: tuple[int, ...] = (3, 8, 10)) -> list[list]:
    return [
        [(RNG.integers(0, 256, shape, dtype=np.uint8), f"row {row} image {column}") for column in range(num_columns)]
        for row in range(num_rows)
    ]


def test_each_image_is_a_panel_with_its_caption():
    rows = rows_of(3, 4)
    figure = grid_figure("a title with a $", rows, LIGHT)
    panels = [panel for row in rows for panel in row]
    assert len(figure.axes) == len(panels) == 12
    for axes, (image, caption) in zip(figure.axes, panels, strict=True):
        assert axes.get_xlabel().replace("\n", " ") == caption
        assert np.array_equal(axes.images[0].get_array(), image.transpose(1, 2, 0))
    assert figure.get_suptitle() == "a title with a $"


@pytest.mark.parametrize("num_columns", [1, 6, 8])
def test_a_long_title_keeps_within_the_picture_and_above_the_images(num_columns):
    title = "train: policy three_augment, random resized crop from 0.25, flip 0.5, vertical flip 0.5, colour jitter 0.3"
    figure = grid_figure(title, rows_of(2, num_columns), LIGHT)
    figure.draw_without_rendering()
    extent = figure._suptitle.get_window_extent()
    assert figure.get_suptitle().replace("\n", " ") == title
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    assert extent.y0 >= max(axes.bbox.y1 for axes in figure.axes)


def test_rows_may_be_of_different_lengths():
    rows = [*rows_of(1, 2), *rows_of(2, 4)]
    assert len(grid_figure("", rows, LIGHT).axes) == 10


def test_a_png_is_written_into_a_folder_that_need_not_be_there(tmp_path):
    path = write_augmentation_grid(tmp_path / "pictures" / "grid.png", "flip", rows_of(2, 3))
    picture = Image.open(io.BytesIO(path.read_bytes()))
    assert path.name == "grid.png" and picture.format == "PNG" and min(picture.size) > 200
    assert np.asarray(picture.convert("L")).std() > 20  # not an empty sheet


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 8, 10), (8, 10, 3)),
        ((8, 10, 3), (8, 10, 3)),
        ((1, 8, 10), (8, 10)),
        ((8, 10, 1), (8, 10)),
        ((8, 10), (8, 10)),
        ((2, 8, 10), (8, 10)),
        ((8, 10, 2), (8, 10)),
        ((5, 8, 10), (8, 10)),
    ],
)
def test_channels_may_come_first_or_last(shape, expected):
    assert pixels_of(np.zeros(shape, dtype=np.uint8)).shape == expected


def test_long_captions_are_broken_and_unwritable_words_replaced():
    assert caption_lines("cat 0.70 + dog 0.30") == "cat 0.70 + dog\n0.30"
    assert max(map(len, caption_lines("antidisestablishmentarianism 0.5").split("\n"))) <= 20
    assert caption_lines("猫 0.70") == r"\u732b 0.70"  # as predict's grid and the maps of attention write it
    assert caption_lines("cat 0.70 + 猫 0.30") == "cat 0.70 +\n\\u732b 0.30"
    assert caption_lines("猫" * 20).startswith(r"\u732b\u732b")


def test_no_image_and_an_odd_shape_are_refused():
    with pytest.raises(ValueError, match="one image at least"):
        grid_figure("", [], LIGHT)
    with pytest.raises(ValueError, match="two or three axes"):
        grid_figure("", [[(np.zeros(3, dtype=np.uint8), "")]], LIGHT)
