"""`vit-scratch` does what run_train.py does."""

import subprocess
import sys

import pytest

from modeling_vit_scratch import __version__, cli


def test_train_is_run_train(tmp_path, capsys):
    assert cli.main(["train", "--recipe", "nothing"]) == 2
    assert "error: No recipe 'nothing'." in capsys.readouterr().err


def test_an_unknown_command_lists_the_known(capsys):
    assert cli.main(["trian"]) == 2
    known = ", ".join(sorted(cli.COMMANDS))
    assert capsys.readouterr().err == f"error: No command 'trian'. Did you mean 'train'? Known: {known}.\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_commands(arguments, capsys):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


def test_a_reader_that_has_gone_ends_it_without_a_traceback():
    command = [sys.executable, "-m", "modeling_vit_scratch.cli", "show-parameters", "--recipe", "digits"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == b""
    process.stderr.close()
