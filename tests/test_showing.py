"""What is shown before a run is what the run does."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_vit_scratch import cli
from modeling_vit_scratch.data.augmentation import Draws, normalise
from modeling_vit_scratch.data.decoding import normalisation
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import build_augmentation, build_network, source_of
from modeling_vit_scratch.training.showing import augmented_rows, caption, readable_source

TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=24"]


def test_the_first_row_is_the_image_and_the_others_are_what_training_draws():
    recipe, chosen = parse_arguments(TINY)
    source = source_of(recipe)
    rows = augmented_rows(recipe, chosen, source, 6, 3)
    assert [len(row) for row in rows] == [6] * 4
    originals = torch.from_numpy(np.stack([image for image, _ in rows[0]]))
    _, processor, _ = build_network(recipe, chosen, source)
    _, augment = build_augmentation(recipe, processor)
    mean, std = normalisation(processor, torch.device("cpu"))
    for step, row in enumerate(rows[1:]):
        draws = Draws(recipe.seed, step, 6, torch.arange(6))
        expected = normalise(augment(originals, draws), mean, std) * std + mean
        shown = torch.from_numpy(np.stack([image for image, _ in row]))
        assert (shown - expected).abs().max() < 0.51  # rounded to whole numbers
        assert [text for _, text in row] == [text for _, text in rows[0]]


def test_mixed_images_say_what_is_in_them():
    recipe, chosen = parse_arguments([*TINY, "--mixup_alpha", "1.0"])
    texts = [text for row in augmented_rows(recipe, chosen, source_of(recipe), 6, 3)[1:] for _, text in row]
    assert sum(" + " in text for text in texts) > 9  # partners of one's own class mix to that class


@pytest.mark.parametrize(
    "target, text",
    [
        ([0, 1.0, 0], "dog"),
        ([0.3, 0, 0.7], "emu 0.70 + cat 0.30"),
        ([0.5, 0.5, 0], "cat 0.50 + dog 0.50"),
        ([1.0, 0, 1.0], "cat + emu"),  # of several classes
        ([1.0, 1.0, 1.0], "cat + dog + ..."),
        ([0, 0, 0], "none"),
        ([1.0, 0.4, 0], "cat + dog 0.40"),
    ],
)
def test_captions_name_the_classes_and_their_shares(target, text):
    assert caption(target, ["cat", "dog", "emu"]) == text


def test_one_picture_a_policy(tmp_path, capsys):
    picture = tmp_path / "seen.png"
    arguments = ["show-augmentation", *TINY, "--picture", str(picture), "--num_images", "3", "--num_draws", "1"]
    assert cli.main([*arguments, "--every_policy"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        f"seen-{name}.png"
        for name in ("randaugment", "autoaugment_cifar10", "autoaugment_imagenet", "trivialaugment", "three_augment")
    }
    assert cli.main(arguments) == 0 and Image.open(picture).width > 100
    capsys.readouterr()
    assert cli.main([*arguments, "--num_draws", "0"]) == 2
    assert capsys.readouterr().err == "error: --num_images and --num_draws must be at least 1.\n"


def test_bad_images_are_left_out_as_a_run_leaves_them_out(image_folder, tmp_path, capsys):
    root = image_folder(size=(16, 16), cat=8, dog=8)
    (root / "cat" / "0.png").write_bytes(b"no image")
    command = ["show-augmentation", "--train_dir", str(root), "--picture", str(tmp_path / "seen.png")]
    assert cli.main(command) == 2 and "--bad_images skip" in capsys.readouterr().err
    assert cli.main([*command, "--bad_images", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 of 16 training image(s) cannot be read and are left out." in out and "seen.png: 8 images" in out
    assert cli.main(["show-parameters", "--train_dir", str(root), "--bad_images", "skip"]) == 0
    recipe, _ = parse_arguments(["--train_dir", str(root), "--bad_images", "skip"])
    assert len(readable_source(recipe).splits["train"]) == 13  # of 15, two are held out
    (root / "dog" / "1.png").write_bytes(b"")
    assert cli.main([*command, "--bad_images", "skip", "--max_bad_images", "0.05"]) == 2
    assert "--max_bad_images 0.13" in capsys.readouterr().err


def test_the_table_of_parameters_shows_rates_and_decays(capsys):
    flags = ["--learning_rate", "0.1", "--weight_decay", "0.3", "--layer_decay", "0.5", "--optim", "muon"]
    assert cli.main(["show-parameters", *TINY, *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["name"] == ["shape", "rate", "decay"]
    assert rows["classifier.weight"] == ["10x16", "0.1", "0.3"]
    assert rows["vit.layers.0.mlp.fc1.weight"] == ["24x16", "0.05", "0.3"]
    assert rows["vit.layers.0.mlp.fc1.bias"] == ["24", "0.05", "0"]
    assert rows["vit.embeddings.patch_embeddings.projection.weight"][1:] == ["0.025", "0.3"]
    assert cli.main(["show-parameters", "--optm", "sgd"]) == 2
