"""Batches: the image processor's pixels in training and evaluation; every sample once over ranks and workers."""

import io
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image

from modeling_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil
from modeling_vit_scratch.data.augmentation import normalise
from modeling_vit_scratch.data.decoding import BadImageError, Decoder, normalisation, open_image, probe
from modeling_vit_scratch.data.examples import ArrayExamples, Example
from modeling_vit_scratch.data.loading import Batch, EvaluationData, TrainingData, joined
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.data.splits import Source, Split
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.network import probe_source

CPU = torch.device("cpu")
SMALL = {"size": {"height": 8, "width": 8}}
PHOTO = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}


def encode(image: Image.Image, name: str = "picture.png") -> Example:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return Example(buffer.getvalue(), 0, name)


@pytest.mark.parametrize("fields, size", [(SMALL, (8, 8)), (SMALL, (13, 9)), (PHOTO, (40, 30)), (PHOTO, (18, 25))])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_decoded_batches_are_what_the_image_processor_makes(fields, size, num_channels):
    processor = ViTScratchImageProcessor(num_channels=num_channels, **fields)
    images = make_images(3, size)
    decoder = Decoder(processor)
    ours = normalise(torch.stack([decoder(encode(image)) for image in images]), *normalisation(processor, CPU))
    assert torch.equal(ours, processor(images, return_tensors="pt")["pixel_values"])


def test_the_pil_processor_gives_nearly_the_same_pixels():
    image = make_images(1, (40, 30))[0]
    pil, torchvision = (
        Decoder(cls(**PHOTO))(encode(image)).float() for cls in (ViTScratchImageProcessorPil, ViTScratchImageProcessor)
    )
    assert (pil - torchvision).abs().max() <= 2  # two resamplers' rounding, of 255


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "bad.jpg cannot be read as an image"),
        (b"not an image", "bad.jpg"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "bad.jpg"),
    ],
)
def test_images_that_cannot_be_read_are_named(content, message):
    with pytest.raises(BadImageError, match=message):
        open_image(Example(content, 0, "bad.jpg"))


def test_truncated_images_and_bombs_are_named():
    whole = encode(make_images(1, (64, 64))[0]).image
    with pytest.raises(BadImageError, match="half.png cannot be read"):
        open_image(Example(whole[: len(whole) // 2], 0, "half.png"))
    for width, message in ((8_500, "8500 x 10000 pixels are over the limit"), (20_000, "decompression bomb")):
        buffer = io.BytesIO()
        Image.new("1", (width, 10_000)).save(buffer, format="PNG")
        assert len(buffer.getvalue()) < 50_000
        with pytest.raises(BadImageError, match=f"bomb.png cannot be read as an image: .*{message}"):
            open_image(Example(buffer.getvalue(), 0, "bomb.png"))


def test_photographs_are_turned_upright():
    image = make_images(1, (10, 20))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    assert open_image(Example(buffer.getvalue(), 0, "x")).size == (10, 20)


@pytest.mark.parametrize("rest", ["colour", "larger"])
def test_images_that_lie_behind_thousands_of_others_count_for_size_and_channels(rest):
    greys, colours = np.zeros((4700, 4, 4), dtype=np.uint8), np.zeros((300, 4, 4, 3), dtype=np.uint8)
    others = list(colours) if rest == "colour" else [np.zeros((5, 5), dtype=np.uint8)] * 300
    split = Split(ArrayExamples([*greys, *others], np.zeros(5000, dtype=int), "sorted"))
    found = probe_source(Source("sorted", {"train": split}, ["a", "b"], None, False))
    assert found == (((4, 4), 3) if rest == "colour" else (None, 1))


def test_probe_tells_one_size_from_several_and_grey_from_colour():
    colour, grey = make_images(1)[0], make_images(1)[0].convert("L")
    assert probe([encode(grey), encode(grey)]) == ((8, 8), 1)
    assert probe([encode(grey), encode(colour)]) == ((8, 8), 3)
    assert probe([encode(colour), encode(make_images(1, (9, 8))[0])]) == (None, 3)


def test_random_resized_crops_depend_on_seed_epoch_and_sample_alone():
    example = encode(make_images(1, (40, 30))[0])
    decoder = Decoder(ViTScratchImageProcessor(**PHOTO), seed=1, crop_scale=(0.1, 1.0))
    first = decoder(example, 2, 3)
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, decoder(example, 2, 3))
    others = [decoder(example, 2, 4), decoder(example, 3, 3), Decoder(decoder.processor, 2, (0.1, 1.0))(example, 2, 3)]
    assert not any(torch.equal(first, other) for other in others)


def test_random_resized_crops_keep_within_scale_and_shape():
    # an image whose pixels are their own coordinates tells where a crop came from
    rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
    example = encode(Image.fromarray(np.stack((rows, columns, rows), axis=-1)))
    decoder = Decoder(ViTScratchImageProcessor(**PHOTO), seed=0, crop_scale=(0.25, 1.0))
    areas, ratios = [], []
    for sample in range(300):
        pixels = decoder(example, 0, sample).float()
        height, width = ((pixels[axis].max() - pixels[axis].min()).item() * 16 / 15 for axis in (0, 1))
        areas.append(height * width / 200**2)
        ratios.append(width / height)
    # the outermost of 16 samples stand for 15/16 of the side: 10 % slack
    assert min(areas) > 0.2 and max(areas) < 1.15 and np.quantile(areas, 0.9) > 0.7
    assert min(ratios) > 0.66 and max(ratios) < 1.5


def make_data(source, decoder, rank=0, world_size=1, num_workers=0, batch_size=12, **order):
    return TrainingData(source, decoder, batch_size, 5, rank, world_size, num_workers, CPU, **order)


def global_batches(source, decoder, steps, world_size=1, **settings):
    """The global batches of `steps`, put together from all ranks."""
    ranks = [
        list(make_data(source, decoder, rank, world_size, **settings).batches(steps.start, steps.stop))
        for rank in range(world_size)
    ]
    batches = []
    for parts in zip(*ranks, strict=True):
        order = torch.cat([part.positions for part in parts]).argsort()
        assert order.sort().values.tolist() == list(range(12)) and len(order) == 12
        batches.append((torch.cat([p.images for p in parts])[order], torch.cat([p.labels for p in parts])[order]))
    return batches


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("crop_scale", [None, (0.5, 1.0)])
def test_batches_do_not_depend_on_ranks_workers_or_where_one_starts(parquet_repo, streaming, crop_scale):
    source = open_source(str(parquet_repo(train=[20, 13, 30])), streaming=streaming, train_val_split=0.1, seed=0)
    decoder = Decoder(ViTScratchImageProcessor(**SMALL), 5, crop_scale)
    window = {"num_lanes": 6, "window": 4}
    whole = global_batches(source, decoder, range(0, 12), **window)
    assert equal(whole, global_batches(source, decoder, range(0, 12), num_workers=3, **window))
    for world_size in (2, 3):
        assert equal(whole, global_batches(source, decoder, range(0, 12), world_size, **window))
    assert equal(whole, global_batches(source, decoder, range(0, 12), 2, num_workers=2, **window))
    assert equal(whole[7:], global_batches(source, decoder, range(7, 12), 2, **window))


def test_a_repeated_photograph_is_cropped_anew_each_time(parquet_repo):
    source = open_source(str(parquet_repo(train=[20, 13, 30])), train_val_split=0.1, seed=0)
    whole, cropped = (Decoder(ViTScratchImageProcessor(**SMALL), 5, scale) for scale in (None, (0.3, 0.6)))
    plain = global_batches(source, whole, range(0, 3), repeats=3)
    for (images, labels), (crops, _) in zip(plain, global_batches(source, cropped, range(0, 3), 2, repeats=3)):
        for first in range(0, 12, 3):
            assert all(torch.equal(images[first], images[first + copy]) for copy in (1, 2))
            assert len(set(labels[first : first + 3].tolist())) == 1
            assert len({crops[first + copy].numpy().tobytes() for copy in (0, 1, 2)}) == 3


def test_parts_of_a_batch_are_joined_in_the_order_of_their_positions():
    rng = torch.Generator().manual_seed(0)
    whole = (
        torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8, generator=rng),
        torch.arange(11) * 3,
        torch.arange(11),
    )
    shares = [share.sort().values for share in torch.randperm(11, generator=rng).split([4, 6, 1])]
    back = joined([Batch(*(tensor[share] for tensor in whole)) for share in shares])
    assert equal([whole[:2]], [(back.images, back.labels)]) and torch.equal(back.positions, whole[2])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_of_batches_is_the_training_split(parquet_repo, streaming, world_size):
    source = open_source(str(parquet_repo(train=[21, 15])), streaming=streaming, train_val_split=0)
    decoder = Decoder(ViTScratchImageProcessor(**SMALL))
    batches = global_batches(source, decoder, range(0, 6), world_size, num_lanes=4, window=3)
    seen = Counter(image.numpy().tobytes() for images, _ in batches for image in images)
    assert len(seen) == 36 and set(seen.values()) == {2}  # 6 x 12 samples: two epochs of 36


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (3, 2)])
def test_evaluation_shows_each_sample_once(parquet_repo, streaming, world_size, num_workers):
    source = open_source(str(parquet_repo(train=[9], test=[20, 17])), streaming=streaming, train_val_split=0)
    decoder = Decoder(ViTScratchImageProcessor(**SMALL))
    data = [
        EvaluationData(source, source.splits["test"], decoder, 8, rank, world_size, num_workers, CPU)
        for rank in range(world_size)
    ]
    positions = torch.cat([batch.positions for part in data for batch in part.batches()])
    assert sorted(positions.tolist()) == list(range(37))


def test_a_broken_image_in_a_worker_is_one_line(image_folder):
    folder = image_folder(cat=6, dog=6)
    (folder / "cat" / "3.png").write_bytes(b"broken")
    source = open_source(train_dir=str(folder), train_val_split=0)
    decoder = Decoder(ViTScratchImageProcessor(**SMALL), 0, (0.5, 1.0))
    with pytest.raises(BadImageError, match=r"cat/3.png cannot be read as an image") as caught:
        list(make_data(source, decoder, num_workers=2).batches(0, 1))
    assert "Traceback" not in str(caught.value)


class KilledAtSample3(Decoder):
    """Stands for a worker that the system kills when memory runs out."""

    def __call__(self, example, epoch=0, sample=0):
        if sample == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(example, epoch, sample)


def test_a_killed_worker_is_one_line_that_says_how_to_go_on(image_folder):
    source = open_source(train_dir=str(image_folder(cat=6, dog=6)), train_val_split=0)
    decoder = KilledAtSample3(ViTScratchImageProcessor(**SMALL), 0, (0.5, 1.0))
    with pytest.raises(UserError, match=r"was killed.*fewer --dataloader_num_workers \(now 2\).*the last checkpoint"):
        list(make_data(source, decoder, num_workers=2).batches(0, 1))


def test_a_shard_that_disappears_is_named(parquet_repo):
    folder = parquet_repo(train=[20, 13])
    source = open_source(str(folder), streaming=True, train_val_split=0)
    data = make_data(source, Decoder(ViTScratchImageProcessor(**SMALL), 0, (0.5, 1.0)), num_lanes=2, window=4)
    shard = folder / "data" / "train-00001-of-00002.parquet"
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        list(data.batches(0, 3))
