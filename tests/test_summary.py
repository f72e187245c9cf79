"""`vit-scratch summary`: parameters as transformers counts them, FLOPs as torch and as algebra count them."""

import pytest
import torch
from small_vit import SMALL, build
from torch.utils.flop_counter import FlopCounterMode

from modeling_vit_scratch import PRESETS, ViTScratchConfig, ViTScratchForImageClassification, cli
from modeling_vit_scratch.results.summary import summarise, summary_text


def totals(config):
    rows = summarise(config)
    return sum(row.num_parameters for row in rows), sum(row.flops for row in rows)


def algebra(config):
    """FLOP of one image: two a multiplication of patches, layers (four projections, two products, the MLP) and head."""
    patch_rows, patch_columns = config.patch_height_width
    hidden, tokens = config.hidden_size, config.num_patches + config.num_prefix_tokens
    width = config.num_attention_heads * config.attention_head_dim
    patches = config.num_patches * config.num_channels * patch_rows * patch_columns * hidden
    layer = 4 * tokens * hidden * width + 2 * tokens**2 * width + 2 * tokens * hidden * config.intermediate_size
    return 2 * (patches + config.num_hidden_layers * layer + hidden * config.num_labels)


@pytest.mark.parametrize(
    ("preset", "millions", "giga_macs"),
    # parameters: 2010.11929, table 1, and 2012.12877, table 1; GMAC at 224 pixels: as they are commonly given
    [("vit_b_16", 86.6, 17.6), ("deit_ti_16", 5.7, 1.25), ("deit_s_16", 22.1, 4.6), ("vit_l_16", 304.3, 61.6)],
)
def test_known_networks_have_their_known_sizes(preset, millions, giga_macs):
    parameters, flops = totals(ViTScratchConfig.from_preset(preset, num_labels=1000))
    assert round(parameters / 1e6, 1) == millions
    assert flops / 2e9 == pytest.approx(giga_macs, rel=0.005)


FIELDS = [
    {},
    {"num_register_tokens": 3, "qk_norm": True, "layer_scale_init": 0.1, "embedding_norm": True},
    {"patch_embedding": "linear", "pooling": "mean", "use_cls_token": False, "final_norm": "after_pooling"},
    {"head_dim": 12, "position_embedding_type": "rope2d", "patch_size": (4, 16), "image_size": (24, 48)},
    {"num_hidden_layers": 1, "qkv_bias": False, "position_embedding_type": "none", "num_channels": 1},
    {"num_labels": 0},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_rows_add_up_to_the_network(fields):
    config = ViTScratchConfig(**{**SMALL, **fields})
    model = build(**fields)
    model.set_attn_implementation("eager")  # torch does not count the CPU's fused kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, config.num_channels, *config.image_height_width))
    assert totals(config) == (model.num_parameters(), counter.get_total_flops())
    assert counter.get_total_flops() == algebra(config)


def test_heads_with_a_hidden_layer_are_counted_too():
    config = ViTScratchConfig(**SMALL, classifier="mlp", pooler_output_size=20)
    rows = {row.name: row for row in summarise(config)}
    assert rows["classifier.dense"].flops == 2 * 32 * 20 and rows["classifier.out"].flops == 2 * 20 * 5
    assert sum(row.num_parameters for row in rows.values()) == ViTScratchForImageClassification(config).num_parameters()


def test_a_row_says_what_its_modules_do():
    rows = {row.name: row for row in summarise(ViTScratchConfig(**SMALL, num_register_tokens=2))}
    tokens = 16 + 3
    fc1 = rows["vit.layers.*.mlp.fc1"]
    assert (fc1.count, fc1.shape_in, fc1.shape_out) == (2, (1, tokens, 32), (1, tokens, 48))
    assert fc1.num_parameters == 2 * (32 * 48 + 48) and fc1.flops == 2 * 2 * tokens * 32 * 48
    products = rows["vit.layers.*.attention"]
    assert (products.num_parameters, products.flops) == (0, 2 * 2 * 2 * tokens**2 * 32)
    own = rows["vit.embeddings"]
    assert (own.shape_out, own.num_parameters, own.flops) == ((1, tokens, 32), 3 * 32 + tokens * 32, 0)
    assert rows["classifier"].shape_in == (1, 32)


def test_nothing_is_computed_and_no_randomness_is_used():
    before = torch.get_rng_state()
    config = ViTScratchConfig.from_preset("vit_h_14", num_labels=1000)
    config._attn_implementation = "sdpa"
    summarise(config)  # 632 million parameters
    assert torch.equal(before, torch.get_rng_state()) and config._attn_implementation == "sdpa"


def test_the_table_is_in_units_that_can_be_read():
    small = summary_text(summarise(ViTScratchConfig(**SMALL))).splitlines()
    assert small[0].split()[-2:] == ["parameters", "MFLOP"]
    large = summary_text(summarise(ViTScratchConfig.from_preset("vit_b_16", num_labels=1000)))
    assert "86,567,656 parameters (330.2 MiB in float32), 35.128 GFLOP an image, forward." in large
    assert "A multiplication with its addition is 2 FLOP" in large


def test_the_command_takes_presets_runs_and_checkpoints(tmp_path, capsys):
    def printed(*arguments):
        assert cli.main(["summary", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert printed("micro") == summary_text(summarise(ViTScratchConfig.from_preset("micro", num_labels=10))) + "\n"
    changed = ViTScratchConfig.from_preset("article_4", image_size=64, num_labels=3)
    assert printed("article_4", "--image_size", 64, "--num_labels", 3) == summary_text(summarise(changed)) + "\n"
    assert PRESETS["article_4"]["num_labels"] == 10
    build().save_pretrained(tmp_path / "run" / "model")
    expected = summary_text(summarise(ViTScratchConfig(**SMALL))) + "\n"
    assert printed(tmp_path / "run" / "model") == expected
    (tmp_path / "run" / "recipe.json").write_text("{}")
    assert printed(tmp_path / "run") == expected
    wider = ViTScratchConfig(**{**SMALL, "image_size": 48, "num_labels": 7})
    assert printed(tmp_path / "run", "--image_size", 48, "--num_labels", 7) == summary_text(summarise(wider)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nanoo"], "No preset or folder 'nanoo'. Did you mean 'nano'?"),
        (["micro", "--image_size", "33"], "image_size: a height of 33 is not filled by patches of 4"),
        (["micro", "--num_labels", "0"], "--num_labels must be at least 1, got 0."),
        (["micro", "--num_labels", "x"], "Argument --num_labels: invalid int value: 'x'."),
        (["nowhere/model"], "nowhere/model"),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(arguments, text, capsys):
    assert cli.main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {text}") and error.count("\n") == 1
