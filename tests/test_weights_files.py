"""Where a checkpoint comes from: folders, bare files, shards, the Hub; what is read of it, and what is not opened."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import HubStandIn, Repository
from safetensors.torch import load_file, save_file
from small_vit import build, images
from test_run_train import run
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from modeling_vit_scratch import cli
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.weights import checkpoint_facts, load_pixel_facts, load_pretrained, load_processor
from modeling_vit_scratch.weights.formats import FORMATS

TIMM = {"img_size": 20, "patch_size": 5, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 7}
HF = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 20,
      "patch_size": 5, "num_labels": 7}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return TimmViT(**TIMM).state_dict()


def assert_loads(path, state):
    model, report = load_pretrained(str(path))
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    return report


@pytest.mark.parametrize(
    "wrap, note",
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "epoch": 3, "arch": "vit"}, "'state_dict' (beside it: arch, epoch)"),
        (
            lambda state: {"model": {n: t + 1 for n, t in state.items()}, "model_ema": state},
            "'model_ema' (beside it: model)",
        ),
        (lambda state: {"model": {f"module.{n}": t for n, t in state.items()}}, "prefix 'module.' taken off all names"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".bin", ".pt"])
def test_what_training_programs_wrap_around_weights_is_taken_off_and_said(tmp_path, state, wrap, note, ending):
    saved = wrap(state)
    torch.save(saved, tmp_path / f"checkpoint{ending}")
    if note and "module" in note:
        state = {name.removeprefix("module."): tensor for name, tensor in saved["model"].items()}
    report = assert_loads(tmp_path / f"checkpoint{ending}", state)
    assert note is None or note in str(report)


def test_a_bare_file_reports_what_was_inferred(tmp_path, state):
    save_file(state, tmp_path / "vit.safetensors")
    report = assert_loads(tmp_path / "vit.safetensors", state)
    assert report.inferred == {
        "layer_norm_eps": 1e-6, "hidden_act": "gelu", "pooling": "cls", "num_attention_heads": 1, "image_size": 20,
        "class names": "LABEL_0 to LABEL_6",
    }  # fmt: skip
    assert "no file says image_mean and image_std" in str(report)
    assert load_pixel_facts(str(tmp_path / "vit.safetensors")) == {}
    model, _ = load_pretrained(str(tmp_path / "vit.safetensors"), num_attention_heads=4)
    assert model.config.num_attention_heads == 4


def test_a_file_beside_a_config_is_read_with_it(tmp_path):
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path)
    model, report = load_pretrained(str(tmp_path / "model.safetensors"))
    assert model.config.num_attention_heads == 2 and model.config.layer_norm_eps == 1e-12
    assert "facts from the config.json beside it" in report.notes
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        UserError, match="has no config.json. To read it without one, name the file itself: .*model.saf"
    ):
        load_pretrained(str(tmp_path))
    model, report = load_pretrained(str(tmp_path / "model.safetensors"))
    assert report.inferred["num_attention_heads"] == 1 and report.inferred["layer_norm_eps"] == 1e-12


def test_what_is_no_model_says_what_would_be(tmp_path):
    for name, says in (
        ("", "An empty name names no checkpoint"),
        (str(tmp_path), "has no config.json. Expected a run's folder, its model/, a checkpoint or a repository"),
    ):
        with pytest.raises(UserError, match=says):
            load_pretrained(name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.classifier.bias": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    for named in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(UserError, match=r"is a LoRA adapter, which changes a model and is none by itself\.$"):
            load_pretrained(str(named))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"The model with it merged in is {tmp_path / 'model'}"):
        load_pretrained(str(adapter))


def test_an_unusual_width_needs_its_heads_said(tmp_path):
    torch.save(TimmViT(**{**TIMM, "embed_dim": 60, "num_heads": 3}).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="hidden size 60 is no multiple of 64; name the folder"):
        load_pretrained(str(tmp_path / "vit.pth"))
    assert load_pretrained(str(tmp_path / "vit.pth"), num_attention_heads=3)[0].config.num_attention_heads == 3


def test_an_oblong_image_of_a_bare_file_is_not_guessed(tmp_path):
    torch.save(TimmViT(**{**TIMM, "img_size": (20, 25)}).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="21 positions are no square of patches, and no file says the image size"):
        load_pretrained(str(tmp_path / "vit.pth"))


def test_shards_are_read_as_one(tmp_path):
    model = ViTForImageClassification(ViTConfig(**HF))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, report = load_pretrained(str(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.state_dict().items())
    index = tmp_path / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["classifier.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="names '../elsewhere.safetensors', which is no file beside it"):
        load_pretrained(str(tmp_path))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("ending", [".pth", ".npz"])
def test_a_pickle_that_runs_code_is_not_opened(tmp_path, state, ending):
    file, trap = tmp_path / f"evil{ending}", tmp_path / "ran"
    if ending == ".pth":
        torch.save({"model": state, "args": Bomb(trap)}, file)
    else:
        np.savez(file, **{"embedding/kernel": np.array(Bomb(trap), dtype=object)})
    with pytest.raises(UserError, match="torch.load\\(weights_only=True\\)|allow_pickle=False"):
        load_pretrained(str(file))
    assert not trap.exists()


@pytest.mark.parametrize(
    "saved, message",
    [
        ([1, 2], "expected a state_dict, names and tensors; got list"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, "got entries that are none: b"),
        ({"fc.weight": torch.zeros(2, 2)}, r"is no Vision Transformer that can be read \(known: transformers, timm"),
        (
            dict.fromkeys(("patch_embed.weight", "blocks.0.norm1.weight", "cls_token"), torch.zeros(1)),
            "The nearest is timm, which has patch_embed.proj.weight; this has patch_embed.weight",
        ),
        (
            {"patch_embed.proj.weight": torch.zeros(1), "blocks.0.norm1.weight": torch.zeros(1),
             "conv_proj.weight": torch.zeros(1), "encoder.pos_embedding": torch.zeros(1)},
            "bears the names of timm and of torchvision at once",
        ),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_of_a_vit_is_said(tmp_path, saved, message):
    torch.save(saved, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path / "checkpoint.pth"))


def test_each_formats_tensors_are_recognised_by_that_format_alone(state):
    named = {
        "transformers": ViTForImageClassification(ViTConfig(**HF)).state_dict(),
        "timm": state,
        "torchvision": TorchvisionViT(20, 5, 1, 1, 64, 40).state_dict(),
        "google": ["embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"],
    }
    assert set(named) == set(FORMATS)
    for title, names in named.items():
        assert [other for other, form in FORMATS.items() if form.recognises(names)] == [title]
        likeness = {other: form.likeness(names) for other, form in FORMATS.items()}
        assert max(likeness, key=likeness.get) == title


def test_pixels_are_torchvisions_and_googles_where_no_file_says_others(tmp_path):
    torch.save(TorchvisionViT(224, 112, 1, 1, 64, 40).state_dict(), tmp_path / "vit.pth")
    facts = load_pixel_facts(str(tmp_path / "vit.pth"))
    assert facts["image_mean"] == [0.485, 0.456, 0.406] and facts["crop_pct"] == 0.875
    processor = load_processor(str(tmp_path / "vit.pth"))
    assert processor.size["shortest_edge"] == 256 and processor.crop_size["height"] == 224 and processor.resample == 2


@pytest.mark.parametrize(
    "said, expected",
    [
        ({"size": 24, "resample": 2}, {"height": 24, "width": 24}),
        ({"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": 20}, {"shortest_edge": 30}),
        ({"image_mean": [0.5] * 3}, {"height": 20, "width": 20}),
    ],
)
def test_sizes_of_old_image_processors_are_understood(tmp_path, said, expected):
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    size = load_processor(str(tmp_path)).size
    assert {side: size[side] for side in expected} == expected


def test_a_checkpoint_of_a_run_is_read_as_any_model_is(tmp_path, capsys):
    flags = ["--max_steps", 3, "--save_steps", 2, "--ema_decay", 0.5, "--config_overrides", "patch_drop_rate=0.5"]
    run(tmp_path / "run", *flags, "--full_size_step", 2)
    rates = {}
    for step in (2, 3):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        model, _ = load_pretrained(str(folder))
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
        assert load_processor(str(folder)).num_channels == 1 and model.config.id2label[9] == "9"
        rates[step] = model.config.patch_drop_rate
    assert rates == {2: 0.5, 3: 0}
    published = load_file(tmp_path / "run" / "model" / "model.safetensors")
    averaged, _ = load_pretrained(str(folder / "averaged.safetensors"))
    assert all(torch.equal(tensor, published[name]) for name, tensor in averaged.state_dict().items())
    again = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(again.classifier.weight, saved["classifier.weight"])
    assert cli.main(["evaluate", str(folder), "--dataset_name", "digits"]) == 0
    assert "360 images of 10 classes" in capsys.readouterr().out


def test_what_training_alone_can_read_is_said_to_be_that(tmp_path):
    run(
        tmp_path / "run",
        "--max_steps",
        2,
        "--specimen",
        "scaled_by_hidden_size",
        "--config_overrides",
        "position_embedding_type=learned",
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    for name in (checkpoint, checkpoint / "model.safetensors"):
        with pytest.raises(UserError, match="what training goes on from .* a specimen or an older version"):
            load_pretrained(str(name))


def test_a_bare_file_of_this_packages_own_is_read_where_shapes_tell_it(tmp_path):
    network = build(hidden_size=64, num_attention_heads=1, use_cls_token=False, pooling="mean", layer_norm_eps=1e-12)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    model, report = load_pretrained(str(tmp_path / "own.safetensors"))
    assert report.inferred["pooling"] == "mean"
    assert torch.equal(model(images()).logits, network(images()).logits)
    save_file(build(hidden_size=64, position_embedding_type="sincos2d").state_dict(), tmp_path / "fixed.safetensors")
    with pytest.raises(UserError, match="has no learned positions.*read with its config.json: name their folder"):
        load_pretrained(str(tmp_path / "fixed.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("model.pth", b"hello", r"damaged: model.pth: it holds something else \(KeyError: "),
        ("model.npz", {"embedding/kernel": np.array(["a"])}, r"damaged: model.npz: "),
        ("model.safetensors.index.json", b"{}", "damaged: model.safetensors.index.json has no weight_map"),
        ("model.safetensors.index.json", b"[]", "damaged: model.safetensors.index.json holds no object"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "has no weight_map"),
    ],
)
def test_files_that_hold_something_else_are_said_to_be_damaged(tmp_path, name, content, text):
    (tmp_path / "config.json").write_text("{}")
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=text):
        load_pretrained(str(tmp_path if name.endswith(".json") else tmp_path / name))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"id2label": ["cat", "dog"]}, r"has id2label \['cat', 'dog'\]; expected"), ({"image_size": "20"}, "image_size")],
)
def test_a_config_whose_fields_are_of_another_kind_is_said_in_one_line(tmp_path, wrong, text):
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, **wrong}))
    with pytest.raises(UserError, match=text) as caught:
        load_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the Hub

FROM_THE_HUB = """
import sys
from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.weights import load_pixel_facts, load_pretrained, load_processor
for name in ("me/hf", "me/timm"):
    model, report = load_pretrained(name)
    crop_pct = load_pixel_facts(name).get("crop_pct")
    print(name, model.config.num_labels, report.format, crop_pct, load_processor(name).size)
    print(ViTScratchForImageClassification.from_pretrained(name, revision="main").config.num_labels)
for name in ("me/pickle", "me/nothing", "me/bare"):
    try:
        load_pretrained(name)
    except UserError as error:
        print(error)
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import build_network, source_of
for revision in ([], ["--model_revision", "of-timm"]):
    recipe, chosen = parse_arguments(["--model_name_or_path", "me/hf", "--dataset_name", "digits", *revision])
    _, processor, report = build_network(recipe, chosen, source_of(recipe))
    print(report.format, processor.image_mean)
try:
    load_pretrained("me/hf", revision="nowhere")
except UserError as error:
    print(error)
"""


def test_repositories_of_transformers_and_timm_load_by_name_and_pickles_are_refused(tmp_path, state):
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    arguments = {name: TIMM[name] for name in ("patch_size", "embed_dim", "depth", "num_heads", "img_size")}
    cfg = {"input_size": [3, 20, 20], "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": cfg}
    config = json.dumps(config).encode()
    pickled = io.BytesIO()
    torch.save(state, pickled)
    save_file(state, tmp_path / "timm.safetensors")
    with HubStandIn() as hub:
        theirs = hub.add("models", "me/hf", tmp_path / "hf")
        weights = (tmp_path / "timm.safetensors").read_bytes()
        of_timm = {"config.json": config, "model.safetensors": weights}
        hub.add("models", "me/timm", of_timm)
        theirs.branches["of-timm"] = Repository(of_timm)
        hub.add("models", "me/pickle", {"config.json": config, "pytorch_model.bin": pickled.getvalue()})
        hub.add("models", "me/bare", {"config.json": config})
        root = str(Path(__file__).resolve().parents[1])
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONWARNINGS"] = "ignore"
        run = subprocess.run([sys.executable, "-c", FROM_THE_HUB], env=environment, capture_output=True, text=True)
        fetched = [path for method, path in hub.requests if method == "GET" and path.endswith("pytorch_model.bin")]
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("me/hf 7 transformers None") and lines[1] == "7"
    assert lines[2].startswith("me/timm 7 timm 0.9") and "shortest_edge=22" in lines[2] and lines[3] == "7"
    assert "me/pickle has its weights in pytorch_model.bin alone: a downloaded pickle is not opened" in lines[4]
    assert lines[5] == "me/nothing: no such folder or file, and no such model on the Hub."
    assert lines[6] == "me/bare: the Hub has no model.safetensors of it."
    assert lines[7] == "transformers (0.5,)"
    assert lines[8].startswith("timm (0.1")
    assert lines[9] == "me/hf has no branch, tag or commit 'nowhere' on the Hub."
    assert not fetched


def test_the_facts_of_our_own_checkpoints_need_no_weights(tmp_path):
    model, _ = load_pretrained_of(tmp_path)
    (tmp_path / "own" / "model.safetensors").unlink()
    assert checkpoint_facts(str(tmp_path / "own")).image_size == model.config.image_size == 20


def load_pretrained_of(folder):
    ViTForImageClassification(ViTConfig(**HF)).save_pretrained(folder / "theirs")
    model, report = load_pretrained(str(folder / "theirs"))
    model.save_pretrained(folder / "own")
    assert set(load_file(folder / "own" / "model.safetensors")) == set(model.state_dict())
    return model, report
