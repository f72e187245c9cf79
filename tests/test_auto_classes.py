"""After `import modeling_vit_scratch`, transformers' auto classes and pipelines know our checkpoints."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_vit import build, images
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import modeling_vit_scratch
from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchImageProcessor,
    ViTScratchImageProcessorPil,
    ViTScratchModel,
)

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = {0: "aardvark", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}


@pytest.fixture
def model():
    return build(id2label=NAMES)


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path)
    ViTScratchImageProcessor(size=32).save_pretrained(tmp_path)
    return tmp_path


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_auto_classes_find_our_classes(checkpoint, model):
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is ViTScratchConfig
    assert type(AutoModel.from_config(config)) is ViTScratchModel
    assert type(AutoModelForImageClassification.from_config(config)) is ViTScratchForImageClassification
    encoder = AutoModel.from_pretrained(checkpoint)
    classifier = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert (type(encoder), type(classifier)) == (ViTScratchModel, ViTScratchForImageClassification)
    assert torch.equal(encoder(images()).pooler_output, model.vit(images()).pooler_output)
    assert torch.equal(classifier(images()).logits, model(images()).logits)


def test_a_configuration_is_found_by_its_model_type():
    assert type(AutoConfig.for_model("vit_scratch", num_labels=3)) is ViTScratchConfig


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ViTScratchImageProcessor),
        ({"backend": "torchvision"}, ViTScratchImageProcessor),
        ({"backend": "pil"}, ViTScratchImageProcessorPil),
    ],
    ids=["default", "torchvision", "pil"],
)
@pytest.mark.parametrize("saved_by", [ViTScratchImageProcessor, ViTScratchImageProcessorPil])
def test_the_auto_image_processor_gives_the_backend_asked_for(options, expected, saved_by, tmp_path):
    saved_by(size=32, num_channels=1).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, **options)
    assert type(processor) is expected
    assert processor.num_channels == 1
    assert processor(picture(), return_tensors="pt").pixel_values.shape == (1, 1, 32, 32)


def test_both_backends_save_the_same_file_but_for_what_only_one_needs(tmp_path):
    files = {}
    for processor_class in (ViTScratchImageProcessor, ViTScratchImageProcessorPil):
        processor_class(num_channels=1).save_pretrained(tmp_path / processor_class.__name__)
        files[processor_class] = json.loads(
            (tmp_path / processor_class.__name__ / "preprocessor_config.json").read_text()
        )
    torchvision, pil = files.values()
    assert torchvision["image_processor_type"] == pil["image_processor_type"] == "ViTScratchImageProcessor"
    shared = torchvision.keys() & pil.keys()
    assert {"size", "image_mean", "image_std", "num_channels", "resample"} <= shared
    assert {name: torchvision[name] for name in shared} == {name: pil[name] for name in shared}


def test_the_pipeline_names_the_class_of_the_largest_logit(checkpoint, model):
    # trust_remote_code=False: left open, transformers asks on the terminal even though the class is here (5.17 to 5.23)
    classify = pipeline("image-classification", checkpoint.as_posix(), trust_remote_code=False, device="cpu")
    found = classify(picture(), top_k=5)
    with torch.no_grad():
        logits = model(ViTScratchImageProcessor(size=32)(picture(), return_tensors="pt").pixel_values).logits[0]
    expected = sorted(zip(logits.softmax(0).tolist(), NAMES.values(), strict=True), reverse=True)
    assert [answer["label"] for answer in found] == [name for _, name in expected]
    assert [answer["score"] for answer in found] == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_the_pipeline_finds_pooled_features(checkpoint, model):
    extract = pipeline(
        "image-feature-extraction", checkpoint.as_posix(), trust_remote_code=False, device="cpu", pool=True
    )
    with torch.no_grad():
        pixel_values = ViTScratchImageProcessor(size=32)(picture(), return_tensors="pt").pixel_values
        expected = model.vit(pixel_values).pooler_output
    torch.testing.assert_close(torch.tensor(extract(picture())), expected)


@pytest.mark.slow  # two fresh interpreters
def test_the_import_is_what_makes_them_known(checkpoint):
    """The companion: without it, transformers refuses the same folder."""
    script = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    known = script.replace("import sys;", "import sys, modeling_vit_scratch;")
    runs = [
        subprocess.run([sys.executable, "-c", text, checkpoint], cwd=REPOSITORY, capture_output=True, text=True)
        for text in (script, known)
    ]
    assert runs[0].returncode != 0 and "vit_scratch" in runs[0].stderr
    assert runs[1].returncode == 0, runs[1].stderr


def test_importing_again_registers_without_an_error():
    importlib.reload(modeling_vit_scratch)  # as notebooks do
    assert type(AutoConfig.for_model("vit_scratch")) is ViTScratchConfig
