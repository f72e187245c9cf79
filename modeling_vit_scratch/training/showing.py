"""What a run would do, shown before it is done: its augmented images, its parameters with their rates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from ..data.augmentation import POLICIES, Draws, Mixing, normalise
from ..data.augmentation.mixing import rows_of_labels
from ..data.decoding import Decoder, normalisation
from ..data.loading import RowReader
from ..data.order import ResidentOrder, derived_seed
from ..data.scan import scan_split, without_bad
from ..data.splits import Source
from ..errors import UserError
from ..results.augmentation_grid import Panel, write_augmentation_grid
from ..results.record import public_word
from . import effects
from .bad_images import check_what_is_left
from .finetuning import head_rate_scale, prepare_finetuning
from .flags import Parser, exit_code, parse_arguments
from .machine import num_cores
from .network import build_augmentation, build_network, source_of, split_as_asked, whole_source_of
from .optimization import parameter_groups, parameter_table
from .recipe import Recipe

LONGEST_CAPTION = 2  # classes named below an image; a mixed one has two


def augmented_rows(
    recipe: Recipe, chosen: frozenset[str], source: Source, num_images: int, num_draws: int
) -> list[list[Panel]]:
    """Rows of (uint8 image (C, H, W), caption): the images as evaluation sees them, then `num_draws` ways in which
    training does."""
    _, processor, _ = build_network(recipe, chosen, source)
    decoder, augment = build_augmentation(recipe, processor)
    mixing = Mixing(recipe.mixup_alpha, recipe.cutmix_alpha, recipe.mixup_prob, recipe.mixup_switch_prob)
    split = source.splits["train"]
    num_images = min(num_images, len(split))
    positions = np.arange(num_images)
    _, samples = ResidentOrder(len(split), recipe.seed).batch(0, num_images)
    names = source.class_names
    plain = RowReader(source, split, Decoder(processor)).batch(samples, positions)
    targets = rows_of_labels(plain.labels, len(names)).tolist()
    rows = [[(image.numpy(), caption(target, names)) for image, target in zip(plain.images, targets, strict=True)]]
    mean, std = normalisation(processor, torch.device("cpu"))
    reader = RowReader(source, split, decoder)
    for step in range(num_draws):
        batch = reader.batch(samples, positions, np.full(num_images, step))
        draws = Draws(recipe.seed, step, num_images, batch.positions)
        images = augment.erase(normalise(augment(batch.images, draws), mean, std), draws)
        images, targets = mixing(images, batch.labels, draws, len(names))
        pixels = (images * std + mean).round().clamp(0, 255).to(torch.uint8).numpy()
        rows.append([(image, caption(target, names)) for image, target in zip(pixels, targets.tolist(), strict=True)])
    return rows


def caption(target: Sequence[float], class_names: Sequence[str]) -> str:
    """ "cat" for a plain label, "cat 0.70 + dog 0.30" for a mixed one; "cat + dog" for an image of both, "none" for one
    of no class."""
    order = sorted(range(len(target)), key=lambda index: -target[index])
    parts = [(class_names[index], target[index]) for index in order if target[index] > 0]
    is_whole = [len(parts) == 1 or abs(share - 1) < 1e-6 for _, share in parts]
    named = [name if whole else f"{name} {share:.2f}" for (name, share), whole in zip(parts, is_whole, strict=True)]
    rest = ["..."] if sum(is_whole) > LONGEST_CAPTION else []
    return " + ".join(named[:LONGEST_CAPTION] + rest) or "none"


def show_augmentation(arguments: list[str]) -> int:
    """Draws a grid of augmented images; the exit code."""
    parser = _parser(
        "show-augmentation",
        "Draws what the network would see in training: each column one image, the first row as evaluation "
        "sees it, the others as augmentation draws it, with labels and the shares of a mix.",
        "the images and the augmentation",
    )
    parser.add_argument("--picture", metavar="FILE", default="augmented.png", help="the PNG to write [augmented.png]")
    parser.add_argument("--num_images", metavar="INT", type=int, default=8, help="columns [8]")
    parser.add_argument("--num_draws", metavar="INT", type=int, default=5, help="rows below the originals [5]")
    parser.add_argument(
        "--every_policy", action="store_true", help="a picture for each value of --auto_augment, named after it"
    )

    def act():
        own, rest = parser.parse_known_args(arguments)
        if own.num_images < 1 or own.num_draws < 1:
            raise UserError("--num_images and --num_draws must be at least 1.")
        recipe, chosen = _checked(rest)
        if own.every_policy and recipe.auto_augment is not None:
            raise UserError("--every_policy draws all of them: leave out --auto_augment.")
        source = readable_source(recipe)
        file = Path(own.picture)
        for policy in POLICIES if own.every_policy else [recipe.auto_augment]:
            target = file.with_name(f"{file.stem}-{policy}.png") if own.every_policy else file
            shown = recipe.replace(auto_augment=policy)
            rows = augmented_rows(shown, chosen, source, own.num_images, own.num_draws)
            write_augmentation_grid(target, _title(shown, source), rows)
            print(f"{target}: {len(rows[0])} images, {len(rows) - 1} draws of each")

    return exit_code(act)


def readable_source(recipe: Recipe) -> Source:
    """The recipe's images; with --bad_images skip those of training that can be read, found as a run finds them."""
    if recipe.bad_images != "skip":
        return source_of(recipe)
    source = whole_source_of(recipe)
    split = source.splits["train"]
    scan = scan_split(split, num_cores())
    check_what_is_left(source, "train", scan, recipe.max_bad_images)
    if scan.bad:
        print(f"{len(scan.bad):,} of {len(split):,} training image(s) cannot be read and are left out.")
    source.splits["train"] = without_bad(split, scan.bad)
    split_as_asked(recipe, source)
    return source


def _title(recipe: Recipe, source: Source) -> str:
    on = {
        "policy": recipe.auto_augment,
        "random resized crop from": recipe.random_resized_crop_scale,
        "flip": recipe.horizontal_flip_prob,
        "vertical flip": recipe.vertical_flip_prob,
        "crop padding": recipe.crop_padding,
        "rotation": recipe.rotation_degrees,
        "shift": recipe.translate_pixels,
        "scale": recipe.scale_range,
        "colour jitter": recipe.color_jitter,
        "erasing": recipe.random_erasing_prob,
        "mixup": recipe.mixup_alpha,
        "cutmix": recipe.cutmix_alpha,
    }
    return f"{public_word(source.name)}: " + (
        ", ".join(f"{name} {value}" for name, value in on.items() if value) or "no augmentation"
    )


def show_parameters(arguments: list[str]) -> int:
    """Prints every parameter with its shape, highest rate and weight decay; the exit code."""
    parser = _parser(
        "show-parameters",
        "Prints every parameter that `vit-scratch train` would train with the same flags: "
        "name, shape, highest learning rate and weight decay.",
        "the network and its optimizer",
    )

    def act():
        _, rest = parser.parse_known_args(arguments)
        recipe, chosen = _checked(rest)
        set_seed(derived_seed(recipe.seed, "initialisation") % 2**32)
        model, _, report = build_network(recipe, chosen, readable_source(recipe))
        finetuning, head_scale = prepare_finetuning(model, recipe), head_rate_scale(recipe, report)
        groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay, recipe.optim == "muon", head_scale)
        print(parameter_table(groups, recipe.learning_rate))
        if report is not None:
            print(finetuning)

    return exit_code(act)


def _parser(command: str, description: str, chosen: str) -> Parser:
    """The parser of a command's own flags; those of `train` beside them choose what is shown."""
    epilog = f"All flags of `vit-scratch train` choose {chosen}."
    return Parser(prog=f"vit-scratch {command}", description=description, epilog=epilog, allow_abbrev=False)


def _checked(arguments: list[str]) -> tuple[Recipe, frozenset[str]]:
    recipe, chosen = parse_arguments(arguments)
    effects.check_recipe(recipe, chosen)
    return recipe, chosen
