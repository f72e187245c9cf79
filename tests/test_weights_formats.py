"""Networks of transformers, timm, torchvision and Google give the same logits here, and come back bit for bit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.layers import LayerNorm, Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.weights import load_pretrained, load_processor, timm_format
from modeling_vit_scratch.weights.files import Checkpoint
from modeling_vit_scratch.weights.loading import fitted
from modeling_vit_scratch.weights.timm_format import facts_of_architecture
from modeling_vit_scratch.weights.writing import write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import parity

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
HF = {**SMALL, "image_size": 20, "patch_size": 5, "num_labels": 7}
TIMM = {
    "img_size": 20,
    "patch_size": 5,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "mlp_ratio": 1.5,
    "num_classes": 7,
}


@torch.no_grad()
def assert_same_logits(ours, theirs, size=(20, 20), channels=3):
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(5))
    expected = theirs(images)
    expected = getattr(expected, "logits", expected)
    # the layers are computed in another order at most: a few units of float32's last place
    assert (ours(images).logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def assert_there_and_back(ours, theirs, source, to, folder):
    write_checkpoint(to, folder, ours, load_processor(str(source)))
    returned, own = load_file(folder / "model.safetensors"), theirs.state_dict()
    assert set(returned) == set(own)
    assert all(torch.equal(returned[name], own[name]) for name in own)
    again, _ = load_pretrained(str(folder))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert_same_logits(again, theirs, again.config.image_height_width, again.config.num_channels)


# ---------------------------------------------------------------- transformers

HF_CASES = {
    "plain": {},
    "an oblong image": {"image_size": [10, 25]},
    "grey, oblong patches": {"num_channels": 1, "patch_size": [4, 5]},
    "no bias, another activation": {"qkv_bias": False, "hidden_act": "quick_gelu"},
    "tanh's approximation, another epsilon": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("case", HF_CASES)
def test_transformers_networks_give_their_logits_and_come_back(tmp_path, case):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**{**HF, **HF_CASES[case]}))
    parity.randomise(theirs).save_pretrained(tmp_path / "theirs")
    ours, report = load_pretrained(str(tmp_path / "theirs"))
    size = ours.config.image_height_width
    assert_same_logits(ours, theirs, size, ours.config.num_channels)
    assert len(report.loaded) == len(theirs.state_dict()) and not report.replaced and not report.unused
    assert_there_and_back(ours, theirs, tmp_path / "theirs", "transformers", tmp_path / "back")


def test_names_from_before_version_5_are_read(tmp_path):
    theirs = parity.randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**HF)))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    old = parity.old_names(theirs.state_dict())
    assert (
        "vit.encoder.layer.1.attention.attention.query.weight" in old and "vit.encoder.layer.0.output.dense.bias" in old
    )
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert_same_logits(load_pretrained(str(tmp_path))[0], theirs)


def test_deits_distillation_token_is_a_register(tmp_path):
    theirs = parity.randomise(transformers.DeiTForImageClassification(transformers.DeiTConfig(**HF)))
    theirs.save_pretrained(tmp_path)
    ours, _ = load_pretrained(str(tmp_path))
    assert ours.config.num_register_tokens == 1
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_two_heads_are_refused_but_for_fine_tuning(tmp_path, library):
    if library == "transformers":
        theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF))
        parity.randomise(theirs).save_pretrained(tmp_path)
        source, encoder = tmp_path, lambda images: theirs.deit(images).last_hidden_state[:, 0]
        heads = [f"{part}_classifier.{leaf}" for part in ("cls", "distillation") for leaf in ("weight", "bias")]
    else:
        theirs = parity.randomise(timm.models.deit.VisionTransformerDistilled(**TIMM))
        torch.save(theirs.state_dict(), tmp_path / "deit.pth")
        source, encoder = tmp_path / "deit.pth", lambda images: theirs.forward_features(images)[:, 0]
        heads = ["head_dist.weight", "head_dist.bias", "head.weight", "head.bias"]
    with pytest.raises(UserError, match="has two heads, whose mean no plain ViT computes"):
        load_pretrained(str(source))
    ours, report = load_pretrained(str(source), ["cat", "dog"])
    assert sorted(report.unused) == sorted(heads) and report.replaced == ["classifier.weight", "classifier.bias"]
    images = torch.randn(2, 3, 20, 20)
    assert torch.allclose(ours.vit(images).pooler_output, encoder(images), atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForMaskedImageModeling", "ViTMAEForPreTraining"])
def test_an_encoder_without_a_head_gets_a_new_one_and_says_so(tmp_path, kind):
    config = transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig
    more = {"encoder_stride": 5} if kind == "ViTForMaskedImageModeling" else {}
    theirs = parity.randomise(getattr(transformers, kind)(config(**HF, **more)))
    theirs.save_pretrained(tmp_path)
    ours, report = load_pretrained(str(tmp_path), ["cat", "dog"])
    assert report.replaced == ["classifier.weight", "classifier.bias"]
    assert "replaced: classifier.weight (2, 24)" in str(report)
    parts = {"ViTModel": "pooler", "ViTForMaskedImageModeling": "decoder", "ViTMAEForPreTraining": "decoder"}
    assert report.unused and any(parts[kind] in name for name in report.unused)
    with pytest.raises(UserError, match="has no classifier"):
        load_pretrained(str(tmp_path))
    if kind == "ViTModel":
        images = torch.randn(2, 3, 20, 20)
        assert torch.allclose(ours.vit(images).last_hidden_state, theirs(images).last_hidden_state, atol=1e-5)


def test_other_model_types_and_other_tensors_are_refused_by_name(tmp_path):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**HF))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "model_type": "dinov2"}))
    with pytest.raises(UserError, match="has model_type 'dinov2', no plain ViT; known: vit, deit"):
        load_pretrained(str(tmp_path))
    file.unlink()
    state = {**theirs.state_dict(), "vit.layers.1.gate.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "strange.bin")
    with pytest.raises(UserError, match="1 tensors have no place in a plain ViT .* vit.layers.1.gate.weight"):
        load_pretrained(str(tmp_path / "strange.bin"))


# ---------------------------------------------------------------- timm

TIMM_CASES = {
    "plain": {},
    "LayerScale, positions for patches alone": {"init_values": 0.1, "no_embed_class": True},
    "registers, mean": {"reg_tokens": 4, "no_embed_class": True, "global_pool": "avg"},
    "registers with positions": {"reg_tokens": 3},
    "no class token, norm behind the mean": {"class_token": False, "global_pool": "avg"},
    "no class token, norm before the mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "a norm on the embeddings": {"pre_norm": True},
    "norms on queries and keys": {"qk_norm": True, "num_heads": 4},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "two channels": {"in_chans": 2},
}


@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm_files_give_their_logits_and_come_back(tmp_path, case):
    theirs = parity.randomise(TimmViT(**{**TIMM, **TIMM_CASES[case]}))
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    ours, report = load_pretrained(str(tmp_path / "checkpoint.pth"))
    assert_same_logits(ours, theirs, channels=ours.config.num_channels)
    assert report.inferred["image_size"] == 20 and "weights taken from 'model' (beside it: epoch)" in str(report)
    assert_there_and_back(ours, theirs, tmp_path / "checkpoint.pth", "timm", tmp_path / "back")


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 2, "num_classes": 7, "global_pool": "avg"}),
        ("vit_base_patch16_gap_224", {"img_size": 32, "depth": 1, "num_classes": 3, "embed_dim": 64}),
        ("vit_base_patch32_clip_quickgelu_224", {"img_size": 64, "depth": 1, "embed_dim": 64, "num_heads": 4}),
        ("deit3_small_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 3}),
    ],
)
def test_a_folder_that_timm_saved_gives_its_logits(tmp_path, name, arguments):
    theirs = parity.randomise(timm.create_model(name, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments)
    ours, report = load_pretrained(str(tmp_path))
    assert_same_logits(ours, theirs, ours.config.image_height_width)
    assert set(report.inferred) <= {"class names", "num_attention_heads"}


def test_deit_3s_own_names_of_layer_scale_are_read(tmp_path):
    theirs = parity.randomise(TimmViT(**TIMM, init_values=0.1, no_embed_class=True))
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for name, t in theirs.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit_3.pth")
    assert_same_logits(load_pretrained(str(tmp_path / "deit_3.pth"))[0], theirs)


def facts_of_network(model) -> dict:
    block = model.blocks[0]
    activations = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
    return {
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": activations[type(block.mlp.act).__name__],
        "num_attention_heads": block.attn.num_heads,
    }


def built(name):
    """timm's network of one layer, without numbers."""
    with torch.device("meta"):
        return timm.create_model(name, depth=1)


def is_plain(model) -> bool:
    block = model.blocks[0] if isinstance(model, TimmViT) else None
    if type(model) is not TimmViT or type(block) is not Block or type(model.patch_embed) is not PatchEmbed:
        return False
    parts = (type(block.attn), type(block.mlp), type(block.norm1))
    return parts == (Attention, Mlp, LayerNorm) and model.attn_pool is None and isinstance(block.mlp.norm, nn.Identity)


def check_architecture(name, model):
    """timm's name says what timm builds."""
    facts = facts_of_architecture("it", name)
    usual = 16 if model.embed_dim > 1024 else model.embed_dim // 64
    facts["num_attention_heads"] = facts["num_attention_heads"] or usual
    assert facts == facts_of_network(model), name


def check_refusal(name, model):
    """Never loaded with other logits: refused by its name, by its tensors' names, or by their shapes."""
    checkpoint = Checkpoint(name, {"architecture": name}, lambda: None, lambda: None)
    with pytest.raises(UserError):
        reading = timm_format.read(checkpoint, model.state_dict(), None)
        with torch.device("meta"):
            own = ViTScratchForImageClassification(reading.config).state_dict()
        fitted(reading, reading.config, {key: tensor.shape for key, tensor in own.items()})
        pytest.fail(f"{name} would be read as a plain ViT")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_gap_224", "vit_base_patch32_clip_quickgelu_224", "test_vit"]
)
def test_an_architectures_name_says_what_no_tensor_does(name):
    check_architecture(name, built(name))


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_base_patch16_siglip_224", "vit_base_patch16_xp_224"])
def test_what_timm_names_a_vit_and_is_none_is_refused(name):
    check_refusal(name, built(name))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["vit_[a-f]*", "vit_[g-m]*", "vit_[n-z]*", "deit*", "beit*", "eva*", "flexivit*"])
def test_every_vit_of_timms_is_known_or_refused(pattern):
    for name in timm.list_models(pattern):
        if "_distilled_" in name:
            continue  # its encoder is read, its two heads are not
        try:
            model = built(name)
        except (TypeError, AttributeError, AssertionError, ValueError, IndexError):
            continue  # a hybrid, whose layers have no depth to give
        (check_architecture if is_plain(model) else check_refusal)(name, model)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"architecture": "vit_base_patch16_rope_224"}, "timm's 'vit_base_patch16_rope_224' is no plain ViT"),
        ({"architecture": "resnet50"}, "timm's 'resnet50' is no plain ViT"),
        ({"architecture": "vit_base_patch16_224", "global_pool": "map"}, "global_pool 'map' is not known here"),
        ({"architecture": "vit_x", "model_args": {"act_layer": "mish"}}, "act_layer 'mish' is not known here"),
        ({"architecture": "vit_x", "model_args": {"embed_dim": 64}}, "embed_dim without num_heads"),
        ({"architecture": "vit_x", "model_args": {"norm_layer": "rmsnorm"}}, "norm_layer 'rmsnorm' is not known here"),
    ],
)
def test_timm_configurations_that_are_no_plain_vit_are_refused(tmp_path, config, message):
    torch.save(TimmViT(**TIMM).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_pretrained(str(tmp_path))


# ---------------------------------------------------------------- torchvision and Google


@pytest.mark.parametrize("representation_size", [None, 12])
def test_torchvision_files_give_their_logits_and_come_back(tmp_path, representation_size):
    theirs = TorchvisionViT(20, 5, 2, 2, 128, 40, num_classes=7, representation_size=representation_size)
    torch.save(parity.randomise(theirs).state_dict(), tmp_path / "vit.pth")
    ours, report = load_pretrained(str(tmp_path / "vit.pth"))
    assert_same_logits(ours, theirs)
    assert report.inferred["num_attention_heads"] == 2 and ours.config.layer_norm_eps == 1e-6
    assert_there_and_back(ours, theirs, tmp_path / "vit.pth", "torchvision", tmp_path / "back")


def test_torchvisions_old_names_of_the_mlp_are_read(tmp_path):
    theirs = parity.randomise(TorchvisionViT(20, 5, 2, 2, 128, 40, num_classes=7))
    names = {
        name: name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.") for name in theirs.state_dict()
    }
    torch.save({names[name]: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "vit.pth")
    assert_same_logits(load_pretrained(str(tmp_path / "vit.pth"))[0], theirs)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_googles_files_give_the_logits_of_timms_own_reader(tmp_path, prefix):
    sizes = {**TIMM, "embed_dim": 24, "num_heads": 3}  # the file says its heads: no guess from the width
    arrays = parity.flax_arrays(parity.randomise(TimmViT(**sizes)).state_dict(), 3)
    np.savez(tmp_path / "vit.npz", **{prefix + name: array for name, array in arrays.items()})
    theirs = TimmViT(**sizes).eval()
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    ours, _ = load_pretrained(str(tmp_path / "vit.npz"))
    assert ours.config.num_attention_heads == 3
    assert_same_logits(ours, theirs)
    assert_there_and_back(ours, theirs, tmp_path / "vit.npz", "timm", tmp_path / "back")


def test_googles_representation_layer_is_a_tanh_head(tmp_path):
    theirs = parity.randomise(TimmViT(**TIMM))
    arrays = parity.flax_arrays(theirs.state_dict(), 1)
    generator = np.random.default_rng(0)
    kernel, bias = generator.normal(size=(64, 64)).astype("f"), generator.normal(size=64).astype("f")
    np.savez(tmp_path / "vit.npz", **arrays, **{"pre_logits/kernel": kernel, "pre_logits/bias": bias})
    ours, _ = load_pretrained(str(tmp_path / "vit.npz"))

    def with_representation(images):
        hidden = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        return theirs.head(torch.tanh(hidden @ torch.from_numpy(kernel) + torch.from_numpy(bias)))

    assert_same_logits(ours, with_representation)


# ---------------------------------------------------------------- the sizes of the papers


@pytest.mark.parametrize(
    "library, kind",
    [("transformers", "ViT, old names"), ("timm", "DeiT III (LayerScale)"), ("torchvision", "ViT"), ("Google", "ViT")],
)
def test_ti_at_224_pixels_gives_its_logits_in_every_format(library, kind):
    row = parity.compare(library, kind, "Ti")
    assert row.ok and row.round_trip_identical and row.largest_logit > 1


@pytest.mark.slow
@pytest.mark.parametrize("size", ["B", *parity.LARGE])
@pytest.mark.parametrize("library", parity.MAKERS)
def test_large_networks_give_their_logits_in_every_format(library, size):
    assert parity.compare(library, parity.MAKERS[library][1][0], size).ok


def test_a_wrong_tensor_would_be_seen(monkeypatch):
    def load_wrongly(path):
        model, report = load_pretrained(path)
        model.vit.layers[1].mlp.fc1.bias.data += 0.01
        return model, report

    monkeypatch.setitem(parity.SIZES, "Ti", (64, 2, 1, 96, 32))
    monkeypatch.setattr(parity, "load_pretrained", load_wrongly)
    row = parity.compare("timm", "ViT", "Ti")
    assert not row.ok and not row.round_trip_identical and "NO" in parity.line(row)


def test_the_encoder_alone_is_what_a_base_model_loads(tmp_path):
    theirs = parity.randomise(TimmViT(**TIMM))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = ViTScratchModel.from_pretrained(tmp_path / "vit.pth")
    images = torch.randn(2, 3, 20, 20)
    assert torch.allclose(ours(images).last_hidden_state, theirs.forward_features(images), atol=1e-5)
