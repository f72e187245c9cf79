"""`vit-scratch convert`: a checkpoint of one library as a folder that another loads itself."""

from pathlib import Path

from ..errors import UserError
from ..results.model_folder import save_model_folder, written_whole
from ..weights import LoadingReport
from ..weights.loading import load_network, load_processor
from ..weights.writing import TARGETS, write_checkpoint
from .flags import Parser, exit_code

OWN = "vit_scratch"
HOW_TO_LOAD = {
    "transformers": "ViTForImageClassification.from_pretrained({folder!r})",
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "torchvision": 'torchvision.models.VisionTransformer(**config["model_args"]), then load_state_dict of '
    "model.safetensors",
    OWN: "AutoModelForImageClassification.from_pretrained({folder!r}, trust_remote_code=True)",
}


def convert(
    source: str, folder: Path, to: str, num_attention_heads: int | None = None, overwrite: bool = False
) -> tuple[LoadingReport, list[str]]:
    """Reads the checkpoint and writes it, with class names and image processor; the report and what else to say.

    The folder appears whole or not at all. Raises UserError where the checkpoint cannot be read, where the other
    library has no such network, and where the folder holds something and is not to be overwritten.
    """
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise UserError(f"{folder} is not empty: name another folder, or give --overwrite_output_dir.")
    if Path(source).expanduser().resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} holds the checkpoint that is to be read: name another folder.")
    model, report = load_network(source, num_attention_heads)
    processor = load_processor(source, num_attention_heads=num_attention_heads)
    if to == OWN:
        save_model_folder(folder, model, model.state_dict(), processor)
        return report, []
    with written_whole(folder) as partial:
        notes = write_checkpoint(to, partial, model, processor)
    return report, notes


def main(arguments: list[str]) -> int:
    """Converts as the command line says; the exit code."""
    parser = Parser(
        prog="vit-scratch convert",
        description="Writes a checkpoint of this package, transformers, timm, torchvision or Google as a folder that "
        "another library loads itself, class names and image processor included.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a Hub repository, a folder, or a file of weights")
    parser.add_argument("folder", metavar="DST", help="the folder to write")
    parser.add_argument("--to", choices=[*TARGETS, OWN], required=True, help="the library that is to load it")
    parser.add_argument(
        "--num_attention_heads", metavar="INT", type=int, help="for a file that does not say it [hidden size / 64]"
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replaces what DST holds")

    def act():
        own = parser.parse_args(arguments)
        heads, overwrite = own.num_attention_heads, own.overwrite_output_dir
        report, notes = convert(own.source, Path(own.folder), own.to, heads, overwrite)
        print(report)
        for note in notes:
            print(f"note: {note}")
        print(f"{own.folder}: {HOW_TO_LOAD[own.to].format(folder=own.folder)}")

    return exit_code(act)
