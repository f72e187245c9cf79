"""Flags: a recipe, a file over it, the command line over both; everything a person gets wrong is one line."""

import json

import pytest
import torch

from modeling_vit_scratch.errors import UserError, unknown
from modeling_vit_scratch.training.flags import OTHER_NAMES, REFUSED, build_parser, exit_code, main, parse_arguments
from modeling_vit_scratch.training.overrides import merged_overrides, parse_overrides
from modeling_vit_scratch.training.recipe import FIELDS, GROUPS, MAY_CHANGE_ON_RESUME
from modeling_vit_scratch.training.recipes import RECIPES


def recipe_of(*arguments):
    return parse_arguments(list(arguments))[0]


def test_the_default_recipe_needs_no_network():
    assert recipe_of() == RECIPES["digits"]


def test_flags_change_the_named_recipe_and_are_remembered():
    recipe, chosen = parse_arguments(["--recipe", "cifar10", "--learning_rate", "1e-3", "--streaming"])
    assert recipe == RECIPES["cifar10"].replace(learning_rate=1e-3, streaming=True)
    assert chosen == {"learning_rate", "streaming"}


@pytest.mark.parametrize("given, other", [("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")])
def test_either_length_replaces_the_recipes(given, other):
    recipe = recipe_of(f"--{given}", "7")
    assert getattr(recipe, given) == 7 and getattr(recipe, other) is None


def test_a_training_folder_means_the_recipe_folder():
    recipe = recipe_of("--train_dir", "photos")
    assert recipe.recipe == "folder" and recipe.dataset_name is None
    other = recipe_of("--train_dir", "photos", "--recipe", "cifar10")
    assert other.recipe == "cifar10" and other.dataset_name is None and other.crop_padding == 4


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_command_line_wins_over_a_file_and_the_file_over_the_recipe(tmp_path, suffix):
    file = tmp_path / f"flags.{suffix}"
    values = {"recipe": "mnist", "learning_rate": "3e-3", "seed": 5, "max_steps": 9, "image_mean": [0.5]}
    file.write_text(json.dumps(values))  # JSON is YAML too
    recipe = recipe_of("--config", str(file), "--seed", "6", "--num_train_epochs", "2")
    assert recipe == RECIPES["mnist"].replace(
        learning_rate=3e-3, seed=6, num_train_epochs=2.0, image_mean=(0.5,), max_steps=None
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "cifar"], "No recipe 'cifar'. Did you mean 'cifar10'? Known: "),
        (["--learning_rat", "1"], "No flag '--learning_rat'. Did you mean '--learning_rate'?"),
        (["--learn", "1"], "No flag '--learn'."),
        (["digits"], "'digits' is not a flag"),
        (["--seed"], "Argument --seed: expected one argument"),
        (["--learning_rate", "-1"], "--learning_rate must be above 0, got -1.0"),
        (["--learning_rate", "nan"], "--learning_rate must be finite, got nan"),
        (["--learning_rate", "fast"], "--learning_rate takes a number, got 'fast'"),
        (["--save_steps", "inf"], "--save_steps must be finite, got inf"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--max_steps", "1.5"], "--max_steps takes a whole number, got '1.5'"),
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor must be at least 0 and below 1, got 1.0"),
        (["--streaming", "maybe"], "--streaming takes true or false, got 'maybe'"),
        (["--optim", "adamx"], "No optim 'adamx'. Did you mean 'adam'?"),
        (
            ["--max_steps", "5", "--num_train_epochs", "1"],
            "--max_steps and --num_train_epochs (the command line) each say",
        ),
        (["--max_steps", "5", "--time_budget", "3m"], "--max_steps and --time_budget (the command line) each say"),
        (["--per_device_train_batch_size", "8"], "use --train_batch_size"),
        (["--per_device_train_batch_size=8"], "use --train_batch_size"),
        (["--lr", "1"], "--lr: use --learning_rate."),
        (["--batch-size=8"], "--batch-size: use --train_batch_size."),
        (["--drop_path", "0.1"], "--drop_path: a field of the network: use --config_overrides drop_path_rate=0.1."),
        (["--max_step", "3"], "No flag '--max_step'. Did you mean '--max_steps'? --help lists the flags."),
        (["--fp16"], "accelerate launch --mixed_precision fp16"),
        (["--train_dir", "a", "--dataset_name", "b"], "both name the training images"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("learnin_rate: 1", "No flag in "),
        ("- 1", "must hold flags and their values"),
        ("a: [", "is not valid YAML or JSON"),
        ("max_steps: 3\nnum_train_epochs: 1", "give one of them"),
        ("per_device_train_batch_size: 4", "use --train_batch_size"),
    ],
)
def test_wrong_files_are_said(tmp_path, content, message):
    file = tmp_path / "flags.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        recipe_of("--config", str(file))
    assert message in str(caught.value)


def test_every_field_is_a_flag_with_help_in_a_group(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text or f"--{name}\n" in text for name in FIELDS)
    assert all(f"{group}:" in text for group in GROUPS)


def test_what_may_change_on_resume_are_fields():
    assert set(FIELDS) >= MAY_CHANGE_ON_RESUME


def test_recipes_bear_their_names_and_say_how_long_they_train():
    for name, recipe in RECIPES.items():
        assert recipe.recipe == name
        assert (recipe.max_steps is None) != (recipe.num_train_epochs is None)


def test_overrides_join_those_of_the_recipe():
    own = parse_overrides(RECIPES["cifar10"].config_overrides)
    assert own and "drop_path_rate" not in own
    chosen = recipe_of("--recipe", "cifar10", "--config_overrides", "drop_path_rate=0.1,zero_init_residual=false")
    assert parse_overrides(chosen.config_overrides) == {**own, "drop_path_rate": 0.1, "zero_init_residual": False}
    assert recipe_of("--recipe", "cifar10", "--config_overrides", "none").config_overrides is None


def test_overrides_of_the_command_line_join_those_of_a_file(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("config_overrides: pooling=mean,drop_path_rate=0.1")
    chosen = recipe_of("--config", str(file), "--config_overrides", "drop_path_rate=0.2,qkv_bias=false")
    assert parse_overrides(chosen.config_overrides) == {"pooling": "mean", "drop_path_rate": 0.2, "qkv_bias": False}


def test_overrides_are_typed_and_may_hold_lists():
    assert parse_overrides("pooling=mean, hidden_size=192,image_size=[32,64],layer_scale_init=null,qkv_bias=false") == {
        "pooling": "mean", "hidden_size": 192, "image_size": [32, 64], "layer_scale_init": None, "qkv_bias": False,
    }  # fmt: skip
    assert parse_overrides("layer_norm_eps=1e-6") == {"layer_norm_eps": 1e-6}  # which YAML 1.1 takes for text
    assert parse_overrides(None) == {}
    assert merged_overrides("a=1, image_size=[32,64]", "a=[2,3],b=4") == "image_size=[32,64],a=[2,3],b=4"
    assert merged_overrides("a=[[1,2],[3,4]],b=1", "b=2") == "a=[[1,2],[3,4]],b=2"
    assert merged_overrides("a=1", None) == "a=1" and merged_overrides(None, " , ") is None
    with pytest.raises(UserError, match="No config field 'poling'. Did you mean 'pooling'?"):
        parse_overrides("poling=mean")
    with pytest.raises(UserError, match="takes \"field=value,field=value\", got 'mean'"):
        parse_overrides("mean")


def test_a_decoding_process_that_is_killed_while_the_network_computes_is_one_line_too(capsys):
    def act(text):
        raise RuntimeError(text)  # torch's signal handler raises it in whatever the main thread does

    assert exit_code(lambda: act("DataLoader worker (pid 7) is killed by signal: Killed. ")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: A process that decodes images was killed, often because") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"):
        exit_code(lambda: act("shapes do not fit"))


@pytest.mark.parametrize(
    "error, begins",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "Out of memory (CUDA out of memory)"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4096 bytes. Error code 12"), "Out of memory (you tried to allocate 4096"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"), "Another process"),
    ],
)  # fmt: skip
def test_what_the_machine_does_to_a_run_is_one_line(error, begins, capsys, monkeypatch):
    def act():
        raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(act) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {begins}") and said.count("\n") == 1
    if "closed by peer" in str(error):
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(RuntimeError, match="closed by peer"):
            exit_code(act)


def test_an_image_size_is_a_side_or_height_and_width(tmp_path):
    assert [parse_arguments(["--image_size", text])[0].image_size for text in ("24", "16,24")] == [24, (16, 24)]
    (tmp_path / "flags.yaml").write_text("image_size: [16, 24]")
    assert parse_arguments(["--config", str(tmp_path / "flags.yaml")])[0].image_size == (16, 24)
    for text, message in (("16,24,3", "takes a whole number"), ("16,x", "takes a whole number"), ("0,8", "at least 1")):
        with pytest.raises(UserError, match=f"--image_size .*{message}"):
            parse_arguments(["--image_size", text])


def test_names_of_other_programs_lead_to_flags_that_there_are():
    assert set(OTHER_NAMES.values()) <= set(FIELDS) and not set(REFUSED) & set(FIELDS)
    assert set(OTHER_NAMES) <= set(REFUSED)


def test_where_a_name_was_meant_a_long_list_is_left_out():
    many = [f"name_{index}" for index in range(100)]
    assert str(unknown("flag", "nam_7", many)) == "No flag 'nam_7'. Did you mean 'name_7'?"
    assert str(unknown("flag", "zzz", many)).count("name_") == 100  # nothing is near: all there is helps
    assert str(unknown("flag", "nam_7", many[:9])).endswith("Known: " + ", ".join(many[:9]) + ".")
