"""A Vision Transformer written from scratch, at home in the Hugging Face ecosystem.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification`, `AutoImageProcessor` and
`pipeline("image-classification")` know its checkpoints.
"""

import contextlib
import functools
import importlib

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

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


def _with_code(method):  # of transformers, which writes no code of a model whose package is installed
    @functools.wraps(method)
    def written(model, *arguments, **options):
        with importlib.import_module(".results.model_folder", __name__).with_code(model):
            return method(model, *arguments, **options)

    return written


ViTScratchPreTrainedModel.checkpoint_translator = staticmethod(_translated)
ViTScratchPreTrainedModel.push_to_hub = _with_code(PreTrainedModel.push_to_hub)
ViTScratchPreTrainedModel.save_pretrained = _with_code(PreTrainedModel.save_pretrained)

__all__ = [
    "PRESETS",
    "ViTScratchConfig",
    "ViTScratchForImageClassification",
    "ViTScratchImageProcessor",
    "ViTScratchImageProcessorPil",
    "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]
