"""Our classes under transformers' common tests. Not collected here: test_transformers_common.py copies it to where
transformers' own tests lie unpacked, and the relative imports below are from there.
"""

import unittest

import numpy as np
from PIL import Image
from torch import nn
from transformers.models.auto import modeling_auto

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchImageProcessor,
    ViTScratchImageProcessorPil,
    ViTScratchModel,
)

from ... import test_image_processing_common
from ...test_configuration_common import ConfigTester
from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

# the mixins decide by these lists of class names whether a class takes labels, and which tests are its own
modeling_auto.MODEL_MAPPING_NAMES["vit_scratch"] = "ViTScratchModel"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["vit_scratch"] = "ViTScratchForImageClassification"


class ModelTester:
    """The sizes, the configuration and the inputs that the mixin asks for."""

    batch_size, num_channels, image_size, patch_size = 13, 3, 30, 5
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    num_labels = 7
    is_training = True

    def __init__(self, **fields):
        self.fields = fields
        self.seq_length = self.encoder_seq_length = 36 + self.get_config().num_prefix_tokens

    def get_config(self):
        sizes = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
        tiny = {name: getattr(self, name) for name in sizes}
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return ViTScratchConfig(**tiny, **dropout, intermediate_size=37, num_labels=self.num_labels, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class PlainModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ViTScratchModel, ViTScratchForImageClassification)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # else skipped: our files state no year
    fields = {}

    def setUp(self):
        self.model_tester = ModelTester(**self.fields)

    def test_model_get_set_embeddings(self):  # theirs asks for an nn.Embedding; for images it is the patch embedding
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    def test_logits_have_one_number_a_label(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        labels = ids_tensor([self.model_tester.batch_size], config.num_labels)
        logits = ViTScratchForImageClassification(config)(**inputs, labels=labels).logits
        self.assertEqual(tuple(logits.shape), (self.model_tester.batch_size, config.num_labels))


class EveryOptionModelTest(PlainModelTest):
    """The same tests with every switch away from its default."""

    fields = {
        "patch_embedding": "linear",
        "patch_stride": 5,
        "num_register_tokens": 3,
        "position_embedding_type": "rope2d",
        "embedding_norm": True,
        "qk_norm": True,
        "layer_scale_init": 0.5,
        "drop_path_rate": 0.1,
        "embedding_dropout_prob": 0.1,
        "mlp_dropout_prob": 0.1,
        "pooling": "mean",
        "final_norm": "after_pooling",
        "classifier": "mlp",
        "pooler_output_size": 11,
        "weight_init": "trunc_normal",
    }


class ConfigurationTest(unittest.TestCase):
    has_text_modality = False

    def test_config(self):
        fields = {"hidden_size": 36, "patch_size": [8, 16]}
        ConfigTester(self, ViTScratchConfig, has_text_modality=self.has_text_modality, **fields).run_common_tests()


class WrongConfigurationTest(ConfigurationTest):
    """Asks for a vocabulary, so it has to fail: the harness shows that it sees a failure."""

    has_text_modality = True


def smooth_image(url):
    """A photograph's stand-in, so that nothing is fetched: `url` is a picture on the Hub."""
    rows, columns = np.meshgrid(np.linspace(0, 1, 48), np.linspace(0, 1, 64), indexing="ij")
    channels = (rows, columns, np.sin(9 * rows * columns) / 2 + 0.5)
    return Image.fromarray((255 * np.stack(channels, axis=-1)).astype(np.uint8))


test_image_processing_common.load_test_image = smooth_image


class ImageProcessorTester(ImageProcessingTester):
    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 60
    size = {"height": 18, "width": 18}

    def __init__(self):  # theirs takes the classes from a table of transformers' own models (5.23)
        pass

    def prepare_image_processor_dict(self):
        return ImageProcessorTest.image_processor_dict


class ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"torchvision": ViTScratchImageProcessor, "pil": ViTScratchImageProcessorPil}
    image_processor_dict = {
        "size": ImageProcessorTester.size,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.5, 0.4, 0.3],
    }

    def setUp(self):
        self.image_processor_tester = ImageProcessorTester()
