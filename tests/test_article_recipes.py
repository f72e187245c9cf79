"""The articles' recipes: as printed they have the articles' sizes and bugs, which the doctor names; mended, none."""

import re

import pytest
import torch
from safetensors.torch import load_file
from test_run_options import die_at
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.doctor import CHECKS, examine
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.specimens import SPECIMENS, ReshapedPatchify, optimizer_without_tokens
from modeling_vit_scratch.training import loop
from modeling_vit_scratch.training.article_recipes import ARTICLES, MENDED, PRINTED
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.optimization import OPTIMIZERS, parameter_groups
from modeling_vit_scratch.training.overrides import parse_overrides
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.schedules import learning_rate_at
from modeling_vit_scratch.training.specimen import INTO_OURS, make_specimen

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 10}
SIZES = {
    "article_1": {"head_dim": 32},
    "article_2": {"image_size": 32, "patch_size": 8},
    "article_3": {"image_size": 28},
}
WITH_BUGS = [name for name, fields in PRINTED.items() if fields.get("specimen")]


def fields_of(name):
    """A small network's fields over the recipe's preset."""
    return {**parse_overrides(RECIPES[name].config_overrides), **SMALL, **SIZES.get(name.removesuffix("_mended"), {})}


def network(name, specimen="the recipe's", **fields):
    torch.manual_seed(0)
    recipe = RECIPES[name]
    model = ViTScratchForImageClassification(ViTScratchConfig.from_preset(recipe.preset, **fields_of(name), **fields))
    specimen = recipe.specimen if specimen == "the recipe's" else specimen
    if specimen is not None:
        make_specimen(model, specimen)
    return model


def failures(model, skip=("memorises_one_batch",), optimizer=None):
    config = model.config
    found = examine(model, config.image_height_width, 10, config.num_channels, optimizer, skip=skip)
    return {finding.check: finding for finding in found if finding.passed is False}


def flags(name, repository, folder, *more):
    """The command line of a run of two steps of a small network on a tiny set."""
    fields = fields_of(name)
    del fields["num_labels"]
    fields.pop("image_size", None)
    overrides = ",".join(f"{field}={value}" for field, value in fields.items())
    words = ["--recipe", name, "--dataset_name", repository, "--config_overrides", overrides, "--max_steps", 2]
    words += ["--train_batch_size", 16, "--report_to", "none", "--output_dir", folder]
    words += ["--image_size", 32] if name.startswith("article_2") else []
    return [str(word) for word in (*words, *more)]


@pytest.fixture
def unpublished(monkeypatch):
    """Runs without plots and report, which take longer than two steps."""
    monkeypatch.setattr(loop, "publish", lambda *arguments: None)


def run(*arguments):
    return loop.train(*parse_arguments(flags(*arguments)))


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name, num_labels, parameters",
    [
        ("article_0", 10, 2_857_162),
        ("article_1", 10, 63_083_018),
        ("article_2", 3, 85_800_963),
        ("article_2", 1000, 86_567_656),
        ("article_4", 10, 3_189_002),
    ],
)
def test_the_networks_have_the_articles_numbers_of_parameters(name, num_labels, parameters):
    for recipe in (RECIPES[name], RECIPES[f"{name}_mended"]):
        with torch.device("meta"):
            config = ViTScratchConfig.from_preset(recipe.preset, num_labels=num_labels)
            model = ViTScratchForImageClassification(config)
            if recipe.specimen is not None:
                make_specimen(model, recipe.specimen)
        assert model.num_parameters() == parameters


@pytest.mark.parametrize("name", WITH_BUGS)
def test_the_doctor_names_each_bug_of_an_article_as_printed(name):
    bugs = RECIPES[name].specimen.split(",")
    for bug in bugs:
        model = network(name, bug)
        optimizer = SPECIMENS[bug].optimizer and SPECIMENS[bug].optimizer(model)
        assert SPECIMENS[bug].check in failures(model, optimizer=optimizer), bug
    together = failures(network(name))
    assert {SPECIMENS[bug].check for bug in bugs if SPECIMENS[bug].optimizer is None} <= set(together)


@pytest.mark.parametrize("name", [name for name in ARTICLES if name not in WITH_BUGS])
def test_the_doctor_finds_nothing_in_a_network_without_bugs(name):
    model = network(name)
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW([{"params": group.parameters} for group in groups])
    assert failures(model, skip=(), optimizer=optimizer) == {}


@pytest.mark.parametrize("bug", INTO_OURS)
def test_every_bug_that_can_be_put_into_our_network_is_named_there_too(bug):
    model = network("article_3", bug, num_channels=3)  # patches of one channel are right however they are reshaped
    others = set(CHECKS) - {SPECIMENS[bug].check, "output_shape"}
    optimizer = SPECIMENS[bug].optimizer and SPECIMENS[bug].optimizer(model)
    assert set(failures(model, others, optimizer)) == {SPECIMENS[bug].check}


def test_article_3_leaves_out_the_last_four_rows_and_columns_of_a_digit():
    finding = failures(network("article_3", "border_left_out"))["every_patch_counts"]
    assert "only 24 x 24 of 28 x 28 pixels" in finding.cause


def test_as_printed_and_mended_start_from_the_same_weights():
    printed, mended = network("article_4"), network("article_4_mended")
    old = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    renamed = {
        re.sub(r"attention\.attention\.(\w+)", lambda found: f"attention.{old[found[1]]}", name): tensor
        for name, tensor in printed.state_dict().items()
    }
    expected = mended.state_dict()
    assert set(renamed) == set(expected) != set(printed.state_dict())
    assert all(torch.equal(renamed[name], tensor) for name, tensor in expected.items())


class Article4Attention(nn.Module):
    """The attention that article 4 prints, line by line."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.dim, self.n_heads, self.head_dim = dim, n_heads, dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x):
        b, seq_len, _ = x.shape
        q, k, v = (w(x).view(b, seq_len, self.n_heads, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attn = torch.matmul(q, k.transpose(2, 3)) / self.head_dim**0.5
        out = torch.matmul(attn.softmax(dim=-1), v)
        return self.wo(out.contiguous().view(b, seq_len, -1))


def test_article_4s_layers_compute_what_its_printed_code_computes():
    ours = network("article_4").vit.layers[0].attention
    printed = Article4Attention(32, 4)
    for mine, name in zip((printed.wq, printed.wk, printed.wv, printed.wo), ("query", "key", "value", "output")):
        mine.load_state_dict(getattr(ours.attention, name).state_dict())
    tokens = torch.randn(2, 65, 32)
    torch.testing.assert_close(ours(tokens)[0], printed(tokens))
    mended = network("article_4_mended").vit.layers[0].attention
    assert not torch.allclose(mended(tokens)[0], printed(tokens), atol=1e-2)


class Article1Attention(nn.Module):
    """The heads that article 1 prints: each of the full width, scaled by the root of q.size(1)."""

    def __init__(self, size, num_heads):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(size, size) for name in ("query", "key", "value")}) for _ in range(num_heads)
        )
        self.linear = nn.Linear(size * num_heads, size)

    def forward(self, x):
        outputs = []
        for head in self.heads:
            q, k, v = (head[name](x) for name in ("query", "key", "value"))
            scores = torch.bmm(q, k.transpose(1, 2)) / q.size(1) ** 0.5
            outputs.append(torch.bmm(scores.softmax(dim=-1), v))
        return self.linear(torch.cat(outputs, dim=-1))


def test_article_1s_layers_compute_what_its_printed_code_computes():
    ours = network("article_1").vit.layers[0].attention
    printed = Article1Attention(32, 4)
    for name in ("query", "key", "value"):
        matrix = getattr(ours.attention, name)
        for index, head in enumerate(printed.heads):
            rows = slice(32 * index, 32 * (index + 1))
            head[name].load_state_dict({"weight": matrix.weight[rows], "bias": matrix.bias[rows]})
    printed.linear.load_state_dict(ours.attention.output.state_dict())
    tokens = torch.randn(2, 65, 32)
    torch.testing.assert_close(ours(tokens)[0], printed(tokens))


def test_article_1s_patches_are_those_of_its_printed_code():
    image = torch.randn(3, 32, 32)
    printed = image.unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 4 * 4 * 3)
    assert torch.equal(ReshapedPatchify(4)(image[None])[0], printed)
    embeddings = network("article_1").vit.embeddings.patch_embeddings
    torch.testing.assert_close(embeddings(image[None])[0], embeddings.projection(printed))


def test_article_1s_tokens_stay_where_they_start_and_all_else_moves():
    recipe = RECIPES["article_1"].replace(learning_rate=0.1)
    model = network("article_1").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = OPTIMIZERS[recipe.optim](parameter_groups(model, recipe.weight_decay), recipe)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32), labels=torch.arange(4)).loss.backward()
        optimizer.step()
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == model.no_weight_decay()
    held = {id(value) for group in optimizer_without_tokens(model).param_groups for value in group["params"]}
    assert still == {name for name, value in model.named_parameters() if id(value) not in held}


@pytest.mark.parametrize(
    "bugs, overrides, message",
    [
        ("merged", {}, "No specimen 'merged'."),
        ("layers_in_a_list", {}, "No specimen 'layers_in_a_list'.*Known: .*merged_without_transpose"),
        ("positions_forgotten", {"position_embedding_type": "sincos2d"}, "needs .* position_embedding_type=learned"),
        ("", {}, "--specimen takes bugs, each once, got ''"),
        ("unscaled_attention,unscaled_attention", {}, "each once"),
        ("unscaled_attention,scaled_by_hidden_size", {}, "both change the same step of attention"),
        ("causal_attention,attention_over_the_batch", {}, "both change the same step of attention"),
        ("attention_over_the_batch", {}, "needs the default head_dim and biases"),
        (
            "causal_attention",
            {"position_embedding_type": "rope2d"},
            r"overrides position_embedding_type=learned\.",
        ),
        (
            "causal_attention",
            {"attention_probs_dropout_prob": 0.1},
            r"overrides attention_probs_dropout_prob=0\.",
        ),
        ("patches_by_reshape", {"patch_embedding": "conv"}, "patch_embedding=linear"),
        ("border_left_out", {"image_size": 40}, "patches of 5 pixels, one more than the configuration's, do not fill"),
    ],
)
def test_bugs_that_do_not_fit_are_said_in_one_line(bugs, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        network("article_4_mended", bugs, **overrides)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- recipes


def test_a_mended_recipe_differs_from_the_printed_one_in_its_bugs_alone():
    assert set(MENDED) == set(PRINTED) and set(ARTICLES) == {*PRINTED, *(f"{name}_mended" for name in PRINTED)}
    for name in PRINTED:
        printed, mended = (RECIPES[recipe].to_dict() for recipe in (name, f"{name}_mended"))
        differing = {field for field in printed if printed[field] != mended[field]}
        assert differing == {"recipe", *MENDED[name]}
        assert mended["specimen"] is None


def test_article_4s_rate_falls_after_80_and_130_of_150_epochs():
    recipe, steps = RECIPES["article_4"], 150 * 100
    rates = [learning_rate_at(epoch * 100 + 50, steps, recipe) for epoch in (0, 79, 80, 129, 130, 149)]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6])


def test_article_1s_rate_ends_at_the_default_and_mended_at_its_constant():
    ends = [learning_rate_at(10**6 - 1, 10**6, RECIPES[name]) for name in ("article_1", "article_1_mended")]
    assert ends == pytest.approx([4e-5, 2.5e-5], rel=1e-4)


@pytest.mark.parametrize("name", ARTICLES)
def test_every_article_trains(name, parquet_repo, tmp_path, unpublished):
    side = 28 if name.startswith("article_3") else 32
    repository = parquet_repo(num_classes=10, size=(side, side), train=[40], test=[10])
    results = run(name, repository, tmp_path / "run")
    assert results["steps"] == 2 and 0 <= results["test_accuracy"] <= 1
    assert results["specimen"] == RECIPES[name].specimen


def test_a_specimen_is_scored_and_resumed_and_not_published(parquet_repo, tmp_path, monkeypatch, capsys):
    repository = parquet_repo(num_classes=10, size=(32, 32), train=[40], test=[10])
    more = ("--max_steps", 4, "--save_steps", 2, "--logging_steps", 1)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "publish", lambda *arguments: None)
        run("article_1", repository, tmp_path / "whole", *more)
    die_at(monkeypatch, 3)
    with pytest.raises(Exception, match="^$"):
        run("article_1", repository, tmp_path / "broken", *more)
    capsys.readouterr()
    run("article_1", repository, tmp_path / "broken", *more)
    tensors = [load_file(tmp_path / run / "checkpoints/step-000004/model.safetensors") for run in ("whole", "broken")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert "model: This folder holds no weights" in capsys.readouterr().out
    model = tmp_path / "broken" / "model"
    assert [file.name for file in model.iterdir()] == ["README.md"]
    assert RECIPES["article_1"].specimen in (model / "README.md").read_text(encoding="utf-8")
    assert "patches_by_reshape" in (tmp_path / "broken" / "report.html").read_text(encoding="utf-8")


def test_a_run_goes_on_with_its_own_bugs_alone(parquet_repo, tmp_path, unpublished):
    repository = parquet_repo(num_classes=10, size=(32, 32), train=[40], test=[10])
    run("article_4", repository, tmp_path / "run")
    with pytest.raises(UserError, match="specimen: 'merged_without_transpose' -> 'causal_attention'"):
        run("article_4", repository, tmp_path / "run", "--specimen", "causal_attention")


def test_bugs_and_a_checkpoint_exclude_each_other(parquet_repo, tmp_path):
    repository = parquet_repo(num_classes=10, size=(32, 32), train=[40], test=[10])
    words = ["--recipe", "finetune", "--dataset_name", str(repository), "--output_dir", str(tmp_path / "run")]
    words += ["--model_name_or_path", str(tmp_path), "--specimen", "causal_attention", "--report_to", "none"]
    with pytest.raises(UserError, match="--specimen has no effect here: the checkpoint decides the network"):
        loop.train(*parse_arguments(words))
