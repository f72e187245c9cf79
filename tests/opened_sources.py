"""What tests of folders and of metadata files ask of a source."""

import os

import pytest

from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError


def refusal(**arguments):
    """The text of the error that opening these folders ends in: one line that can be printed anywhere."""
    with pytest.raises(UserError) as caught:
        open_source(**{name: str(value) for name, value in arguments.items()})
    text = str(caught.value)
    assert "\n" not in text and text.encode("utf-8")
    return text


def examples_of(source, split="train"):
    found = source.splits[split]
    return [e for shard in range(len(found.shard_sizes)) for e in found.examples.read(shard, found.rows(shard))]


def labels_by_file(source, split="train"):
    return {os.path.basename(example.image): example.label for example in examples_of(source, split)}
