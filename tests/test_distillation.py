"""Learning from a teacher: its loss against numpy and algebra, its pixels against transformers, and whole runs."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from conftest import make_images
from PIL import Image
from safetensors.torch import load_file, save_file
from small_vit import build, images
from test_run_options import assert_killed_runs_end_alike
from test_run_train import run
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.training import distillation, loop
from modeling_vit_scratch.training.distillation import Distillation, Teacher, distillation_of
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import build_network, source_of
from modeling_vit_scratch.training.teachers import open_teacher

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
NAMES = ["ant", "bee", "cat"]
SMALL_VIT = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "num_labels": 3,
}  # fmt: skip


def lesson(**fields):
    return Distillation(None, **{"alpha": 0.5, **fields})


def softmax(rows):
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


# ---------------------------------------------------------------- what is learned


def test_the_soft_loss_is_the_divergence_from_the_teacher_at_its_temperature_times_its_square(answers):
    logits, theirs = answers
    own, taught = (softmax(rows.numpy() / 3) for rows in (logits, theirs))
    expected = 9 * (taught * np.log(taught / own)).sum()
    assert lesson(temperature=3.0).loss_sum(logits, theirs).item() == pytest.approx(expected, rel=1e-12)
    assert lesson(temperature=3.0).loss_sum(theirs, theirs).item() == pytest.approx(0, abs=1e-12)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_centred_logits(answers):
    """Hinton et al., 1503.02531, equation 4: there distillation matches logits, whatever the temperature."""
    logits, theirs = (rows - rows.mean(dim=1, keepdim=True) for rows in answers)
    logits.requires_grad_()
    lesson(temperature=1e4).loss_sum(logits, theirs).backward()
    torch.testing.assert_close(logits.grad, (logits.detach() - theirs) / 5, rtol=1e-3, atol=1e-5)


def test_the_hard_loss_is_cross_entropy_with_the_teachers_answer(answers):
    logits, theirs = answers
    own = softmax(logits.numpy())
    expected = -np.log(own[np.arange(6), theirs.numpy().argmax(axis=1)]).sum()
    assert lesson(is_hard=True).loss_sum(logits, theirs).item() == pytest.approx(expected, rel=1e-12)


def test_of_several_classes_each_is_a_distribution_of_its_own(answers):
    logits, theirs = answers
    own, taught = (1 / (1 + np.exp(-rows.numpy() / 2)) for rows in (logits, theirs))
    divergence = taught * np.log(taught / own) + (1 - taught) * np.log((1 - taught) / (1 - own))
    soft = lesson(temperature=2.0, is_multi_label=True).loss_sum(logits, theirs).item()
    assert soft == pytest.approx(4 * divergence.mean(axis=1).sum(), rel=1e-12)
    own, taken = 1 / (1 + np.exp(-logits.numpy())), theirs.numpy() > 0
    expected = -np.log(np.where(taken, own, 1 - own)).mean(axis=1).sum()
    hard = lesson(is_hard=True, is_multi_label=True).loss_sum(logits, theirs).item()
    assert hard == pytest.approx(expected, rel=1e-12)


def test_labels_and_teacher_share_the_loss():
    network = build()
    both = Distillation(Teacher(network, lambda images: images), alpha=0.3, temperature=1.0)
    batch, logits = images(), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    taught = both.loss_sum(logits, network(pixel_values=batch).logits.detach())
    found = both.joined(torch.tensor(7.0), logits, batch)
    torch.testing.assert_close(found, 0.7 * torch.tensor(7.0) + 0.3 * taught)


# ---------------------------------------------------------------- the teacher and its images


def save_resnet(folder, names=NAMES, processor=None, model_class=ResNetForImageClassification, **fields):
    """A small residual network of transformers, its classifier far from zero, as transformers saves it."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=len(names),
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}, **fields,
    )  # fmt: skip
    network = model_class(config).eval()
    network.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return network


def save_own(folder, names=NAMES, **fields):
    network = build(num_labels=len(names), **fields)
    network.config.id2label, network.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    recipe, chosen = parse_arguments(["--recipe", "digits"])
    _, processor, _ = build_network(recipe, chosen, source_of(recipe))
    kind = type(processor)
    channels, size = network.config.num_channels, network.config.image_size
    processor = kind(num_channels=channels, size={"height": size, "width": size}, image_mean=[0.4] * channels,
                     image_std=[0.2] * channels)  # fmt: skip
    save_model_folder(folder, network, network.state_dict(), processor)
    return network, processor


class Images:
    """What distillation asks of the run's data."""

    def __init__(self, names=NAMES, is_multi_label=False):
        self.class_names, self.is_multi_label = names, is_multi_label


def taught_by(folder, mean=0.5, std=0.5, channels=3, source=None, **fields):
    recipe, _ = parse_arguments(["--recipe", "digits", "--teacher_name_or_path", str(folder)])
    pixels = torch.full((channels, 1, 1), 255 * mean), torch.full((channels, 1, 1), 255 * std)
    return distillation_of(recipe.replace(**fields), source or Images(), pixels, torch.float32, nullcontext)


def as_the_student_sees(picture, mean=0.5, std=0.5):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return (pixels / 255 - mean) / std


PROCESSORS = {
    "squash": ViTImageProcessor(size={"height": 32, "width": 32}, **IMAGENET),
    "no means of its own": ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "twice the range": ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, **IMAGENET),
    "crop": ViTImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    ),
    "shortest edge": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, **IMAGENET),
    "blue first": MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "shifted": EfficientNetImageProcessor(size={"height": 32, "width": 32}, rescale_offset=True, **IMAGENET),
    "twice": EfficientNetImageProcessor(size={"height": 32, "width": 32}, include_top=True, **IMAGENET),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_teacher_of_transformers_sees_the_pixels_of_its_own_processor(tmp_path, kind):
    network = save_resnet(tmp_path, processor=PROCESSORS[kind])
    picture = make_images(1, (32, 32))[0]
    with torch.no_grad():
        expected = network(**AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")).logits
    lesson_of = taught_by(tmp_path)
    found = lesson_of.teacher.logits(as_the_student_sees(picture))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01  # else any answer would do


def test_a_teacher_of_ours_sees_its_own_pixels_at_its_own_size(tmp_path):
    network, processor = save_own(tmp_path)
    picture = make_images(1, (32, 32))[0]
    with torch.no_grad():
        expected = network(**processor(picture, return_tensors="pt")).logits
    lesson_of = taught_by(tmp_path)
    found = lesson_of.teacher.logits(as_the_student_sees(picture))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 3, 8, 24), 0.3)  # one colour at any size
    at_size = lesson_of.teacher.logits(torch.full((1, 3, 32, 32), 0.3))
    torch.testing.assert_close(lesson_of.teacher.logits(flat), at_size)


def test_the_same_pixels_are_handed_on_as_they_are(tmp_path):
    save_own(tmp_path)
    batch = images()
    view = taught_by(tmp_path, mean=0.4, std=0.2).teacher.view
    assert view(batch) is batch
    assert view(batch.half().float()[:, :, :16]).shape == batch.shape


def test_grey_images_reach_a_teacher_of_colours_in_all_of_its_channels(tmp_path):
    network, processor = save_own(tmp_path)
    grey = make_images(1, (32, 32))[0].convert("L")
    with torch.no_grad():
        expected = network(**processor(grey.convert("RGB"), return_tensors="pt")).logits
    lesson_of = taught_by(tmp_path, channels=1)
    seen = (torch.from_numpy(np.array(grey))[None, None] / 255 - 0.5) / 0.5
    torch.testing.assert_close(lesson_of.teacher.logits(seen), expected, rtol=1e-4, atol=1e-5)


def test_classes_are_told_by_their_names(tmp_path):
    network = save_resnet(tmp_path, ["dog", *NAMES], PROCESSORS["squash"])
    inputs = PROCESSORS["squash"](make_images(1, (32, 32))[0], return_tensors="pt")
    with torch.no_grad():
        expected = network(**inputs).logits[:, [3, 1]]
    lesson_of = taught_by(tmp_path, source=Images(["cat", "ant"]))
    seen = as_the_student_sees(make_images(1, (32, 32))[0])
    torch.testing.assert_close(lesson_of.teacher.logits(seen), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_frozen_and_in_evaluation_mode(tmp_path, monkeypatch):
    save_resnet(tmp_path, processor=PROCESSORS["squash"])
    network, pixels, note = open_teacher(str(tmp_path))
    monkeypatch.setattr(distillation, "open_teacher", lambda *_: (network.train(), pixels, note))
    teacher = taught_by(tmp_path).teacher
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not teacher.logits(images().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "resnet10t", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("saved_by", ["timm", "transformers"])
def test_timms_networks_that_are_no_plain_vits_are_built_by_transformers(tmp_path, name, saved_by):
    torch.manual_seed(0)
    plain = timm.create_model(name)
    plain.reset_classifier(3)
    for head in [module for key, module in plain.named_modules() if key in ("head", "head_dist", "fc")]:
        torch.nn.init.normal_(head.weight)
    timm.models.save_for_hf(plain, tmp_path, model_config={"label_names": NAMES})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]  # which transformers passes on a second time; repositories on the Hub have none
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    if saved_by == "transformers":
        shutil.rmtree(tmp_path)
        network.save_pretrained(tmp_path)
    teacher = taught_by(tmp_path).teacher
    assert teacher.view.size == (224, 224) or name == "resnet10t"
    flat = as_the_student_sees(Image.new("RGB", (32, 32), (40, 90, 200)))
    processor = TimmWrapperImageProcessor(pretrained_cfg=network.config.pretrained_cfg)
    inputs = processor(Image.new("RGB", (300, 300), (40, 90, 200)))
    with torch.no_grad():
        expected = network(pixel_values=torch.as_tensor(inputs["pixel_values"])).logits
    torch.testing.assert_close(teacher.logits(flat), expected, rtol=1e-3, atol=1e-4)


def test_a_grey_teacher_sees_grey_images(tmp_path):
    network, processor = save_own(tmp_path, num_channels=1)
    grey = make_images(1, (32, 32))[0].convert("L")
    with torch.no_grad():
        expected = network(**processor(grey, return_tensors="pt")).logits
    seen = (torch.from_numpy(np.array(grey))[None, None] / 255 - 0.5) / 0.5
    torch.testing.assert_close(taught_by(tmp_path, channels=1).teacher.logits(seen), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what cannot teach


def test_what_cannot_teach_is_refused_in_one_line(tmp_path):
    save_resnet(tmp_path / "bare", processor=PROCESSORS["squash"], model_class=ResNetModel)
    save_resnet(tmp_path / "unseen")
    save_resnet(tmp_path / "good", processor=PROCESSORS["squash"])
    save_own(tmp_path / "grey", num_channels=1)
    for folder, source, says in (
        ("bare", None, "has no trained head: classifier"),
        ("unseen", None, "no image processor: nothing says how its images look"),
        ("nowhere", None, "there is no such folder"),
        ("grey", None, "takes 1 channel"),
        ("good", Images(["ant", "wasp"]), "does not know 'wasp'. It has 'ant', 'bee', 'cat'"),
    ):
        with pytest.raises(UserError, match=says):
            taught_by(tmp_path / folder, source=source)
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    for change, says in (
        ({"problem_type": "multi_label_classification"}, "is for multi_label_classification"),
        ({"model_type": "no such network"}, "no image classifier that transformers can build"),
    ):
        (tmp_path / "good" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=says):
            taught_by(tmp_path / "good")


def test_a_teacher_that_cannot_answer_is_found_before_training(tmp_path):
    size = {"height": 24, "width": 24}
    save_resnet(tmp_path / "zero", processor=ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.0] * 3))
    DeiTForImageClassificationWithTeacher(
        DeiTConfig(**{**SMALL_VIT, "id2label": dict(enumerate(NAMES))})
    ).save_pretrained(tmp_path / "size")
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "size")
    save_resnet(tmp_path / "grey", processor=ViTImageProcessor(size=size), num_channels=1)
    for name, says in (
        ("zero", "not all finite"), ("size", "does not take the images that its own files ask for"),
        ("grey", "what its image processor does cannot be done here"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            taught_by(tmp_path / name, channels=1 if name == "grey" else 3)


def test_a_file_beside_the_weights_is_not_taken_for_them(tmp_path):
    save_resnet(tmp_path, processor=PROCESSORS["squash"])
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "ema.safetensors")
    assert taught_by(tmp_path / "model.safetensors").teacher.view.size == (32, 32)
    with pytest.raises(UserError, match="ema.safetensors: of such a network, name the folder"):
        taught_by(tmp_path / "ema.safetensors")


def test_of_several_labels_a_teacher_that_does_not_say_so_is_told(tmp_path):
    save_resnet(tmp_path, processor=PROCESSORS["squash"])
    several = taught_by(tmp_path, source=Images(is_multi_label=True)).teacher.told
    assert "a probability of its own, which none of its files says" in several
    assert "probability" not in taught_by(tmp_path).teacher.told


def test_no_code_of_a_teachers_repository_is_run_or_asked_for(tmp_path, monkeypatch):
    save_resnet(tmp_path, processor=PROCESSORS["squash"])
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "my.Config", "AutoModelForImageClassification": "my.Network"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": code}))
    (tmp_path / "my.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(UserError, match="no image classifier that transformers can build"):
        taught_by(tmp_path)


def test_flags_that_need_a_teacher_are_refused_without_one(tmp_path):
    for flags in (["--distillation_alpha", 0.3], ["--distillation_temperature", 3], ["--distillation_type", "hard"],
                  ["--teacher_revision", "main"]):  # fmt: skip
        with pytest.raises(UserError, match="--teacher_name_or_path"):
            run(tmp_path / "run", "--max_steps", 2, *flags)
    with pytest.raises(UserError, match="distillation_type soft"):
        run(tmp_path / "run", "--max_steps", 2, "--teacher_name_or_path", tmp_path, "--distillation_type", "hard",
            "--distillation_temperature", 3)  # fmt: skip


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    """A network that reads digits, whose answers 3 and 8 then change places: what it teaches no label says."""
    folder = tmp_path_factory.mktemp("teacher")
    results = run(folder, "--max_steps", 250, "--config_overrides", "hidden_size=32,num_hidden_layers=2")
    assert results["test_accuracy"] > 0.7
    weights = folder / "model" / "model.safetensors"
    tensors = load_file(weights)
    order = [0, 1, 2, 8, 4, 5, 6, 7, 3, 9]
    for name in [name for name in tensors if name.startswith("classifier.")]:
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["soft", pytest.param("hard", marks=pytest.mark.slow)])
def test_from_the_teacher_alone_a_student_learns_what_only_it_says(tmp_path, digits_teacher, kind):
    results = run(
        tmp_path, "--max_steps", 150, "--teacher_name_or_path", digits_teacher, "--distillation_alpha", 1,
        "--distillation_type", kind, "--config_overrides", "hidden_size=32,num_hidden_layers=2",
    )  # fmt: skip
    confused = np.array(results["confusion"]["test"])
    exchanged, kept = confused[3, 8] + confused[8, 3], confused[3, 3] + confused[8, 8]
    assert exchanged > 3 * kept
    others = [index for index in range(10) if index not in (3, 8)]
    assert sum(confused[index, index] for index in others) > 0.5 * confused[others].sum()


def test_a_resumed_run_with_a_teacher_equals_the_uninterrupted_one(tmp_path, monkeypatch, digits_teacher):
    arguments = ["--max_steps", 12, "--save_steps", 4, "--logging_steps", 3, "--mixup_alpha", 0.4,
                 "--teacher_name_or_path", digits_teacher]  # fmt: skip
    assert_killed_runs_end_alike(tmp_path, monkeypatch, arguments, 9)


@pytest.mark.parametrize(
    "flags",
    [["--dtype", "float64"], ["--initial_image_size", 4, "--config_overrides", "patch_size=2"],
     ["--random_erasing_prob", 0.5, "--cutmix_alpha", 1, "--gradient_accumulation_steps", 3, "--optim", "lamb"],
     ["--config_overrides", "patch_drop_rate=0.5", "--gradient_checkpointing", "true"]],
)  # fmt: skip
def test_a_teacher_goes_with_what_else_a_run_can_do(tmp_path, digits_teacher, capsys, flags):
    results = run(tmp_path, "--max_steps", 3, "--teacher_name_or_path", digits_teacher, *flags)
    told = f"taught by {results['teacher']}: soft at temperature 2, 0.5 of the loss"
    assert results["steps"] == 3 and told in capsys.readouterr().out
    assert results["teacher"].startswith(f"{digits_teacher} (ViTScratchForImageClassification, ")


@pytest.mark.parametrize("kind", ["soft", pytest.param("hard", marks=pytest.mark.slow)])
def test_of_several_labels_each_is_learned_from_the_teacher(tmp_path, colours, kind):
    flags = ["--train_dir", colours("train", 60), "--max_steps", 60, "--image_size", 8, "--preset", "digits"]
    teacher = run(tmp_path / "teacher", *flags)
    student = run(tmp_path / "student", *flags, "--teacher_name_or_path", tmp_path / "teacher", "--seed", 3,
                  "--distillation_alpha", 1, "--distillation_type", kind)  # fmt: skip
    assert teacher["validation_mean_average_precision"] > 0.8
    assert student["validation_mean_average_precision"] > 0.8


def test_a_head_with_a_teacher_sees_images_not_cached_features(tmp_path, digits_teacher):
    fixed = ["--dataset_name", "digits", "--finetune", "head", "--max_steps", 4, "--model_name_or_path"]
    recipe, chosen = parse_arguments([*map(str, fixed), str(digits_teacher), "--random_resized_crop_scale", "none"])
    folder = shutil.copytree(digits_teacher, tmp_path / "teacher")
    results = loop.train(
        recipe.replace(teacher_name_or_path=str(folder), output_dir=str(tmp_path / "run"), report_to="none"), chosen
    )
    assert results["baseline"] is None  # of a head on features
    assert results["steps"] == 4


def test_the_model_card_names_the_teacher(tmp_path, digits_teacher):
    run(tmp_path, "--max_steps", 2, "--teacher_name_or_path", digits_teacher, "--distillation_temperature", 3)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Teacher: {digits_teacher.name}" in card.replace("\\", "")
    assert "soft, 0.5 of the loss, temperature 3" in card


def test_what_this_package_reads_it_builds_itself(tmp_path):
    save_own(tmp_path)
    network, pixels, note = open_teacher(str(tmp_path))
    assert isinstance(network, ViTScratchForImageClassification) and note == "" and pixels.size == (32, 32)
    ViTForImageClassification(ViTConfig(**SMALL_VIT)).save_pretrained(tmp_path / "bare")
    network, _, note = open_teacher(str(tmp_path / "bare"))
    assert isinstance(network, ViTScratchForImageClassification) and "0.5 as no file says others" in note
