"""The console command `vit-scratch`, for those who installed the package from a wheel."""

import sys

from . import __version__
from .errors import unknown
from .training.flags import main as train

COMMANDS = {"train": (train, "trains, scores and saves a network: what run_train.py does")}

USAGE = "\n".join(
    [
        f"vit-scratch {__version__}",
        "",
        "usage: vit-scratch COMMAND [flags]",
        "",
        *(f"  {name:<8} {text}; `vit-scratch {name} --help` lists its flags" for name, (_, text) in COMMANDS.items()),
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
    return COMMANDS[arguments[0]][0](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
