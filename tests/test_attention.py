"""Attention maps are transformers' own, rollout is the paper's, and the picture shows both over the right pixels."""

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from small_vit import SMALL, build, images
from transformers import ViTConfig, ViTForImageClassification

from modeling_vit_scratch import ViTScratchConfig, ViTScratchImageProcessor, ViTScratchModel, cli
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.attention import attention_between_tokens, attention_maps, patch_map, rollout
from modeling_vit_scratch.results.attention_picture import AttendedImage, attention_figure, enlarged, heads_figure
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.results.plots import LIGHT
from modeling_vit_scratch.results.prediction import open_model
from modeling_vit_scratch.training.looking import attention_over, heads_over
from modeling_vit_scratch.weights import load_pretrained


def random_attentions(num_layers=3, batch_size=2, heads=4, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, heads, tokens, tokens)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(num_layers)]


# ---------------------------------------------------------------- the weights


def test_maps_are_those_of_transformers(tmp_path):
    sizes = {name: value for name, value in SMALL.items() if name != "num_labels"}
    torch.manual_seed(0)
    theirs = ViTForImageClassification(ViTConfig(**sizes, num_labels=5)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_pretrained(str(tmp_path / "theirs"))
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        expected = theirs(images(), output_attentions=True).attentions
    found = attention_maps(ours, images())
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_each_token_hands_out_all_of_its_attention():
    for layer in attention_maps(build(num_register_tokens=3), images()):
        assert layer.shape == (3, 4, 20, 20) and not layer.requires_grad
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(3, 4, 20))


def test_the_model_is_left_as_it_was():
    model = build(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5).train()
    first, second = attention_maps(model, images()), attention_maps(model, images())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # no dropout
    assert model.training and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="pixel_values are 24 x 24"):
        attention_maps(model, torch.zeros(1, 3, 24, 24))
    assert model.training and model.config._attn_implementation == "sdpa"


def test_the_encoder_alone_has_maps_too():
    assert len(attention_maps(build(ViTScratchModel), images())) == 2


# ---------------------------------------------------------------- rollout


def test_rollout_is_the_loop_of_the_paper():
    attentions = random_attentions()
    found = rollout(attentions)
    for sample in range(2):
        flow = np.eye(7)
        for layer in attentions:
            mean = np.zeros((7, 7))
            for head in layer[sample].numpy():
                mean += head / 4
            flow = np.matmul(0.5 * mean + 0.5 * np.eye(7), flow)
        np.testing.assert_allclose(found[sample].numpy(), flow, atol=1e-14)
    np.testing.assert_allclose(found.sum(dim=-1).numpy(), 1, atol=1e-14)


def test_the_last_layer_is_multiplied_from_the_left():
    """A token that the last layer reads from carries what it read before, not the other way round."""
    first, second = torch.eye(3)[None, None].clone(), torch.eye(3)[None, None].clone()
    first[0, 0, 1] = torch.tensor([0.0, 0.0, 1.0])  # token 1 reads token 2, then token 0 reads token 1
    second[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert rollout([first, second])[0, 0].tolist() == [0.5, 0.25, 0.25]
    assert rollout([second, first])[0, 0].tolist() == [0.5, 0.5, 0.0]


def test_other_methods_take_one_layer():
    attentions = random_attentions()
    between = attention_between_tokens
    assert torch.equal(between(attentions, "last"), attentions[2].mean(dim=1))
    assert torch.equal(between(attentions, "head-mean", 1), attentions[0].mean(dim=1))
    assert torch.equal(between(attentions, "head-mean", 3), between(attentions, "last"))
    assert torch.equal(between(attentions), rollout(attentions))
    for method, layer, text in [
        ("mean", None, "No method 'mean'. Did you mean 'head-mean'."),
        ("head-mean", None, "needs --layer, from 1 to 3, the number of layers; none came."),
        ("head-mean", 0, "from 1 to 3, the number of layers; got 0."),
        ("head-mean", 4, "from 1 to 3, the number of layers; got 4."),
        ("last", 2, "--layer has no effect with --method last"),
    ]:
        with pytest.raises(UserError, match=text):
            between(attentions, method, layer)


# ---------------------------------------------------------------- from tokens to patches


def test_a_map_is_the_class_tokens_row_without_class_and_register_tokens():
    config = ViTScratchConfig(**{**SMALL, "image_size": (24, 16)}, num_register_tokens=2)  # 3 x 2 patches of 8
    weights = torch.arange(81.0).view(1, 9, 9)
    assert patch_map(weights, config).tolist() == [[[3, 4], [5, 6], [7, 8]]]
    assert patch_map(weights, config, (2, 3)).tolist() == [[[3, 4, 5], [6, 7, 8]]]


def test_a_map_of_mean_pooling_is_the_mean_over_the_patch_tokens():
    config = ViTScratchConfig(**{**SMALL, "image_size": (24, 16)}, num_register_tokens=2, pooling="mean")
    weights = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = weights[:, 3:, 3:].mean(dim=1).view(2, 3, 2)
    torch.testing.assert_close(patch_map(weights, config), expected)
    without = ViTScratchConfig(**{**SMALL, "image_size": (24, 16)}, use_cls_token=False, pooling="mean")
    weights = attention_maps(build(image_size=(24, 16), use_cls_token=False, pooling="mean"), images(2, 3, 24, 16))[0]
    torch.testing.assert_close(patch_map(weights.mean(dim=1), without).sum(dim=(1, 2)), torch.ones(2))


def test_a_patch_that_alone_is_read_lights_up_alone():
    """The network's own attention, with keys of one place made large, comes out at that place of the map."""
    model = build(num_hidden_layers=1, pooling="mean", position_embedding_type="none")
    attention = model.vit.layers[0].attention
    with torch.no_grad():
        for matrix in (attention.q_proj, attention.k_proj):
            matrix.weight.zero_()
            matrix.bias.fill_(1.0)
        attention.k_proj.weight.fill_(0.0)
        attention.k_proj.weight[:, 0] = 4.0  # keys grow with the first channel of a token
        model.vit.layers[0].layernorm_before.weight.zero_()
        model.vit.layers[0].layernorm_before.weight[0] = 1.0
        projection = model.vit.embeddings.patch_embeddings.projection
        projection.weight[0] = 1.0
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 8:16, 16:24] = 1.0  # the patch of row 2 and column 3
    weights = attention_maps(model, pixels)[0].mean(dim=1)
    found = patch_map(weights, model.config)[0]
    assert divmod(int(found.argmax()), 4) == (1, 2)


# ---------------------------------------------------------------- the picture and the command


@pytest.fixture
def model_folder(tmp_path):
    """A maker of the folder of a small model whose images are cropped."""

    def make(name="model", **fields):
        crop = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
        processor = ViTScratchImageProcessor(**crop, num_channels=fields.get("num_channels", 3))
        model = build(**fields)
        save_model_folder(tmp_path / name, model, model.state_dict(), processor)
        return tmp_path / name

    return make


@pytest.fixture
def photo(tmp_path):
    make_images(1, (50, 70))[0].save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_an_image_is_looked_at_as_the_pipeline_sees_it(model_folder, photo):
    model, processor, _ = open_model(str(model_folder()))
    found = attention_over(model, processor, str(photo), "rollout")
    pixel_values = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    expected = patch_map(rollout(attention_maps(model, pixel_values)), model.config)[0]
    np.testing.assert_allclose(found.patches, expected.numpy(), atol=1e-6)
    restored = ((pixel_values[0] * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert np.array_equal(found.pixels, restored.numpy())
    best = int(model(pixel_values).logits.argmax())
    assert (found.name, found.answer) == ("photo.png", model.config.id2label[best])
    last, heads = heads_over(model, processor, str(photo))
    assert heads.shape == (2, 4, 4, 4)
    weights = attention_maps(model, pixel_values)[1][:, 2]
    np.testing.assert_allclose(heads[1, 2], patch_map(weights, model.config)[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(last.patches, attention_over(model, processor, str(photo), "last").patches, atol=1e-6)


def test_the_map_lies_over_its_pixels():
    patches = np.array([[0.0, 0.5], [1.0, 0.25]])
    large = enlarged(patches, 4, 6)
    assert large.shape == (4, 6)
    assert np.array_equal(large[:2, :3], np.zeros((2, 3))) and np.array_equal(large[2:, :3], np.ones((2, 3)))
    image = AttendedImage("a $x$.png", "cat", np.full((3, 4, 6), 200, dtype=np.uint8), patches)
    figure = attention_figure("title", [image, image], LIGHT)
    panels = [axes for axes in figure.axes if axes.images and not axes.get_label().startswith("<colorbar")]
    assert len(panels) == 6
    dimmed = panels[1].images[0].get_array()
    assert np.array_equal(dimmed[2:, :3], np.full((2, 3, 3), 200)) and (dimmed[:2, :3] == 24).all()
    assert panels[2].images[0].get_array().tolist() == patches.tolist()
    assert panels[2].images[0].get_extent() == [-0.5, 5.5, 3.5, -0.5]
    assert panels[0].get_xlabel() == "a $x$.png: cat"


def test_every_head_has_its_place():
    heads = np.random.default_rng(0).random((2, 3, 4, 4))
    image = AttendedImage("a.png", "cat", np.zeros((1, 8, 8), dtype=np.uint8), heads[-1, 0])
    panels = [axes for axes in heads_figure("title", image, heads, LIGHT).axes if axes.images]
    assert len(panels) == 7
    assert np.array_equal(panels[1 + 3 + 2].images[0].get_array(), heads[1, 2])
    assert panels[4].get_ylabel() == "layer 2" and panels[3].get_title() == "head 3"


@pytest.mark.parametrize("fields", [{}, {"pooling": "mean", "num_channels": 1, "num_register_tokens": 1}])
def test_the_command_draws_and_says_whose_attention_it_is(model_folder, photo, tmp_path, capsys, fields):
    file, model = tmp_path / "out" / "seen.png", str(model_folder(**fields))
    assert cli.main(["attention", model, str(photo), str(photo), "-o", str(file), "--cpu_threads", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["image", "answer", "on", "patches", "on", "the", "largest", "row", "column"]
    assert len(out) == 4 and out[1] == out[2] and out[1].startswith(str(photo))
    queries = "the patch tokens in the mean, as the network pools them" if fields else "the class token"
    assert out[3] == f"{file}: model: attention of {queries}, rollout"
    assert np.asarray(Image.open(file).convert("L")).std() > 10
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert cli.main(["attention", model, str(photo), "-o", str(one), "--method", "head-mean", "--layer", "2"]) == 0
    assert cli.main(["attention", model, str(photo), "-o", str(two), "--every_head"]) == 0
    assert capsys.readouterr().out.count(f"attention of {queries}") == 2
    assert one.stat().st_size != two.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["photo.png", "--method", "mean"],
            "No --method 'mean'. Did you mean 'head-mean'? Known: head-mean, last, rollout.",
        ),
        (["photo.png", "--layer", "1"], "--layer has no effect with --method rollout"),
        (["photo.png", "--method", "head-mean"], "--method head-mean needs --layer, from 1 to 2"),
        (["photo.png", "--every_head", "--layer", "1"], "--layer has no effect with --every_head"),
        (["photo.png", "--every_head", "--method", "last"], "--method has no effect with --every_head"),
        (["photo.png", "photo.png", "--every_head"], "--every_head draws one image, 2 came; name fewer."),
        (["photo.png"] * 17, "A picture holds up to 16 images, 17 came; name fewer."),
        (["nothing.png"], "nothing.png: there is no such file or folder."),
        (["no.png"], "no.png cannot be read as an image: it does not begin as JPEG"),
        (["photo.png", "-o", "a.jpg"], "--picture a.jpg: the picture is a PNG"),
        (["photo.png", "-o", "no.png/a.png"], "--picture no.png/a.png cannot be written: "),
        (["photo.png", "--cpu_threads", "0"], "--cpu_threads must be at least 1, got 0."),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(model_folder, photo, monkeypatch, capsys, arguments, text):
    model = model_folder()
    monkeypatch.chdir(photo.parent)
    (photo.parent / "no.png").write_text("no image")
    assert cli.main(["attention", str(model), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {text}")


def test_a_network_without_layers_has_no_attention(model_folder, photo, capsys):
    assert cli.main(["attention", str(model_folder(num_hidden_layers=0)), str(photo)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("has no layers, and so no attention.")
