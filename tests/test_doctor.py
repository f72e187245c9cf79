"""The doctor names every bug of the specimens, and finds nothing in networks that have none."""

import functools
import math
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from small_vit import build
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.doctor import CHECKS, examine
from modeling_vit_scratch.doctor import attention as attention_checks
from modeling_vit_scratch.doctor import learning as learning_checks
from modeling_vit_scratch.doctor.subject import Subject
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.specimens import SPECIMENS, HealthyViT, ReshapedPatchify

LONGEST = ("memorises_one_batch",)  # left out where it is not what a test is about


def examined(module, image_size=16, num_labels=10, **options):
    """Findings by the name of their check."""
    return {finding.check: finding for finding in examine(module, image_size, num_labels, **options)}


def failed(findings):
    return {name for name, finding in findings.items() if finding.passed is False}


@functools.cache
def findings_of(name):
    torch.manual_seed(0)
    specimen = SPECIMENS[name]
    module = specimen.build()
    optimizer = None if specimen.optimizer is None else specimen.optimizer(module)
    return examined(module, specimen.image_size, optimizer=optimizer, skip=LONGEST)


# ---------------------------------------------------------------- bugs


@pytest.mark.parametrize("name", SPECIMENS)
def test_each_bug_is_named_with_its_cause_and_remedy(name):
    finding = findings_of(name)[SPECIMENS[name].check]
    assert finding.passed is False
    for text in (finding.measured, finding.expected, finding.cause, finding.remedy):
        assert text and "\n" not in text


def test_every_check_can_fail():
    found = set().union(*(failed(findings_of(name)) for name in SPECIMENS))
    assert found == set(CHECKS) - set(LONGEST)
    torch.manual_seed(0)
    others = set(CHECKS) - set(LONGEST) - {"output_shape"}
    squashed = examined(SPECIMENS["softmax_before_the_loss"].build(), skip=others)
    assert squashed["memorises_one_batch"].passed is False


@pytest.mark.parametrize(
    "name, text",
    [
        ("scaled_by_sequence_length", "the root of the number of tokens, 17,"),
        ("scaled_by_hidden_size", "the root of the hidden size, 32,"),
        ("unscaled_attention", "nothing at all"),
        ("attention_over_the_batch", "nn.MultiheadAttention has its sequence on the first axis"),
        ("positions_not_registered", "positions is a plain attribute"),
        ("tokens_not_optimized", "groups are made from endings"),
        ("border_left_out", "16 x 16 of 18 x 18 pixels"),
        ("head_on_a_patch", "no class token was put in front"),
        ("head_on_the_last_token", "the class token is elsewhere"),
    ],
)
def test_the_cause_is_the_mistake_that_was_made(name, text):
    assert text in findings_of(name)[SPECIMENS[name].check].cause


def test_article_1_is_seen_to_read_strips_of_one_channel():
    assert "1 of 3 channels" in findings_of("patches_by_reshape")["true_patches"].measured


def test_a_network_on_patches_is_wrapped_with_its_patchify():
    class OnPatches(HealthyViT):
        def embed(self, patches):
            tokens = self.projection(patches)
            return torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1) + self.positions

    network = OnPatches()
    network.patchify = nn.Identity()
    assert failed(examined(nn.Sequential(ReshapedPatchify(4), network), skip=LONGEST)) == {"true_patches"} | (
        {"dropout_modes"}  # the embeddings' own is not called here
    )


# ---------------------------------------------------------------- healthy networks

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def ours(preset, **fields):
    return ViTScratchForImageClassification(ViTScratchConfig.from_preset(preset, **{"num_labels": 10, **fields}))


HEALTHY = {
    "specimens": (HealthyViT, 16, 3),
    "nano": (lambda: ours("nano", **SMALL), 32, 3),
    "digits": (lambda: ours("digits"), 8, 1),
    "article_2": (lambda: ours("article_2", image_size=32, patch_size=8, **SMALL), 32, 3),
    "registers": (
        lambda: ours("nano", patch_size=8, num_register_tokens=3, use_cls_token=True, pooling="cls", **SMALL),
        32,
        3,
    ),
    "post-norm": (lambda: ours("nano", patch_size=8, pre_norm=False, **SMALL), 32, 3),
    "starts as the identity": (
        lambda: ours("nano", patch_size=8, zero_init_residual=True, layer_scale_init=1e-5, **SMALL),
        32,
        3,
    ),
    "transformers": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **SMALL)
        ),
        32,
        3,
    ),
    "timm": (
        lambda: timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=10),
        32,
        3,
    ),
    "timm with rotary positions": (
        lambda: timm.models.Eva(32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=10, use_rot_pos_emb=True),
        32,
        3,
    ),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, dropout=0.1, num_classes=10),
        32,
        3,
    ),
}

MEMORISING = ("specimens", "nano", "digits", "transformers", "torchvision")  # the others are spared the seconds


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_passes_clean(name):
    torch.manual_seed(3)
    make, image_size, num_channels = HEALTHY[name]
    module = make()
    optimizer = torch.optim.AdamW(module.parameters())
    skip = () if name in MEMORISING else LONGEST
    findings = examined(module, image_size, num_channels=num_channels, optimizer=optimizer, skip=skip)
    assert failed(findings) == set()
    passed = {check for check, finding in findings.items() if finding.passed}
    # a network without dropout, and layers that know positions, leave these open
    assert set(CHECKS) - passed - set(skip) <= {"dropout_modes", "layer_equivariance", "token_equivariance"}


@pytest.mark.parametrize("num_labels", [2, 3])
def test_few_classes_are_not_taken_for_an_activation_after_the_head(num_labels):
    skip = set(CHECKS) - {"output_shape", "outputs_are_logits", "half_precision"}
    for seed in range(30):
        torch.manual_seed(seed)
        findings = examined(HealthyViT(num_labels=num_labels), num_labels=num_labels, skip=skip)
        assert failed(findings) == set(), seed
    for activation in (nn.ReLU(), nn.Sigmoid(), nn.Softmax(dim=1)):
        squashed = nn.Sequential(HealthyViT(num_labels=num_labels), activation)
        assert "outputs_are_logits" in failed(examined(squashed, num_labels=num_labels, skip=skip))


def test_images_normalised_inside_the_network_are_no_layer_norm():
    network = nn.Sequential(torchvision.transforms.Normalize([0.5] * 3, [0.5] * 3), HealthyViT())
    assert failed(examined(network, skip=LONGEST)) == set()


def test_maps_of_attention_that_a_forward_leaves_are_no_hidden_parameters():
    class Watched(HealthyViT):
        def forward(self, images):
            logits = super().forward(images)
            self.last = logits * 1
            return logits

    for context in (torch.enable_grad(), torch.no_grad()):
        network = Watched()
        with context:
            network(torch.zeros(1, 3, 16, 16))
        assert failed(examined(network, skip=LONGEST)) == set()
        network.table = torch.zeros(3)
        assert failed(examined(network, skip=LONGEST)) == {"registered_parameters"}


def test_the_matrix_of_the_patches_and_those_of_the_first_layer_are_no_pair():
    network = ours("digits", patch_embedding="linear", pre_norm=False)
    assert "nonlinearities" not in failed(examined(network, 8, num_channels=1, skip=LONGEST))


def test_a_layer_that_gives_numbers_that_are_none_has_no_residual_connection():
    network = HealthyViT()
    # where its matrices are zero, as the check makes them; the layers after it are healthy
    network.layers[0].register_forward_hook(
        lambda part, args, output: output if part.mlp[0].weight.any() else output * math.nan
    )
    finding = examined(network, skip=set(CHECKS) - {"residual_connections"})["residual_connections"]
    assert not finding.passed and finding.measured.startswith("correlation nan")


def test_a_network_without_tokens_is_not_blamed_for_it():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
    findings = examined(network)
    assert failed(findings) == set()
    assert findings["layer_equivariance"].measured == (
        "not applicable: no layers that map tokens (B, N, D) to tokens were found"
    )
    assert findings["attention_scale"].passed is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_the_scale_is_read_exactly_out_of_every_attention(attention, head_dim):
    module = build(head_dim=head_dim)
    module.set_attn_implementation(attention)
    scores = attention_checks.watched(Subject(module, (32, 32), 5, 3, None)).scores
    assert [seen.width for seen in scores] == [head_dim or 8] * 2
    assert [seen.factor for seen in scores] == pytest.approx([(head_dim or 8) ** -0.5] * 2, rel=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_scale_is_read_where_queries_are_scaled_before_the_product(need_weights):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, images):
            tokens = images.flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=need_weights)[0][:, 0]

    findings = examined(Attends(), image_size=3, num_labels=24, num_channels=24, skip=LONGEST)
    assert findings["attention_weights"].passed
    assert findings["attention_scale"].measured == f"scores times {1 / math.sqrt(24 / 4):.4g}"


# ---------------------------------------------------------------- what an examination leaves alone


def test_the_network_and_the_random_states_stay_as_they_were():
    torch.manual_seed(5)
    module = nn.Sequential(nn.BatchNorm2d(3), SPECIMENS["layers_in_a_list"].build(), nn.Identity())
    module[1].eval()
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    fast = torch.backends.mha.get_fastpath_enabled()
    examine(module, 16, 10, skip=LONGEST)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_an_examination_says_the_same_twice():
    torch.manual_seed(0)
    module = HealthyViT()
    first = examine(module, 16, 10, skip=LONGEST)
    torch.manual_seed(99)
    assert examine(module, 16, 10, skip=LONGEST) == first


@pytest.mark.parametrize("wrap", [lambda logits: (logits, None), lambda logits: {"loss": None, "logits": logits}])
def test_logits_are_found_in_tuples_and_dicts(wrap):
    class Wrapped(HealthyViT):
        def forward(self, images):
            return wrap(super().forward(images))

    torch.manual_seed(0)
    assert failed(examined(Wrapped(), skip=LONGEST)) == set()


# ---------------------------------------------------------------- what cannot be examined is said


def test_a_network_that_raises_gives_a_finding_and_not_a_crash():
    findings = examined(HealthyViT(), image_size=10)  # 4 does not divide 10
    assert failed(findings) == {"output_shape"}
    assert findings["output_shape"].measured.startswith("B = 1 raised RuntimeError: shape")
    assert findings["pooling"].measured == "not applicable: the network gives no logits to look at"


def test_a_wrong_number_of_classes_is_said():
    findings = examined(HealthyViT(num_labels=7))
    assert findings["output_shape"].measured == "(1, 7) for B = 1"


def test_a_network_that_raises_inside_a_check_is_said():
    class NeedsNoGradient(HealthyViT):
        def forward(self, images):
            if images.requires_grad:
                raise ValueError("no gradients for pixels")
            return super().forward(images)

    findings = examined(NeedsNoGradient(), skip=LONGEST)
    assert findings["every_patch_counts"].measured == "raised ValueError: no gradients for pixels"
    assert findings["layer_equivariance"].passed


def test_a_large_network_skips_memorising_and_says_so(monkeypatch):
    monkeypatch.setattr(learning_checks, "LARGEST_MEMORISING", 1000)
    finding = examined(HealthyViT())["memorises_one_batch"]
    assert finding.passed is None and "would take more than a minute" in finding.measured


def test_a_check_is_skipped_on_request():
    findings = examined(SPECIMENS["positions_forgotten"].build(), skip=("patch_order_matters", *LONGEST))
    assert failed(findings) == set()
    assert findings["patch_order_matters"].measured == "not applicable: skipped on request"


def test_parameters_of_another_network_in_the_optimizer_are_found():
    module = HealthyViT()
    optimizer = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)
    finding = examined(module, optimizer=optimizer, skip=LONGEST)["one_optimizer_group_each"]
    assert finding.measured == "1 tensors that are not the network's"


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"num_labels": 1}, "num_labels must be at least 2, got 1"),
        ({"image_size": 0}, "Expected positive sizes"),
        ({"skip": ("pool",)}, "No check 'pool'. Did you mean 'pooling'?"),
    ],
)
def test_what_cannot_be_examined_is_refused(arguments, text):
    with pytest.raises(UserError, match=text.replace("?", r"\?")):
        examine(HealthyViT(), **{"image_size": 16, "num_labels": 10, **arguments})
