"""Pixels: resize, crop, rescale, normalise, for images of one to n channels, with torchvision or with PIL alone.

This file travels to the Hub beside a checkpoint: it imports torch and transformers, nothing else. The PIL class works
where torchvision is absent.
"""

from typing import Any

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, to_numpy_array
from transformers.processing_utils import ImagesKwargs


def pil_to_channels(image: Any, num_channels: int) -> Any:
    """The PIL image with one grey channel (num_channels=1), three RGB channels (3), or as it is (other numbers).

    Transparency is dropped, as transformers drops it: the colour that was stored below it shows. Sixteen-bit grey is
    brought to eight bits by its high byte (a value above 65,535 is white): PIL's own conversion turns all above 255
    white. Fractions (mode F) count from 0 to 255; what lies outside is cut off.
    """
    if num_channels not in (1, 3):
        return image
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; straight to RGB, PIL warns
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit grey of PNG and TIFF
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "LAB":
        image = image.convert("RGB")  # PIL knows no straight way to grey
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def array_to_channels(image: Any, num_channels: int) -> Any:
    """The array or tensor (C, H, W) with grey repeated to RGB, or RGB mixed to grey by PIL's weights; else as it is."""
    if image.shape[0] == 1 and num_channels == 3:
        return image[[0, 0, 0]]
    if image.shape[0] == 3 and num_channels == 1:
        if isinstance(image, torch.Tensor):
            weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)[:, None, None]
            grey = (image * weights).sum(0, keepdim=True)
            return grey if image.is_floating_point() else grey.round().to(image.dtype)
        grey = 0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:]
        return grey if image.dtype.kind == "f" else grey.round().astype(image.dtype)
    return image


class ViTScratchImageProcessorKwargs(ImagesKwargs, total=False):
    """What a processor may be given, at construction or at a call."""

    num_channels: int


class _ViTScratchImageProcessing:
    """What both backends share: the defaults (transformers' ViT has the same) and the channels."""

    valid_kwargs = ViTScratchImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    num_channels = 3

    def __init__(self, **kwargs):
        num_channels = kwargs.get("num_channels", self.num_channels)
        for name in ("image_mean", "image_std"):
            if kwargs.get(name) is None:
                kwargs[name] = [0.5] * num_channels
            if not isinstance(kwargs[name], (int, float)) and len(kwargs[name]) != num_channels:
                count = len(kwargs[name])
                raise ValueError(f"{name} has {count} values for num_channels={num_channels}; give one each.")
        super().__init__(**kwargs)

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, input_data_format=None, **kwargs):
        """One image as (C, H, W) of `num_channels` channels. do_convert_rgb is not needed: the channels decide."""
        num_channels = kwargs.get("num_channels") or self.num_channels
        if hasattr(image, "convert"):
            image = to_numpy_array(pil_to_channels(image, num_channels))  # (H, W) or (H, W, C)
            input_data_format = ChannelDimension.FIRST if image.ndim == 2 else ChannelDimension.LAST
        elif input_data_format is None and image.ndim == 3 and num_channels in (image.shape[0], image.shape[-1]):
            first = image.shape[0] == num_channels
            input_data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
        image = super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)
        image = array_to_channels(image, num_channels)
        mean = kwargs.get("image_mean")
        expected = len(mean) if kwargs.get("do_normalize") and isinstance(mean, (list, tuple)) else num_channels
        if image.shape[0] != expected:
            raise ValueError(
                f"An image has {image.shape[0]} channels, the image processor expects {expected}; convert the image, "
                f"or build the processor with num_channels={image.shape[0]}."
            )
        return image


class ViTScratchImageProcessor(_ViTScratchImageProcessing, TorchvisionBackend):
    """Images to pixel_values (B, num_channels, H, W), by torchvision.

    size: {"height", "width"} or {"shortest_edge"}; crop_size with do_center_crop; image_mean, image_std: one value a
    channel, of pixels in [0, 1]. Raises ValueError if mean or std do not fit num_channels.
    """


class ViTScratchImageProcessorPil(_ViTScratchImageProcessing, PilBackend):
    """Images to pixel_values (B, num_channels, H, W), by PIL and numpy: for where torchvision is not installed."""

    def resize(self, image, size, resample=None, **kwargs):
        resize = super().resize
        if image.shape[0] in (1, 3):
            return resize(image, size, resample, **kwargs)
        # PIL weighs two and four channels by the last, as transparency, and knows no five: one channel at a time
        channels = [torch.from_numpy(resize(channel[None], size, resample, **kwargs)) for channel in image]
        return torch.cat(channels).numpy()


__all__ = ["ViTScratchImageProcessor", "ViTScratchImageProcessorPil"]
