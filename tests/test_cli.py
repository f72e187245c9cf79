"""`vit-scratch` does what run_train.py does."""

import pytest

from modeling_vit_scratch import __version__, cli


def test_train_is_run_train(tmp_path, capsys):
    assert cli.main(["train", "--recipe", "nothing"]) == 2
    assert "error: No recipe 'nothing'." in capsys.readouterr().err


def test_an_unknown_command_lists_the_known(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: No command 'trian'. Did you mean 'train'? Known: train.\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_commands(arguments, capsys):
    assert cli.main(arguments) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
