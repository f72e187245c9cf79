"""The parts of report.html that show images: those to look at, the network's attention, and its first weights."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from .attention import queries_of
from .attention_picture import lit
from .augmentation_grid import pixels_of
from .examined import EVENLY_SPACED, HIGHEST_LOSS, LEAST_CONFIDENT, Examination
from .record import RunRecord, judged_split
from .report_html import Section, cells, framed_table, note, row_header, share_cell, table_row, text
from .summary import summarise

LONGEST_SIDE = 192  # pixels of an image in the page; larger ones are shrunk
SMALL_SIDE = 64  # images up to here are shown as their pixels are, without smoothing
MOST_ROWS_COMPARED = 14  # of positions; larger grids are shown at evenly spaced ones
FILTERS_A_ROW = 7


def hardest_section(run: RunRecord, found: Examination) -> Section | None:
    """The images with the highest loss and those with the least confidence, with labels and answers."""
    split = judged_split(run.results.get("examples"))
    if split is None or not found.images:
        return None
    examples = run.results["examples"][split]
    texts = {
        HIGHEST_LOSS: ("The highest loss", "Mistakes made with confidence: look for wrong labels here first."),
        LEAST_CONFIDENT: ("The least confidence", "Images of which the network is unsure, right or wrong."),
    }
    parts = []
    for kind, (title, comment) in texts.items():
        shots = "".join(shot(run, found, split, row) for row in examples[kind])
        parts.append(f'<h3>{title}</h3>{note(comment)}<div class="shots">{shots}</div>')
    return Section("images", f"Images to look at ({split} split)", "".join(parts))


def shot(run: RunRecord, found: Examination, split: str, row: dict[str, Any]) -> str:
    """An image with its label, the network's answer, its confidence and its loss."""
    label, answer = classes_text(run, row["label"]), classes_text(run, row["answer"])
    said = f"is <b>{text(label)}</b>, recognised" if row["label"] == row["answer"] else (
        f"is <b>{text(label)}</b>, taken for <b>{text(answer)}</b>")  # fmt: skip
    numbers = f"{100 * row['confidence']:.1f}% sure<br/>loss {row['loss']:.3f}"
    alt = f"{split} image {row['sample']:,}: is {label}, answered {answer}"
    name = text(found.names[row["sample"]])
    picture = image_tag(pixels_of(found.images[row["sample"]]), alt)
    return (
        f'<figure>{picture}<figcaption>{said}<br/>{numbers}<br/><span class="lead">{name}</span></figcaption></figure>'
    )


def classes_text(run: RunRecord, ids: int | list[int]) -> str:
    """The names of one class or of several."""
    ids = [ids] if isinstance(ids, int) else ids
    return ", ".join(run.class_names[index] for index in ids) or "no class"


def attention_section(run: RunRecord, found: Examination) -> Section | None:
    """Some images of the split beside their attention rollout."""
    split = judged_split(run.results.get("examples"))
    if split is None or found.config is None or not found.attention:
        return None
    figures = []
    for row in run.results["examples"][split][EVENLY_SPACED]:
        patches, pixels = found.attention[row["sample"]], pixels_of(found.images[row["sample"]])
        label, answer = classes_text(run, row["label"]), classes_text(run, row["answer"])
        said = f"is {label}, " + ("recognised" if row["label"] == row["answer"] else f"taken for {answer}")
        share = f"the brightest patch has {100 * patches.max():.1f}% of the attention"
        seen = image_tag(lit(pixels, patches), f"Attention rollout over it: {share}")
        plain = image_tag(pixels, f"{split} image {row['sample']:,}: {said}")
        figures.append(f"<figure><div>{plain}{seen}</div><figcaption>{text(said)}; {share}</figcaption></figure>")
    comment = (
        f"Attention rollout (Abnar and Zuidema, 2005.00928): how much of each patch reaches "
        f"{queries_of(found.config)}. Each image is shown as bright as that, its brightest patch in full. The images "
        "are evenly spaced over the split."
    )
    return Section(
        "attention", f"Where the network looks ({split} split)",
        f'{note(comment)}<div class="shots pairs">{"".join(figures)}</div>',
    )  # fmt: skip


def weights_section(found: Examination) -> Section | None:
    """The first principal components of the patch filters, and how alike learned positions are."""
    if found.config is None:
        return None
    parts = []
    if found.filters is not None and found.config.num_channels in (1, 3):
        count = len(found.filters)
        comment = (
            f"The first {count} principal components of the patch projection's {found.config.hidden_size} filters, "
            f"each as strong as it can be shown, grey is no weight; {100 * found.filters_share:.1f}% of the filters' "
            "squared length lies in them. Smooth waves and edges are learned, noise is not yet."
        )
        largest = np.abs(found.filters).max(axis=(1, 2, 3), keepdims=True)
        tiles = np.round(127.5 + 127.5 * found.filters / largest).astype(np.uint8).transpose(0, 2, 3, 1)
        alt = f"{count} patch filters of {tiles.shape[1]} x {tiles.shape[2]} pixels"
        picture = image_tag(mosaic(tiles, min(count, FILTERS_A_ROW)), alt)
        parts.append(f'<div><h3>Patch filters</h3>{note(comment)}<figure class="mosaic">{picture}</figure></div>')
    if found.similarities is not None:
        parts.append(positions_part(found.similarities))
    else:
        kind = found.config.position_embedding_type
        parts.append(
            f"<div><h3>Positions</h3>{note(f'Positions are not learned here ({kind}): nothing to compare.')}</div>"
        )
    return Section("weights", "What the first weights have learned", f'<div class="columns">{"".join(parts)}</div>')


def positions_part(similarities: np.ndarray) -> str:
    """A map for each patch (of large grids, for some): how like its position each other one is."""
    rows, columns = (
        np.linspace(0, side - 1, min(side, MOST_ROWS_COMPARED)).round().astype(int) for side in similarities.shape[:2]
    )
    maps = similarities[rows][:, columns].reshape(len(rows) * len(columns), *similarities.shape[2:])
    low = float(similarities.min())
    shares = (maps - low) / max(1.0 - low, 1e-9)
    tiles = np.round(255 * matplotlib.colormaps["viridis"](np.clip(shares, 0, 1))[..., :3]).astype(np.uint8)
    height, width = similarities.shape[:2]
    comment = (
        f"Cosine similarity of the learned positions of the {height} x {width} patches: the small map at a place "
        f"compares its position with all others, from {low:.2f} (dark) to 1 (bright). Neighbours that are alike say "
        "that the network has learned the plane."
    )
    picture = image_tag(mosaic(tiles, len(columns)), f"{len(maps)} maps of {height} x {width} similarities")
    return f'<div><h3>Learned positions</h3>{note(comment)}<figure class="mosaic">{picture}</figure></div>'


def parameters_section(found: Examination) -> Section | None:
    """The parameters of each part of the network, and what an image costs."""
    if found.config is None:
        return None
    rows = summarise(found.config)
    total, flops = sum(row.num_parameters for row in rows), sum(row.flops for row in rows)
    body = [
        table_row(
            [
                row_header(row.name or "(the model itself)"),
                *cells("td", [f"{row.count:,}", " x ".join(map(str, row.shape_out)), f"{row.num_parameters:,}"], 0),
                share_cell(row.num_parameters / total),
            ]
        )
        for row in rows
        if row.num_parameters
    ]
    comment = (
        f"{total:,} parameters, {4 * total / 1024**2:,.1f} MiB in float32; {flops / 1e6:,.1f} MFLOP an image, forward "
        "(a multiplication with its addition is 2). Layers that are alike share a row."
    )
    found_table = framed_table(body, ["Part", "Times", "Shape out", "Parameters", "Share"])
    return Section("parameters", "Parameters by layer", f"{note(comment)}{found_table}")


# ---------------------------------------------------------------- pictures


def mosaic(tiles: Sequence[np.ndarray], num_columns: int) -> np.ndarray:
    """Tiles (n, h, w, 1 or 3) side by side with a see-through pixel between them: (H, W, 4)."""
    tiles = np.asarray(tiles)
    count, height, width, channels = tiles.shape
    num_rows = math.ceil(count / num_columns)
    sheet = np.zeros((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, 4), dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (height + 1) * (index // num_columns), (width + 1) * (index % num_columns)
        sheet[top : top + height, left : left + width, :3] = np.broadcast_to(tile, (height, width, 3))
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet


def image_tag(pixels: np.ndarray, alt: str) -> str:
    """The pixels, uint8 (H, W) or (H, W, 3 or 4), as an image within the page: small ones exactly, others as JPEG."""
    image = Image.fromarray(pixels.round().astype(np.uint8))
    is_small, is_see_through = max(image.size) <= SMALL_SIDE, image.mode == "RGBA"
    buffer = io.BytesIO()
    if is_small or is_see_through:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        image.save(buffer, "JPEG", quality=88)
    kind = "png" if is_small or is_see_through else "jpeg"
    css_class = ' class="pixels"' if is_small or is_see_through else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{css_class} alt="{text(alt)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/{kind};base64,{data}"/>'
    )
