"""A grid of images with a caption under each: what augmentation makes of a few of them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .plots import LIGHT, Theme, name_of, png_bytes

Panel = tuple[np.ndarray, str]  # a uint8 image (H, W, C), (C, H, W) or (H, W), and its caption

PANEL_INCHES = 1.15
LINE_INCHES = 0.13  # of a caption
LONGEST_LINE = 16  # letters of a caption that fit under an image
TITLE_LETTER_INCHES, TITLE_LINE_INCHES = 0.095, 0.17


def write_augmentation_grid(path: str | Path, title: str, rows: Sequence[Sequence[Panel]]) -> Path:
    """The path of the PNG it writes: a row of panels for each of `rows`, the first one the originals.

    Raises ValueError where there is no panel or an image has not two or three axes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(grid_figure(title, rows, LIGHT)))
    return path


def grid_figure(title: str, rows: Sequence[Sequence[Panel]], theme: Theme) -> Figure:
    """The picture: panels of one size, captions below them, the first row set apart from the others by a line."""
    num_columns = max((len(row) for row in rows), default=0)
    if not num_columns:
        raise ValueError("A grid of images needs one image at least; none came.")
    num_lines = max(caption_lines(caption).count("\n") + 1 for row in rows for _, caption in row)
    height, width = pixels_of(rows[0][0][0]).shape[:2]
    panel_height = PANEL_INCHES * min(max(height / width, 0.5), 2.0) + LINE_INCHES * (num_lines + 0.6)
    picture_width = max(PANEL_INCHES * num_columns * 1.08, 3.5)
    title_lines = textwrap.wrap(title, int(picture_width / TITLE_LETTER_INCHES))
    top = 0.25 + TITLE_LINE_INCHES * max(1, len(title_lines))
    size = (picture_width, panel_height * len(rows) + top)
    figure = Figure(figsize=size, facecolor=theme.background)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - top / size[1], bottom=LINE_INCHES * (num_lines + 0.6) / size[1], wspace=0.08,
        hspace=LINE_INCHES * (num_lines + 0.8) / (panel_height - LINE_INCHES * (num_lines + 0.8)),
    )  # fmt: skip
    figure.suptitle("\n".join(title_lines), x=0.01, y=1 - 0.08 / size[1], ha="left", va="top", fontsize=10,
                    fontweight="bold", color=theme.text, parse_math=False)  # fmt: skip
    for place, row in enumerate(rows):
        for column, (image, caption) in enumerate(row):
            axes = figure.add_subplot(len(rows), num_columns, place * num_columns + column + 1)
            pixels = pixels_of(image)
            # a small image's pixels stay squares: smoothing would hide what an operation did to them
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if len(pixels) < 64 else None)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(theme.training if place == 0 else theme.grid)
                spine.set_linewidth(1.6 if place == 0 else 0.8)
            axes.set_xlabel(caption_lines(caption), fontsize=7, labelpad=2, parse_math=False,
                            color=theme.text if place == 0 else theme.muted)  # fmt: skip
    return figure


def pixels_of(image: np.ndarray) -> np.ndarray:
    """The image as matplotlib takes it: (H, W, 3), or (H, W) for grey and, as their mean, for other channels."""
    image = np.asarray(image)
    if image.ndim not in (2, 3):
        raise ValueError(f"An image has two or three axes, got the shape {image.shape}.")
    if image.ndim == 3 and (image.shape[0] in (1, 3) or image.shape[2] > min(4, image.shape[0])):
        image = image.transpose(1, 2, 0)  # (C, H, W): channels first
    if image.ndim == 3 and image.shape[2] != 3:
        image = image.mean(axis=2)
    return image


def caption_lines(caption: str) -> str:
    """The caption broken at its spaces into lines that fit under an image."""
    lines: list[str] = []
    for word in map(name_of, caption.split()):
        if lines and len(lines[-1]) + 1 + len(word) <= LONGEST_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
