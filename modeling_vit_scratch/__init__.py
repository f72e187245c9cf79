"""A Vision Transformer written from scratch, at home in the Hugging Face ecosystem.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification`, `AutoImageProcessor` and
`pipeline("image-classification")` know its checkpoints.
"""

import contextlib
import importlib

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .configuration_vit_scratch import PRESETS, ViTScratchConfig
from .image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil
from .modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel

__version__ = "0.1.0"

AutoConfig.register("vit_scratch", ViTScratchConfig, exist_ok=True)
AutoModel.register(ViTScratchConfig, ViTScratchModel, exist_ok=True)
AutoModelForImageClassification.register(ViTScratchConfig, ViTScratchForImageClassification, exist_ok=True)
with contextlib.suppress(ImportError):  # 5.17's auto class itself asks for torchvision, 5.23's does not
    AutoImageProcessor.register(
        ViTScratchConfig,
        image_processor_classes={"torchvision": ViTScratchImageProcessor, "pil": ViTScratchImageProcessorPil},
        exist_ok=True,
    )


def _translated(*arguments):
    # imported when a checkpoint is loaded: the network itself needs none of it
    return importlib.import_module(".weights.from_pretrained", __name__).translated(*arguments)


def _push_to_hub(model, *arguments, **options):
    return importlib.import_module(".results.hub", __name__).push_with_code(model, *arguments, **options)


ViTScratchPreTrainedModel.checkpoint_translator = staticmethod(_translated)
ViTScratchPreTrainedModel.push_to_hub = _push_to_hub

__all__ = [
    "PRESETS",
    "ViTScratchConfig",
    "ViTScratchForImageClassification",
    "ViTScratchImageProcessor",
    "ViTScratchImageProcessorPil",
    "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]
