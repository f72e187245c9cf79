"""The folder model/ is a complete Hub repository: it loads where this package cannot be imported, with equal logits."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_images
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.results.model_folder import save_model_folder

STRANGER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_vit_scratch" or name.startswith("modeling_vit_scratch."):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
try:
    import modeling_vit_scratch
    raise SystemExit("the package can be imported: this would show nothing")
except ModuleNotFoundError:
    pass

import json, torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline,
)

folder, picture = sys.argv[1:]
image = Image.open(picture)
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageClassification.from_pretrained(folder, **trust)
logits, kinds = {}, {}
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
    kinds[backend] = type(processor).__name__
    with torch.no_grad():
        logits[backend] = model(**processor(image, return_tensors="pt")).logits.tolist()
body, report = AutoModel.from_pretrained(folder, output_loading_info=True, **trust)
answers = pipeline("image-classification", folder, **trust)(picture)
print(json.dumps({
    "model_type": config.model_type, "logits": logits, "kinds": kinds, "pipeline": answers,
    "missing": sorted(report["missing_keys"]),
}))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    torch.manual_seed(0)
    config = ViTScratchConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=16, patch_size=4,
        num_register_tokens=2, initializer_range=0.5, id2label=dict(enumerate(["cat", "dog", "newt"])),
    )  # fmt: skip
    model = ViTScratchForImageClassification(config).eval()
    processor = ViTScratchImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    save_model_folder(folder, model, model.state_dict(), processor)
    picture = folder.parent / "some.png"
    make_images(1, (30, 20))[0].save(picture)
    return folder, picture, model, processor


@pytest.mark.parametrize("saved_by", ["the package", "save_pretrained"])
def test_a_stranger_without_the_package_gets_equal_logits(published, tmp_path, saved_by):
    folder, picture, model, processor = published
    if saved_by == "save_pretrained":  # of transformers, as its Trainer does
        before = model.config.to_dict()
        model.save_pretrained(tmp_path / "saved")
        assert model.config.to_dict() == before
        for name in ("preprocessor_config.json", "image_processing_vit_scratch.py"):
            shutil.copyfile(folder / name, tmp_path / "saved" / name)
        folder = tmp_path / "saved"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(picture)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    image = make_images(1, (30, 20))[0]
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    assert told["model_type"] == "vit_scratch" and told["missing"] == []
    # to rounding: a single class token's products add in an order that depends on where the weights lie in memory
    torch.testing.assert_close(torch.tensor(told["logits"]["torchvision"]), logits, rtol=1e-5, atol=1e-6)
    assert told["kinds"] == {"torchvision": "ViTScratchImageProcessor", "pil": "ViTScratchImageProcessorPil"}
    assert told["pipeline"][0]["label"] == ["cat", "dog", "newt"][logits.argmax()]
    assert told["pipeline"][0]["score"] == pytest.approx(logits.softmax(1).max().item(), abs=1e-6)


def test_with_the_package_imported_its_own_classes_load_the_folder(published):
    folder, _, model, processor = published
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is ViTScratchForImageClassification
    pairs = zip(loaded.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(value, same) for (name, value), (other, same) in pairs)
    assert AutoModel.from_pretrained(folder).config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert AutoImageProcessor.from_pretrained(folder).image_mean == processor.image_mean


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(published):
    folder, picture, model, processor = published
    before = {path.name for path in folder.iterdir()}
    save_model_folder(folder, model, model.state_dict(), processor)
    assert {path.name for path in folder.iterdir()} == before
    assert {path.name for path in folder.parent.iterdir()} == {"model", picture.name}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} < before
