"""The table of formats: how each is recognised by its keys and read. A row here is a format."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from . import google_format, timm_format, torchvision_format, transformers_format
from .files import Checkpoint
from .naming import Tensors
from .shapes import Reading


@dataclass(frozen=True)
class Format:
    """signature: patterns of which each fits some name. read: tensors (and heads, if a person gave them) to ours."""

    signature: tuple[str, ...]
    names: dict[str, str]
    read: Callable[[Checkpoint, Tensors, int | None], Reading]

    def recognises(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(re.fullmatch(pattern, name) for name in names) for pattern in self.signature)

    def likeness(self, names: Iterable[str]) -> int:
        """How many names have a module of this format, whatever the numbers in them."""
        modules = {re.sub(r"\d+|\{\}", "#", theirs) for theirs in self.names.values()}
        plain = [re.sub(r"\d+", "#", name.replace("/", ".")) for name in names]
        return sum(name in modules or name.rpartition(".")[0] in modules for name in plain)


FORMATS = {
    "transformers": Format(transformers_format.SIGNATURE, transformers_format.NAMES, transformers_format.read),
    "timm": Format(timm_format.SIGNATURE, timm_format.NAMES, timm_format.read),
    "torchvision": Format(torchvision_format.SIGNATURE, torchvision_format.NAMES, torchvision_format.read),
    "google": Format(google_format.SIGNATURE, google_format.NAMES, google_format.read),
}


def recognise(source: str, names: Iterable[str]) -> str:
    """The one format whose signature the names of the tensors bear. Raises UserError where it is not exactly one."""
    names = list(names)
    found = [title for title, form in FORMATS.items() if form.recognises(names)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if found:
        raise UserError(f"{source} bears the names of {' and of '.join(found)} at once; expected one. It has {shown}.")
    nearest = max(FORMATS, key=lambda title: FORMATS[title].likeness(names))
    first = FORMATS[nearest].signature[0].replace("\\", "")
    raise UserError(
        f"{source} is no Vision Transformer that can be read (known: {', '.join(FORMATS)}). The nearest is {nearest}, "
        f"which has {first}; this has {shown or 'no tensors'}."
    )


def is_own(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == ViTScratchConfig.model_type


def read_checkpoint(checkpoint: Checkpoint, num_attention_heads: int | None = None) -> Reading:
    """The checkpoint's configuration (without labels where it has no head) and tensors as this package has them."""
    tensors = checkpoint.read_tensors()
    if is_own(checkpoint):
        if num_attention_heads is not None:
            raise UserError(f"{checkpoint.name} says its number of attention heads itself; leave the option out.")
        reading = _read_own(checkpoint, tensors)
    else:
        reading = FORMATS[recognise(checkpoint.name, tensors)].read(checkpoint, tensors, num_attention_heads)
    strange = [name for name, tensor in reading.tensors.items() if not tensor.is_floating_point()]
    if strange:
        raise UserError(f"{checkpoint.name}: a ViT's tensors are of floating point; {strange[0]} is not.")
    if not reading.has_head:
        reading.config.num_labels = 0
    reading.notes = checkpoint.notes + reading.notes
    return reading


def own_config(checkpoint: Checkpoint) -> ViTScratchConfig:
    """The configuration that one of this package's checkpoints was saved with."""
    try:
        return ViTScratchConfig.from_dict(checkpoint.config)
    except Exception as error:
        text = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{checkpoint.name}: config.json is no {ViTScratchConfig.__name__}: {text}") from error


def _read_own(checkpoint: Checkpoint, tensors: Tensors) -> Reading:
    if not any(name.startswith("vit.") for name in tensors):
        tensors = {f"vit.{name}": tensor for name, tensor in tensors.items()}  # a ViTScratchModel saved alone
    return Reading(checkpoint.name, "vit_scratch", own_config(checkpoint), tensors)
