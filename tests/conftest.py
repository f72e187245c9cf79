"""What several tests share: small sets of images, made on the spot. No test needs a network or a dataset on disk."""

import csv
import os
import time
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"  # equal bit for bit is asked of a CPU; test_gpu.py asks a GPU for what it can

import datasets
import numpy as np
import pytest
import torch
from hub_stand_in import HubStandIn
from huggingface_hub import constants, hf_api
from PIL import Image
from transformers.utils import hub as transformers_hub

from modeling_vit_scratch import functions_vit_scratch
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchLayer

datasets.disable_progress_bars()
torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it brings


def make_images(count: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> list[Image.Image]:
    """RGB images of noise, (height, width) pixels, each different."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def write_shard(path, images, labels):
    """A parquet shard of these images, five in a row group."""
    names = [f"class {index}" for index in range(max(labels) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path, batch_size=5)


@pytest.fixture(params=["pytorch", "oneDNN"])
def library(request, monkeypatch) -> str:
    """The library of float32 products: what holds for one holds for the other, whatever processor this is."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(functions_vit_scratch, "is_faster_by_onednn", lambda: request.param == "oneDNN")
    monkeypatch.setattr(functions_vit_scratch, "SMALLEST_PRODUCT", 1)
    return request.param


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, logged in as `me`."""
    with HubStandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # the client's own, made when it was imported
        if hasattr(transformers_hub, "hf_api"):  # transformers 5.23 keeps one too, 5.17 does not
            monkeypatch.setattr(transformers_hub, "hf_api", lambda: hf_api.api)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's waits between its own tries
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", hub.token("me"))
        yield hub


@pytest.fixture
def parquet_repo(tmp_path):
    """A maker of local folders in a Hub repository's layout: split name -> sizes of its parquet shards."""

    def make(name="repo", num_classes=3, size=(8, 8), row_group=5, image="image", label="label", **splits):
        root = tmp_path / name
        names = [f"class {index}" for index in range(num_classes)]
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
        count = 0
        for split, shard_sizes in splits.items():
            for index, shard_size in enumerate(shard_sizes):
                labels = [(count + row) % num_classes for row in range(shard_size)]
                images = make_images(shard_size, size, seed=count + 1)
                table = datasets.Dataset.from_dict({image: images, label: labels}, features=features)
                path = root / "data" / f"{split}-{index:05d}-of-{len(shard_sizes):05d}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                table.to_parquet(path, batch_size=row_group)
                count += shard_size
        return root

    return make


@pytest.fixture
def image_folder(tmp_path):
    """A maker of image folders: class name -> number of images."""

    def make(name="photos", size=(20, 24), seed=0, **classes):
        root = tmp_path / name
        for offset, (label, count) in enumerate(classes.items()):
            (root / label).mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(make_images(count, size, seed=seed + offset)):
                image.save(root / label / f"{index}.png")
        return root

    return make


@pytest.fixture
def tokens() -> Iterator[list[tuple[bool, int]]]:
    """Of each batch that a layer sees from here on: whether it trains on it, and how many tokens an image has."""
    found = []

    def look(module, arguments):
        if isinstance(module, ViTScratchLayer) and not arguments[0].is_meta:
            found.append((module.training, arguments[0].shape[1]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield found
    hook.remove()


@pytest.fixture
def colours(tmp_path):
    """A maker of folders whose images are bright in the channels that their labels name, or in none."""

    def make(name, count):
        root, rng = tmp_path / name, np.random.default_rng(len(name))
        root.mkdir()
        with open(root / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "labels"])
            for index in range(count):
                bright = (index >> np.arange(3)) & 1
                pixels = rng.integers(0, 60, (8, 8, 3)) + 180 * bright
                Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index}.png")
                names = [label for label, on in zip(("red", "green", "blue"), bright, strict=True) if on]
                table.writerow([f"{index}.png", "|".join(names)])
        return root

    return make
