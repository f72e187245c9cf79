"""A run's folder model/ to the Hub: at the end of training (`--push_to_hub`), or by itself (`vit-scratch push`); and
the weights of its checkpoints while it trains (`--hub_strategy every_save`)."""

import shlex
import shutil
import threading
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..results.hub import open_repository, push_folder
from ..results.model_card import card_of
from ..results.model_folder import checkpoint_as_model
from ..results.record import RunRecord, metric_label, metric_text, printable, read_run, scores
from .flags import Parser, exit_code
from .recipe import Recipe
from .run_folder import PUSHED

NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")


def open_destination(recipe: Recipe, output_dir: Path) -> str:
    """The repository that --push_to_hub means, made before anything is trained: a wrong token costs nothing.

    Raises UserError as open_repository does.
    """
    return open_repository(recipe.hub_model_id or output_dir.resolve().name, recipe.hub_private_repo)


def finished_run(run_dir: str | Path) -> RunRecord:
    """The record of a run whose folder model/ is whole. Raises UserError for any other."""
    run = read_run(run_dir)
    if run.results.get("specimen"):
        raise UserError(f"{run_dir} holds a specimen, a network with bugs put into it: it is not published.")
    model = run.folder / "model"
    missing = [name for name in NEEDED if not (model / name).is_file()]
    if missing:
        raise UserError(
            f"{model} is not whole, {', '.join(missing)} missing: remove {run.folder}/results.json and start the "
            "command that trained it again, which scores and writes its last checkpoint."
        )
    return run


def push_run(run: RunRecord, repository: str, revision: str | None = None) -> str:
    """The address of the commit that holds the model of a finished run, its card made out to this repository.

    Raises UserError as push_folder does.
    """
    card = {"README.md": card_of(run, repository)}
    return push_folder(run.folder / "model", repository, commit_message(run), card, revision)


def push_at_end(output_dir: Path, repository: str) -> str:
    """What to say of a push that ends a training. Raises UserError with the command that goes on from here."""
    try:
        address = push_run(finished_run(output_dir), repository)
    except UserError as error:
        command = shlex.join(["vit-scratch", "push", str(output_dir), repository])
        raise UserError(
            f"{output_dir} holds the run, whole, but its push failed: {error} Nothing is lost; go on with `{command}`."
        ) from error
    return f"pushed: {address}"


class PushedSaves:
    """Checkpoints as models on the Hub, each one commit, in the background: training never waits for a network.

    A checkpoint that comes while another is under way is passed over; of a push that fails a line says so, and the next
    one is tried. repository: owner/name; None: nothing is pushed.
    """

    def __init__(self, output_dir: Path, repository: str | None):
        self.folder, self.repository = output_dir / PUSHED, repository
        self.thread: threading.Thread | None = None

    def push(self, checkpoint: Path, step: int, total_steps: int):
        """Begins to push what a checkpoint would publish; its files are copied first, as it may soon be removed."""
        if self.repository is None or (self.thread is not None and self.thread.is_alive()):
            return
        message = f"step {step:,} of {total_steps:,}"
        try:
            checkpoint_as_model(checkpoint, self.folder)
        except (OSError, SafetensorError) as error:  # a full disk: the checkpoint itself is whole
            self._remove()
            print(f"\nnote: {message} was not pushed: {' '.join(str(error).split())}", flush=True)
            return
        # a daemon: a run that is stopped does not wait either, and a commit is made whole or not at all
        self.thread = threading.Thread(target=self._push, args=(self.repository, message), daemon=True)
        self.thread.start()

    def _push(self, repository: str, message: str):
        try:
            push_folder(self.folder, repository, message, {})
        except UserError as error:
            print(f"\nnote: {message} was not pushed: {error}", flush=True)
        self._remove()  # the next checkpoint may need the room

    def finish(self):
        """Waits for the push that is under way: the one of the end comes after it."""
        if self.thread is not None:
            self.thread.join()

    def _remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def commit_message(run: RunRecord) -> str:
    """The recipe and the score that the run is judged by."""
    recipe = printable(run.recipe["recipe"])
    for split, found in scores(run.results).items():
        metric = "accuracy" if "accuracy" in found else next(iter(found))
        return f"{recipe}: {metric_label(metric).lower()} {metric_text(metric, found[metric])} on the {split} split"
    return f"{recipe}, not scored"


def main(arguments: list[str]) -> int:
    """Pushes as the command line says; the exit code."""
    parser = Parser(
        prog="vit-scratch push",
        description="Uploads the model of a finished run to the Hub, card and code included, in one commit. The token "
        "is that of HF_TOKEN or `hf auth login`.",
        allow_abbrev=False,
    )
    parser.add_argument("run_folder", metavar="RUN_FOLDER", help="the folder of a finished run, such as outputs/digits")
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository on the Hub, made if there is none")
    parser.add_argument("--private", action="store_true", help="the repository is seen by its owner alone")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to, made if there is none [main]")

    def act():
        own = parser.parse_args(arguments)
        run = finished_run(own.run_folder)  # what is none makes no repository
        repository = open_repository(own.repository, True if own.private else None, own.revision)
        print(f"pushed: {push_run(run, repository, own.revision)}")

    return exit_code(act)
