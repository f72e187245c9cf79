"""Maps of attention over the images that they are of, as a picture; and every head of every layer of one image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .augmentation_grid import pixels_of
from .plots import LIGHT, Theme, name_of, png_bytes

PANEL_INCHES = 2.2
SMALL_PANEL_INCHES = 0.75
TITLE_INCHES = 0.5
LETTERS_AN_INCH = 13  # of a title
DIMMEST = 0.12  # the brightness left where there is no attention


@dataclass(frozen=True)
class AttendedImage:
    """A file's image as the network saw it, uint8 (C, H, W), the class it gave, and the attention on each patch
    (Gh, Gw)."""

    name: str
    answer: str
    pixels: np.ndarray
    patches: np.ndarray

    @property
    def caption(self) -> str:
        """The name and the answer, each shortened, and escaped where matplotlib's font cannot write it."""
        return f"{name_of(self.name)}: {name_of(self.answer)}"


def write_attention_picture(path: str | Path, title: str, images: Sequence[AttendedImage]) -> Path:
    """The path of the PNG it writes: each image, the image as bright as the attention on it, and the map itself."""
    return _write(path, attention_figure(title, images, LIGHT))


def write_heads_picture(path: str | Path, title: str, image: AttendedImage, heads: np.ndarray) -> Path:
    """The path of the PNG it writes: the image, then a row of maps for each layer. heads: (layers, A, Gh, Gw)."""
    return _write(path, heads_figure(title, image, heads, LIGHT))


def _write(path: str | Path, figure: Figure) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(figure))
    return path


def attention_figure(title: str, images: Sequence[AttendedImage], theme: Theme) -> Figure:
    """A row of three panels an image. Maps are coloured from 0 to the highest share of a patch of their own image."""
    figure = _figure((3.5 * PANEL_INCHES, (PANEL_INCHES + 0.3) * len(images) + TITLE_INCHES), title, theme)
    axes = figure.subplots(len(images), 3, squeeze=False)
    for (plain, dimmed, heat), image in zip(axes, images, strict=True):
        pixels = pixels_of(image.pixels)
        height, width = pixels.shape[:2]
        show(plain, pixels, theme)
        show(dimmed, lit(pixels, image.patches), theme)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        drawn = show(heat, image.patches, theme, cmap="magma", vmin=0, vmax=image.patches.max(), extent=extent)
        bar = figure.colorbar(drawn, ax=heat, shrink=0.85, pad=0.03, format=PercentFormatter(1))
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=theme.muted, labelsize=7, length=0)
        plain.set_xlabel(image.caption, fontsize=7, color=theme.text, loc="left", parse_math=False)
    for panel, head in zip(axes[0], ("as the network sees it", "as bright as its attention", "share of each patch")):
        panel.set_title(head, fontsize=8, color=theme.muted, loc="left")
    return figure


def heads_figure(title: str, image: AttendedImage, heads: np.ndarray, theme: Theme) -> Figure:
    """The image, and to its right a row a layer of the maps of its heads, each coloured from 0 to its own highest."""
    num_layers, num_heads = heads.shape[:2]
    side = SMALL_PANEL_INCHES
    size = (PANEL_INCHES + side * (num_heads + 1), max(side * num_layers, PANEL_INCHES) + TITLE_INCHES + 0.2)
    figure = _figure(size, title, theme)
    left, right = figure.subfigures(1, 2, width_ratios=(PANEL_INCHES, side * (num_heads + 1)))
    plain = left.subplots()
    show(plain, pixels_of(image.pixels), theme)
    plain.set_xlabel(image.caption, fontsize=7, color=theme.text, loc="left", parse_math=False)
    axes = right.subplots(num_layers, num_heads, squeeze=False)
    for layer, row in enumerate(axes):
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=7, color=theme.muted)
        for head, panel in enumerate(row):
            show(panel, heads[layer, head], theme, cmap="magma", vmin=0)
            if layer == 0:
                panel.set_title(f"head {head + 1}", fontsize=7, color=theme.muted)
    return figure


def _figure(size: tuple[float, float], title: str, theme: Theme) -> Figure:
    width = max(size[0], math.ceil(len(title) / LETTERS_AN_INCH))
    figure = Figure(figsize=(width, size[1]), facecolor=theme.background, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=theme.text, parse_math=False)
    return figure


def show(axes: Axes, pixels: np.ndarray, theme: Theme, **style):
    """Draws an image, or with `style` a map, without ticks; what matplotlib drew."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(theme.grid)
    return axes.imshow(pixels, **(style or {"cmap": "gray", "vmin": 0, "vmax": 255}), interpolation="nearest")


def lit(pixels: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3), as bright as the attention on their patch (Gh, Gw)."""
    shares = patches / max(patches.max(), np.finfo(np.float32).tiny)
    light = enlarged(shares, *pixels.shape[:2])
    light = light if pixels.ndim == 2 else light[..., None]
    return (pixels * (DIMMEST + (1 - DIMMEST) * light)).round().astype(np.uint8)


def enlarged(patches: np.ndarray, height: int, width: int) -> np.ndarray:
    """The map (Gh, Gw) with each patch as large as it is in the image: (H, W)."""
    rows = np.arange(height) * patches.shape[0] // height
    columns = np.arange(width) * patches.shape[1] // width
    return patches[rows][:, columns]
