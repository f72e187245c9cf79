"""Images with what a model says of them, as a picture: right and wrong told apart without colour too."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..data.decoding import open_image
from ..data.examples import Example
from ..image_processing_vit_scratch import pil_to_channels
from .plots import LIGHT, Theme, name_of, png_bytes
from .prediction import Prediction

MOST_IMAGES = 64
MOST_WITH_BARS = 8  # up to here each image has the bars of its most probable classes beside it
MOST_BARS = 5  # of an image
PANEL_INCHES = 1.5
LINE_INCHES = 0.17  # of text
LETTER_INCHES = 0.1  # of the title, whose every letter finds room
BARS_INCHES = 2.3  # a row of bars with their names
SHOWN_PIXELS = 256  # an image is shrunk to fit into a square of these before it is drawn
# green and vermilion of Okabe and Ito stay apart for colour-blind eyes; the mark and the broken frame for all
RIGHT, WRONG = ("#009e73", "\N{CHECK MARK}", "solid"), ("#d55e00", "\N{BALLOT X}", (0, (4, 2)))


def write_prediction_grid(path: str | Path, title: str, predictions: Sequence[Prediction]) -> Path:
    """The path of the PNG it writes: the first 64 of the predictions that have an answer, with bars where they are few.

    Raises ValueError where none has one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(grid_figure(title, predictions, LIGHT)))
    return path


def grid_figure(title: str, predictions: Sequence[Prediction], theme: Theme) -> Figure:
    """The picture: each image as its file shows it, a mark, the answer, and the target where it is known."""
    drawn = [prediction for prediction in predictions if prediction.error is None][:MOST_IMAGES]
    if not drawn:
        raise ValueError("A picture of predictions needs one image at least that could be read; none came.")
    has_bars = len(drawn) <= MOST_WITH_BARS
    most_columns = 2 if has_bars else 8
    num_columns = min(len(drawn), most_columns if len(drawn) > 4 or not has_bars else 1)
    num_rows = math.ceil(len(drawn) / num_columns)
    num_lines = 3 if any(prediction.target is not None for prediction in drawn) else 2
    cell = (PANEL_INCHES + (BARS_INCHES if has_bars else 0.1), PANEL_INCHES + LINE_INCHES * num_lines + 0.12)
    top = 0.45
    size = (max(cell[0] * num_columns, LETTER_INCHES * len(title)) + 0.1, cell[1] * num_rows + top)
    figure = Figure(figsize=size, facecolor=theme.background)
    figure.text(0.1 / size[0], 1 - 0.1 / size[1], title, ha="left", va="top", fontsize=11, fontweight="bold",
                color=theme.text, parse_math=False)  # fmt: skip
    for place, prediction in enumerate(drawn):
        row, column = divmod(place, num_columns)
        left, bottom = 0.1 + column * cell[0], size[1] - top - (row + 1) * cell[1] + LINE_INCHES * num_lines + 0.12
        box = (left / size[0], bottom / size[1], (PANEL_INCHES - 0.1) / size[0], PANEL_INCHES / size[1])
        draw_image(figure.add_axes(box), prediction, theme)
        if has_bars:
            side = ((left + PANEL_INCHES + 0.05) / size[0], box[1], (BARS_INCHES - 0.45) / size[0], box[3])
            draw_bars(figure.add_axes(side), prediction, theme)
    return figure


def draw_image(axes: Axes, prediction: Prediction, theme: Theme):
    """The image in a frame that says right or wrong, and below it the mark, the answer and the target."""
    axes.imshow(thumbnail(prediction.path), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    colour, mark, line = (theme.muted, "", "solid")
    if prediction.is_right is not None:
        colour, mark, line = RIGHT if prediction.is_right else WRONG
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.0 if not mark else 2.2, linestyle=line)
    style = {"ha": "center", "va": "top", "xycoords": "axes fraction", "textcoords": "offset points"}
    lines = caption(prediction)
    for place, text in enumerate(lines):
        axes.annotate(
            f"{mark} {text}" if mark and place == 0 else text, (0.5, 0), (0, -4 - 72 * LINE_INCHES * place),
            fontsize=9 if place == 0 else 8, fontweight="bold" if place == 0 else "normal",
            color=colour if mark and place == 0 else theme.text if place == 0 else theme.muted,
            annotation_clip=False, parse_math=False, **style,
        )  # fmt: skip


def caption(prediction: Prediction) -> list[str]:
    """The lines below an image: the answer, the probability of the most probable class, the target where known."""
    first = name_of(prediction.labels[0])
    answer = ", ".join(map(name_of, prediction.answer)) or "none"
    share = f"{100 * prediction.probabilities[0]:.1f}%"
    lines = [answer if len(answer) <= 20 else f"{answer[:19]}…", share if answer == first else f"{first} {share}"]
    return [*lines, *([f"target {name_of(prediction.target)}"] if prediction.target is not None else [])]


def draw_bars(axes: Axes, prediction: Prediction, theme: Theme):
    """The most probable classes as bars from 0 to 1, best on top, each below its name; the target's is green."""
    axes.set_axis_off()
    labels, shares = prediction.labels[:MOST_BARS], prediction.probabilities[:MOST_BARS]
    target = [label == prediction.target for label in labels]
    axes.barh(range(len(labels)), [1] * len(labels), height=0.32, color=theme.grid)
    axes.barh(range(len(labels)), shares, height=0.32, color=[RIGHT[0] if t else theme.training for t in target])
    axes.set(xlim=(0, 1), ylim=(MOST_BARS - 0.6, -0.75))
    for place, (label, share) in enumerate(zip(labels, shares, strict=True)):
        weight = "bold" if target[place] else "normal"
        style = {"va": "bottom", "fontsize": 7, "color": theme.text, "fontweight": weight, "parse_math": False}
        axes.text(0, place - 0.18, name_of(label), ha="left", **style)
        axes.text(1, place - 0.18, f"{100 * share:.1f}%", ha="right", **style)


def thumbnail(path: str) -> Image.Image:
    """The file's picture, upright, as RGB, small; a picture of few pixels as it is."""
    image = pil_to_channels(open_image(Example(path, None, path)), 3)
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return image
