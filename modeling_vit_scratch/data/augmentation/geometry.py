"""Operations that move pixels: each takes a batch and, on the CPU, one draw a sample."""

import numpy as np
import torch

from .draws import send

# B batch, C channels, H W image

GREY = 128  # what lies outside an image moved by a policy, as in AutoAugment's code


def flip(images: torch.Tensor, chosen: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """The images (B, C, H, W), those `chosen` (B,) mirrored left to right, or top to bottom with axis -2."""
    rows = send(chosen.nonzero()[:, 0], images.device)
    return images.index_copy(0, rows, images.index_select(0, rows).flip(axis))


def pad_and_crop(images: torch.Tensor, padding: int, draws: torch.Tensor) -> torch.Tensor:
    """A crop of the old size out of each image with `padding` black pixels around it; draws (B, 2) in [0, 1) place it.

    images (B, C, H, W).
    """
    batch_size, num_channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    corners = send((draws * (2 * padding + 1)).long(), images.device)  # (B, 2): top, left
    rows = corners[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = corners[:, 1:] + torch.arange(width, device=images.device)  # (B, W)
    places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]  # (B, H, W)
    return _take(padded, places)


def _take(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The pixels at `places` (B, H, W), row * width + column, of images of any size (B, C, ...): (B, C, H, W)."""
    batch_size, num_channels = images.shape[:2]
    height, width = places.shape[1:]
    index = places.reshape(batch_size, 1, height * width).expand(-1, num_channels, -1)
    return images.flatten(2).gather(2, index).view(batch_size, num_channels, height, width)


def _sources(matrices: torch.Tensor, height: int, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where output pixels find their values, in pixels: column and row, each as two parts (B, 1, W) and (B, H, 1) whose
    sum it is.

    matrices (B, 2, 3) map an output pixel's (x, y, 1) to its source, both in pixels from the image's centre. Products
    and sums of single numbers only: a matrix product may round otherwise for another number of samples.
    """
    x = torch.arange(width, device=matrices.device, dtype=matrices.dtype) - (width - 1) / 2
    y = (torch.arange(height, device=matrices.device, dtype=matrices.dtype) - (height - 1) / 2)[:, None]
    parts = []
    for axis, side in enumerate((width, height)):
        a, b, c = matrices[:, axis, :, None, None].unbind(1)  # (B, 1, 1) each
        parts.append((a * x, b * y + (c + (side - 1) / 2)))
    return parts


def _interpolate(images: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Float images read bilinearly; black outside. columns and rows (B, H, W) or broadcast to it, from -1 to 1 between
    the outer edges of the outer pixels."""
    grid = torch.empty(len(images), *images.shape[-2:], 2, dtype=images.dtype, device=images.device)
    grid[..., 0], grid[..., 1] = columns, rows
    return torch.nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def affine(images: torch.Tensor, angles: torch.Tensor, shifts: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float images (B, C, H, W) turned by `angles` (radians, B), enlarged by `scales` (B), moved by `shifts` (pixels,
    (B, 2): right, down) about their centre. Bilinear, black outside."""
    height, width = images.shape[-2:]
    cos, sin = angles.cos() / scales, angles.sin() / scales
    turn = torch.stack((torch.stack((cos, sin), dim=1), torch.stack((-sin, cos), dim=1)), dim=1)  # (B, 2, 2)
    origin = -(turn * shifts[:, None, :]).sum(2, keepdim=True)
    matrices = send(torch.cat((turn, origin), dim=2).to(images.dtype), images.device)
    (column_x, column_y), (row_x, row_y) = _sources(matrices, height, width)
    # scaled to -1 to 1 while they are small
    columns = column_x * (2 / width) + ((2 * column_y + 1) / width - 1)
    return _interpolate(images, columns, row_x * (2 / height) + ((2 * row_y + 1) / height - 1))


def nearest_affine(images: torch.Tensor, matrices: torch.Tensor, fill: int = GREY) -> torch.Tensor:
    """Images (B, C, H, W) of any dtype read at the nearest pixel under `matrices` (B, 2, 3); `fill` outside.

    matrices map an output pixel's (x, y, 1) to its source, in pixels from the image's centre.
    """
    height, width = images.shape[-2:]
    assert (height + 2) * (width + 2) < 2**24, "places are counted in float32"
    (column_x, column_y), (row_x, row_y) = _sources(send(matrices.float(), images.device), height, width)
    # a frame one pixel wide holds the fill, and what lies further out is read there: no mask is needed
    columns, rows = (column_x + column_y).round_().clamp_(-1, width), (row_x + row_y).round_().clamp_(-1, height)
    places = rows.add_(1).mul_(width + 2).add_(columns).add_(1).long()
    return _take(torch.nn.functional.pad(images, (1, 1, 1, 1), value=fill), places)


def resized_crop(images: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
    """uint8 images (B, C, H, W): of each its box (B, 4: top, left, height, width; pixels) at the size of the whole.

    Bilinear; nothing outside the box is mixed in. Rounded once, where torchvision's kernel for uint8 rounds twice.
    """
    height, width = images.shape[-2:]
    boxes = send(torch.from_numpy(boxes).float(), images.device)[:, :, None]  # (B, 4, 1)

    def along(side: int, corner: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
        places = (torch.arange(side, device=images.device) + 0.5) * (extent / side) - 0.5
        places = corner + torch.minimum(places.clamp_(min=0), extent - 1)  # (B, side), in pixels
        return (2 * places + 1) / side - 1

    rows, columns = along(height, boxes[:, 0], boxes[:, 2]), along(width, boxes[:, 1], boxes[:, 3])
    return _interpolate(images.float(), columns[:, None, :], rows[:, :, None]).round_().to(torch.uint8)


def central_boxes(ratio: tuple[float, float], height: int, width: int) -> np.ndarray:
    """The largest central box (4,) whose width / height lies within `ratio`: for a sample none of whose tries fit."""
    shape = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * shape)), min(height, round(width / shape))
    return np.array(((height - box_height) // 2, (width - box_width) // 2, box_height, box_width))
