"""The console command `vit-scratch`, for those who installed the package from a wheel."""

import importlib
import os
import signal
import sys

from . import __version__
from .errors import unknown

# command -> (module and function, imported when it is asked for; what it does)
COMMANDS = {
    "train": ("training.flags:main", "trains, scores and saves a network: what run_train.py does"),
    "sweep": ("training.sweep:main", "trains every combination of a grid of flags and compares them by validation"),
    "predict": ("training.predicting:main", "says which classes images show, with probabilities"),
    "evaluate": ("training.scoring:main", "scores a model on a split or a folder: accuracy, calibration, each class"),
    "convert": ("training.converting:main", "writes a checkpoint as another library loads it, or as this package does"),
    "push": ("training.pushing:main", "uploads the model of a finished run to the Hub, in one commit"),
    "doctor": ("doctor.command:main", "finds what is wrong with a network or with images, and says how to mend it"),
    "attention": ("training.looking:attention", "draws where a network looks in images"),
    "summary": ("training.looking:summary", "prints the shapes, parameters and operations of a network's layers"),
    "export": ("training.exporting:main", "writes images of a dataset as files, one folder a class"),
    "show-augmentation": ("training.showing:show_augmentation", "draws a grid of augmented images"),
    "show-parameters": ("training.showing:show_parameters", "prints every parameter with its rate and decay"),
}

USAGE = "\n".join(
    [
        f"vit-scratch {__version__}",
        "",
        "usage: vit-scratch COMMAND [flags]",
        "",
        *(f"  {name:<18} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "`vit-scratch COMMAND --help` lists its flags.",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; its exit code. 2: something to mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: {unknown('command', arguments[0], COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[arguments[0]][0].partition(":")
    try:
        code = getattr(importlib.import_module(f".{module}", __package__), function)(arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # who read the output has gone, `| head` say; else it was another pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
            return 128 + signal.SIGPIPE
        raise
    return code


if __name__ == "__main__":
    sys.exit(main())
