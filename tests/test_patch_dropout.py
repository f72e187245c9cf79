"""patch_drop_rate: timm's PatchDropout and attention masks as oracles, and runs that end with all patches."""

import json

import pytest
import torch
import transformers
from small_vit import build, images
from test_checkpoint_rates import published
from test_modeling_oracles import FROM_TIMM, assert_same, ours_with, randomised, rename
from test_run_options import assert_killed_runs_end_alike
from test_run_train import TINY, equal, launch, metrics, run, weights
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.data.augmentation import Draws
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchPatchDropout
from modeling_vit_scratch.training import effects, loop
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.recipe import COUNTED_LENGTHS
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.resolution import Resolution, resolution_of
from modeling_vit_scratch.training.run_folder import may_change_on_resume, open_run
from modeling_vit_scratch.training.sweep_grid import parse_sweep
from modeling_vit_scratch.training.time_budget import Rehearsal

HALF = ["--config_overrides", f"{TINY},patch_drop_rate=0.5"]  # digits have 16 patches
NETWORKS = {
    "class token": {},
    "registers, mean": {"num_register_tokens": 2, "pooling": "mean"},
    "no prefix": {"use_cls_token": False, "pooling": "mean"},
    "rotary": {"position_embedding_type": "rope2d", "num_register_tokens": 1},
    "fixed": {"position_embedding_type": "sincos2d", "embedding_norm": True},
}


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75, 0.99])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"reg_tokens": 3, "pre_norm": True}, {"num_register_tokens": 3, "embedding_norm": True, "patch_bias": False}),
        (
            {"global_pool": "avg", "class_token": False, "fc_norm": False},
            {"pooling": "mean", "use_cls_token": False},
        ),
    ],
    ids=["class token", "registers", "mean"],
)
def test_with_the_same_draws_logits_and_gradients_are_those_of_timms_patch_dropout(theirs, ours, rate):
    make = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    reference = randomised(lambda: make(**sizes, num_classes=7, patch_drop_rate=rate, **theirs)).train()
    fields = {
        "image_size": 32, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "num_labels": 7, "layer_norm_eps": 1e-6, "patch_drop_rate": rate,
    }  # fmt: skip
    model = ours_with(rename(reference.state_dict(), FROM_TIMM), **fields, **ours).train()
    found = []
    for network in (model, reference):
        torch.manual_seed(3)
        pixel_values = images(5, 3, 32, 32).requires_grad_()
        logits = network(pixel_values)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        logits.square().sum().backward()
        found.append((logits, pixel_values.grad))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_what_stays_is_as_if_the_rest_were_masked_and_keeps_its_position(fields, is_masked):
    model = build(ViTScratchModel, patch_drop_rate=0.5, **fields).train()
    model.set_attn_implementation("eager")
    prefix = model.config.num_prefix_tokens
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    kept = scores.argsort(dim=1)[:, :8] + prefix
    kept = torch.cat((torch.arange(prefix).expand(3, -1), kept), dim=1)
    stays = torch.zeros(3, prefix + 16, dtype=torch.long).scatter(1, kept, 1)
    mask = None
    if is_masked:  # a mask of the caller's own goes with its tokens
        mask = torch.ones_like(stays)
        mask[:, prefix + 1 : prefix + 4] = 0
    expected = model.eval()(images(), attention_mask=stays if mask is None else stays * mask).last_hidden_state
    expected = expected.gather(1, kept[:, :, None].expand(-1, -1, 32))
    pixel_values = images()
    found = model.train()(pixel_values, attention_mask=mask, noise=scores).last_hidden_state
    visible = torch.ones_like(kept) if mask is None else mask.gather(1, kept)
    torch.testing.assert_close(found[visible == 1], expected[visible == 1], rtol=1e-5, atol=1e-5)


def test_each_patch_of_each_image_stays_as_often_as_the_rate_says_and_prefix_tokens_always():
    dropout = ViTScratchPatchDropout(build(patch_drop_rate=0.25, num_register_tokens=2).config).train()
    torch.manual_seed(0)
    tokens = torch.arange(19.0)[None, :, None].expand(2000, -1, 4)
    left, kept = dropout(tokens, noise=None)
    assert left.shape == (2000, 3 + 12, 4) and torch.equal(left[:, :, 0], kept.float())
    assert torch.equal(kept[:, :3], torch.arange(3).expand(2000, -1))
    counts = kept[:, 3:].flatten().bincount(minlength=19)
    assert not counts[:3].any() and (counts[3:] - 1500).abs().max() < 100  # of 2,000 with deviations of 19
    assert all(len(set(row.tolist())) == 15 for row in kept)
    assert len({tuple(sorted(row.tolist())) for row in kept[:50]}) > 45  # each image has its own


def test_noise_says_which_patches_stay_as_transformers_mae_has_it():
    theirs = transformers.ViTMAEConfig(image_size=8, patch_size=2, mask_ratio=0.5)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    tokens = torch.randn(3, 17, 4, generator=torch.Generator().manual_seed(3))
    expected, _, _ = ViTMAEEmbeddings(theirs).random_masking(tokens[:, 1:], noise)
    found, kept = ViTScratchPatchDropout(build(patch_drop_rate=0.5).config).train()(tokens, noise)
    assert torch.equal(found[:, 1:], expected) and torch.equal(found[:, 0], tokens[:, 0]) and not kept[:, 0].any()
    model = build(patch_drop_rate=0.5)
    assert torch.equal(model(images(), noise=noise).logits, model(images()).logits)  # all stay in evaluation
    with pytest.raises(ValueError, match=r"noise must be of shape \(3, 16\), got \(3, 17\)"):
        model.train()(images(), noise=torch.rand(3, 17))


def test_all_patches_stay_in_evaluation_and_one_at_least_in_training():
    model = build(patch_drop_rate=0.9999)
    assert torch.equal(model(images()).logits, build()(images()).logits)
    sizes = []
    model.vit.layers[0].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    model(images())
    model.train()(images())
    assert sizes == [17, 2]


@pytest.mark.parametrize("noise", [None, torch.rand(3, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1)])
@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_it_trains_compiled_in_one_graph_and_under_gradient_checkpointing(fields, noise):
    torch.compiler.reset()
    model = build(patch_drop_rate=0.5, **fields).train()

    def loss_and_gradients(network):
        torch.manual_seed(0)
        loss = network(images(), labels=torch.tensor([0, 1, 2]), noise=noise).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *gradients]

    plain = loss_and_gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(plain, loss_and_gradients(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(plain, loss_and_gradients(model), strict=True))


# ---------------------------------------------------------------- a run


def of_training(tokens: list[tuple[bool, int]]) -> list[int]:
    return [number for is_training, number in tokens if is_training][::2]  # TINY has two layers


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], [8] * 10),
        (["--full_size_step", 0.3], [8] * 3 + [16] * 7),
        (["--full_size_step", 7], [8] * 7 + [16] * 3),
        (["--initial_image_size", 4], [2] * 6 + [16] * 4),  # four patches, two of which stay
    ],
)
def test_patches_are_left_out_until_all_is_shown_and_never_in_evaluation(tmp_path, tokens, flags, expected):
    parts = ["--gradient_accumulation_steps", 1, "--train_batch_size", 50]
    results = run(tmp_path / "run", "--max_steps", 10, "--eval_steps", 2, *parts, *HALF, *flags)
    assert of_training(tokens) == expected
    assert {number for is_training, number in tokens if not is_training} == {16}
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")
    # a network that came to see all of its images is not trained on without a half of them
    assert model.config.patch_drop_rate == (0.0 if flags else 0.5)

    def flops(side: int, rate: float) -> int:
        model.vit.patch_dropout.train().rate = rate
        with FlopCounterMode(display=False) as counter:
            batch = torch.zeros(50, 1, side, side, requires_grad=True)
            model(batch, interpolate_pos_encoding=True).logits.sum().backward()
        return counter.get_total_flops()

    kinds = {2: (4, 0.5), 8: (8, 0.5), 16: (8, 0.0)}
    assert results["train_pflop"] == pytest.approx(sum(flops(*kinds[number]) for number in expected) / 1e15, rel=1e-6)


def test_weights_of_a_step_before_all_patches_are_published_with_their_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "record_evaluation", lambda _, position, *__: setattr(position, "best_step", 1))
    run(tmp_path / "run", "--max_steps", 5, "--eval_steps", 1, *HALF, "--full_size_step", 0.6,
        "--load_best_model_at_end", "true")  # fmt: skip
    assert published(tmp_path / "run").config.patch_drop_rate == 0.5


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_killed_in_either_stage_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, streaming):
    arguments = [*HALF, "--full_size_step", 0.6, "--streaming", streaming, "--max_steps", 10, "--save_steps", 2,
                 "--logging_steps", 3, "--train_batch_size", 48, "--ema_decay", 0.5]  # fmt: skip
    assert_killed_runs_end_alike(tmp_path, monkeypatch, arguments, 3, 9)


def test_an_image_keeps_its_patches_whatever_part_or_process_it_is_on(tmp_path):
    common = ["--max_steps", 10, "--train_batch_size", 51, "--logging_steps", 1, "--dtype", "float64"]
    common += ["--dataset_name", "digits", "--report_to", "none", *HALF, "--full_size_step", 0.6]
    run(tmp_path / "one", *common, "--gradient_accumulation_steps", 1)
    run(tmp_path / "parts", *common, "--gradient_accumulation_steps", 4)
    done = launch(2, *common, "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [row["loss"] for row in metrics(tmp_path / "one") if "loss" in row]
    assert len(losses) == 10
    for other in ("parts", "two"):  # the same sums in another order
        assert [row["loss"] for row in metrics(tmp_path / other) if "loss" in row] == pytest.approx(losses, abs=1e-9)


def test_a_budgeted_run_rehearses_both_kinds_of_steps(tmp_path, monkeypatch, tokens, capsys):
    monkeypatch.setattr(Rehearsal, "steps_within", lambda *_: 5)
    one_part = ["--gradient_accumulation_steps", 1]
    budgeted = run(tmp_path / "budgeted", "--time_budget", "2s", *HALF, "--full_size_step", 0.6, *one_part)
    seen = of_training(tokens)
    assert seen[-5:] == [8, 8, 8, 16, 16] and seen[:-5] == sorted(seen[:-5]) and {8, 16} == set(seen[:-5])
    out = capsys.readouterr().out
    assert " s and then " in out and "3 steps with 8 of 16 patches, drawn anew for each image, then 2 with all" in out
    counted = run(tmp_path / "counted", "--max_steps", 5, *HALF, "--full_size_step", 0.6, *one_part)
    assert equal(weights(tmp_path / "budgeted"), weights(tmp_path / "counted"))
    assert loop.final_scores(budgeted) == loop.final_scores(counted)


def test_what_is_left_out_is_said(capsys, tmp_path):
    run(tmp_path / "run", "--max_steps", 2, *HALF)
    assert "every step with 8 of 16 patches, drawn anew for each image" in capsys.readouterr().out
    config = build(patch_size=4).config
    assert Resolution(24, 0.6, 0.3).stages(1000, config) == [
        "600 steps at 24 pixels with 25 of 36 patches, drawn anew for each image, then 400 at full size"
    ]


def test_a_first_step_counts_as_its_patches_do():
    config = build().config  # 16 patches
    assert Resolution(None, 0.5, 0.3).work(10, 20, config) == pytest.approx(10 * 11 / 16)
    assert Resolution(16, 0.5, 0.5).work(20, 20, config) == pytest.approx(10 * 2 / 16 + 10)
    assert Resolution(None, None, 0.5).work(10, 20, config) == 10


def test_a_length_may_change_on_resume_only_where_the_last_patches_come_at_a_step_and_no_share():
    drops = {"config_overrides": "patch_drop_rate=0.5"}
    constant = RECIPES["digits"].replace(lr_scheduler_type="constant", warmup_steps=2, **drops)
    assert not may_change_on_resume(constant.replace(full_size_step=0.5)) & {*COUNTED_LENGTHS}
    assert may_change_on_resume(constant.replace(full_size_step=50)) >= {*COUNTED_LENGTHS}
    idle = constant.replace(full_size_step=0.5, config_overrides="patch_drop_rate=0")
    assert may_change_on_resume(idle) >= {*COUNTED_LENGTHS}


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--full_size_step", 0.5],
            "--full_size_step has no effect here: it goes with --initial_image_size or --config_",
        ),
        (["--full_size_step", 0.5, "--config_overrides", "patch_drop_rate=0"], "--full_size_step has no effect here"),
        # the recipe's 24 pixels are more than digits have
        (
            [
                "--recipe",
                "cifar10_60s",
                "--dataset_name",
                "digits",
                "--torch_compile",
                "false",
                "--full_size_step",
                0.5,
            ],
            "--full_size_step has no effect here: it goes with --initial_image_size, or with the patch_drop_rate of",
        ),
        (
            ["--recipe", "cifar10", "--dataset_name", "digits", "--full_size_step", 0.5],
            "Here no patches are left out: the recipe's patch_drop_rate 0.75 would leave 1 of 4.$",
        ),
        (["--full_size_step", 5, *HALF], "--full_size_step 5: a run of 5 steps ends before it"),
    ],
)
def test_a_step_of_all_patches_needs_some_that_were_left_out(tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", "--max_steps", 5, *flags)
    assert "\n" not in str(caught.value)


def test_the_recipe_for_cifar10_begins_with_a_quarter_of_the_patches(parquet_repo, tmp_path, capsys):
    data = parquet_repo(num_classes=10, size=(32, 32), row_group=50, train=[100], test=[20])
    flags = ["--recipe", "cifar10", "--dataset_name", data, "--max_steps", 4, "--train_batch_size", 8]
    words = [*flags, "--train_val_split", 0.1, "--report_to", "none", "--output_dir", tmp_path / "run"]
    results = loop.train(*parse_arguments([*map(str, words)]))
    assert "3 steps with 16 of 64 patches, drawn anew for each image, then 1 with all" in capsys.readouterr().out
    assert published(tmp_path / "run").config.patch_drop_rate == 0.0 and results["num_parameters"] == 810_890


@pytest.mark.parametrize(
    "flags, fields, expected",
    [
        ([], {"image_size": 32, "patch_size": 4}, Resolution(None, 0.75, 0.75)),
        (
            [],
            {"image_size": 20, "patch_size": 4},
            Resolution(notes=("no patches are left out: the recipe's patch_drop_rate 0.75 would leave 6 of 25.",)),
        ),
        (  # what a person asks for is done
            ["--config_overrides", "patch_drop_rate=0.8"],
            {"image_size": 20, "patch_size": 4, "patch_drop_rate": 0.8},
            Resolution(None, 0.75, 0.8),
        ),
        (["--config_overrides", "patch_drop_rate=0"], {"patch_drop_rate": 0.0}, Resolution()),
        (  # the network changes the number of patches that its configuration says
            ["--specimen", "border_left_out"],
            {"image_size": 32, "patch_size": 4},
            Resolution(notes=("no patches are left out: a specimen sees them all.",)),
        ),
        (
            ["--initial_image_size", "16"],
            {"image_size": 32, "patch_size": 4},
            Resolution(
                16, 0.75, notes=("no patches are left out: the recipe's patch_drop_rate 0.75 would leave 4 of 16.",)
            ),
        ),
    ],
)
def test_a_recipes_own_rate_is_for_networks_that_keep_enough(flags, fields, expected):
    recipe, chosen = parse_arguments(["--recipe", "cifar10", *flags])
    config = build(**{"patch_drop_rate": 0.75, **fields}).config
    resolution = resolution_of(recipe, chosen, config, 1000)
    assert resolution == expected and resolution.published_rate(100, 100) == 0


def test_patch_dropout_of_ones_own_is_refused_for_a_specimen_before_there_is_data():
    words = ["--recipe", "cifar10", "--specimen", "border_left_out"]
    effects.check_recipe(*parse_arguments(words))
    with pytest.raises(UserError, match="patch_drop_rate does not work with --specimen: a specimen sees all patches"):
        effects.check_recipe(*parse_arguments([*words, "--config_overrides", "patch_drop_rate=0.5"]))


def test_ranks_survive_what_sharded_training_casts():
    config = build(image_size=56, patch_size=4).config
    draws = Draws(3, 7, 50, range(50))
    noise = Resolution(None, None, 0.5).noise(draws, config, is_initial=False)
    assert noise.shape == (50, 196) and not noise.is_floating_point()
    rounded = draws.uniform("patches", 196).bfloat16()  # which FSDP makes of floats, with ties
    assert not torch.equal(rounded.argsort(dim=1), noise.argsort(dim=1))
    assert torch.equal(noise.sort(dim=1).values, torch.arange(196).expand(50, -1))
    assert torch.equal(noise.argsort(dim=1), draws.uniform("patches", 196).argsort(dim=1))


def test_a_run_of_the_recipe_before_it_left_out_patches_goes_on_with_the_flags_that_do_the_same(tmp_path):
    words = ["--recipe", "cifar10", "--initial_image_size", "24", "--config_overrides", "patch_drop_rate=0"]
    now, _ = parse_arguments([*words, "--full_size_step", "0.6"])
    before = {"full_size_step": None, "config_overrides": "zero_init_residual=true,position_init=sincos2d"}
    (tmp_path / "recipe.json").write_text(json.dumps({**now.to_dict(), **before}))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"another recipe \(full_size_step: 0.6 -> 0.75\)"):
        open_run(tmp_path, parse_arguments(words)[0], {})
    with pytest.raises(UserError, match=r"another recipe \(config_overrides: "):
        open_run(tmp_path, now.replace(config_overrides=before["config_overrides"] + ",patch_drop_rate=0.75"), {})
    open_run(tmp_path, now.replace(full_size_step=None), {})
    open_run(tmp_path, now, {})


def test_a_recipes_own_step_of_all_patches_is_idle_where_none_are_left_out():
    recipe = RECIPES["digits"].replace(full_size_step=0.6)
    assert resolution_of(recipe, frozenset(), build().config, 1000) == Resolution()


@pytest.mark.parametrize("image_size, expected", [([], None), (["--image_size", 32], 24)])
def test_where_the_recipes_small_images_are_too_large_patches_come_back_at_its_step_all_the_same(image_size, expected):
    words = ["--recipe", "cifar10_60s", "--dataset_name", "digits", *HALF, *image_size]
    recipe, chosen = parse_arguments([*map(str, words)])
    config = build(image_size=recipe.image_size or 8, patch_size=2, patch_drop_rate=0.5).config
    resolution = resolution_of(recipe, chosen, config, 1000)
    assert (resolution.initial_size, resolution.full_size_step, resolution.patch_drop_rate) == (expected, 0.6, 0.5)


@pytest.mark.parametrize("shape", [(1, 17), (3, 17)])
def test_a_mask_may_be_one_for_all_images(shape):
    model = build(ViTScratchModel, patch_drop_rate=0.5).train()
    states = [model(images(), attention_mask=mask).last_hidden_state.shape for mask in (None, torch.ones(shape))]
    assert states == [(3, 9, 32)] * 2
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(B, N\) where patches are left out, got \(3, 17, 17"
    ):
        model(images(), attention_mask=torch.ones(3, 17, 17))


def test_a_sweep_compares_patch_dropout_with_none():
    words = ["--recipe", "digits", "--grid", "patch_drop_rate:full_size_step=0:none,0.5:0.6"]
    assert [run.recipe.full_size_step for run in parse_sweep(words).runs] == [None, 0.6]
    with pytest.raises(UserError, match=r"patch_drop_rate 0: --full_size_step has no effect here.* share an axis"):
        parse_sweep(["--recipe", "digits", "--grid", "patch_drop_rate=0,0.5", "--full_size_step", "0.6"])
