"""The logits of other libraries' networks, here and there: random weights, one row a format and size, no download.

python benchmarks/parity.py                                       Ti, S and B, at 224 pixels
python benchmarks/parity.py --large --output benchmarks/results/parity-cpu.json       L and H too (20 GB of memory)

Every network is built by its own library, all its parameters are drawn at random (biases, norms and LayerScale too:
their usual zeros and ones hide mistakes), saved as that library saves it, and read here by its path. A row is right
where no logit differs by more than 1e-5 times the largest (or 1e-5, below 1), and where converting it back gives every
tensor bit for bit. Google's networks are compared with timm's own reader of their files. The exit code is 1 where a row
is wrong.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from recorded import write_record
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from modeling_vit_scratch.weights import load_pretrained, load_processor
from modeling_vit_scratch.weights.naming import Tensors
from modeling_vit_scratch.weights.writing import write_checkpoint

# hidden size, layers, heads, width of the MLP, patch (2010.11929, table 1; 2012.12877, table 1)
SIZES = {
    "Ti": (192, 12, 3, 768, 16),
    "S": (384, 12, 6, 1536, 16),
    "B": (768, 12, 12, 3072, 16),
    "L": (1024, 24, 16, 4096, 16),
    "H": (1280, 32, 16, 5120, 14),
}
LARGE = ("L", "H")
IMAGE_SIZE, NUM_CLASSES, TOLERANCE = 224, 1000, 1e-5
# timm's arguments for each of its kinds of ViT
TIMM_KINDS = {
    "ViT": {},
    "DeiT III (LayerScale)": {"init_values": 1e-6, "no_embed_class": True},
    "4 registers, mean": {"reg_tokens": 4, "no_embed_class": True, "class_token": False, "global_pool": "avg"},
}


@dataclass
class Row:
    """One comparison; a library without a converter back has no round trip."""

    library: str
    model: str
    size: str
    num_parameters: int
    largest_logit: float
    largest_difference: float
    tolerance: float
    ok: bool
    round_trip_identical: bool | None


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters at random, in eval mode: matrices keep the size of what they multiply, norms lie around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "pos" not in name and "token" not in name:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif name.endswith("weight") or "gamma" in name or "lambda" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return model.eval()


def old_names(tensors: Tensors) -> Tensors:
    """transformers' parameter names as before version 5, which the files on the Hub still have."""
    changes = (
        (".layers.", ".encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in changes:
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def flax_arrays(state: Tensors, num_heads: int) -> dict[str, np.ndarray]:
    """The arrays that vit_jax would save for timm's tensors: the inverse of timm's reader of .npz files."""
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for layer in range(sum(name.endswith("norm1.weight") for name in state)):
        theirs, ours = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{theirs}/LayerNorm_{number}/scale"] = state[f"{ours}.{norm}.weight"]
            arrays[f"{theirs}/LayerNorm_{number}/bias"] = state[f"{ours}.{norm}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = (state[f"{ours}.attn.qkv.{leaf}"].chunk(3) for leaf in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.T.unflatten(1, (num_heads, -1))
            arrays[f"{attention}/{part}/bias"] = bias.unflatten(0, (num_heads, -1))
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.unflatten(0, (num_heads, -1))
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for number in range(2):
            arrays[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}.mlp.fc{number + 1}.weight"].T
            arrays[f"{theirs}/MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}.mlp.fc{number + 1}.bias"]
    return {name: tensor.detach().contiguous().numpy() for name, tensor in arrays.items()}


# ---------------------------------------------------------------- the networks, and how their libraries save them

Saved = tuple[nn.Module, Path, str | None]  # the network, its file or folder, and what it is converted back to


def transformers_vit(size: str, folder: Path, kind: str) -> Saved:
    hidden_size, layers, heads, width, patch = SIZES[size]
    name = "DeiT" if kind == "DeiT" else "ViT"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=width,
        patch_size=patch, image_size=IMAGE_SIZE, num_labels=NUM_CLASSES,
    )  # fmt: skip
    model = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    model.save_pretrained(folder)
    if kind == "ViT, old names":
        file = folder / "model.safetensors"
        file.unlink()
        torch.save(old_names(model.state_dict()), folder / "pytorch_model.bin")
    return model, folder, None if kind == "DeiT" else "transformers"


def timm_vit(size: str, folder: Path, kind: str) -> Saved:
    hidden_size, layers, heads, width, patch = SIZES[size]
    model = TimmViT(
        img_size=IMAGE_SIZE, patch_size=patch, embed_dim=hidden_size, depth=layers, num_heads=heads,
        mlp_ratio=width / hidden_size, num_classes=NUM_CLASSES, **TIMM_KINDS[kind],
    )  # fmt: skip
    torch.save({"model": randomise(model).state_dict()}, folder / "checkpoint.pth")
    return model, folder / "checkpoint.pth", "timm"


def torchvision_vit(size: str, folder: Path, kind: str) -> Saved:
    hidden_size, layers, heads, width, patch = SIZES[size]
    representation = hidden_size if "tanh" in kind else None
    model = TorchvisionViT(
        IMAGE_SIZE,
        patch,
        layers,
        heads,
        hidden_size,
        width,
        num_classes=NUM_CLASSES,
        representation_size=representation,
    )
    torch.save(randomise(model).state_dict(), folder / "vit.pth")
    return model, folder / "vit.pth", "torchvision"


def google_vit(size: str, folder: Path, kind: str) -> Saved:
    """timm's network after timm itself has read the file."""
    source, _, _ = timm_vit(size, folder, "ViT")
    hidden_size, layers, heads, width, patch = SIZES[size]
    np.savez(folder / "vit.npz", **flax_arrays(source.state_dict(), heads))
    model = TimmViT(
        img_size=IMAGE_SIZE, patch_size=patch, embed_dim=hidden_size, depth=layers, num_heads=heads,
        mlp_ratio=width / hidden_size, num_classes=NUM_CLASSES,
    )  # fmt: skip
    model.load_pretrained(str(folder / "vit.npz"))
    return model.eval(), folder / "vit.npz", "timm"


MAKERS: dict[str, tuple[Callable[[str, Path, str], Saved], tuple[str, ...]]] = {
    "transformers": (transformers_vit, ("ViT", "ViT, old names", "DeiT")),
    "timm": (timm_vit, tuple(TIMM_KINDS)),
    "torchvision": (torchvision_vit, ("ViT", "ViT, tanh head")),
    "Google": (google_vit, ("ViT",)),
}


# ---------------------------------------------------------------- comparing


@torch.no_grad()
def compare(library: str, kind: str, size: str) -> Row:
    """One row: the library's logits and ours for two images of noise, and its tensors after the way there and back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs, path, back = MAKERS[library][0](size, folder, kind)
        ours, _ = load_pretrained(str(path))
        images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
        expected = theirs(images)
        expected = getattr(expected, "logits", expected)
        difference = float((ours(images).logits - expected).abs().max())
        largest = float(expected.abs().max())
        tolerance = TOLERANCE * max(1.0, largest)
        identical = None
        if back is not None:
            write_checkpoint(back, folder / "back", ours, load_processor(str(path)))
            returned, own = load_file(folder / "back" / "model.safetensors"), theirs.state_dict()
            identical = set(returned) == set(own) and all(torch.equal(returned[key], own[key]) for key in own)
            again, _ = load_pretrained(str(folder / "back"))
            state = again.state_dict()
            identical = identical and all(torch.equal(state[key], t) for key, t in ours.state_dict().items())
    count = sum(parameter.numel() for parameter in theirs.parameters())
    is_right = difference <= tolerance and identical is not False
    return Row(library, kind, size, count, largest, difference, tolerance, is_right, identical)


def rows(sizes: list[str]) -> Iterator[Row]:
    for library, (_, kinds) in MAKERS.items():
        for kind in kinds:
            for size in sizes:
                yield compare(library, kind, size)


HEADER = "| library | model | size | parameters | largest logit | largest difference | tolerance | ok | round trip |"


def line(row: Row) -> str:
    trip = {True: "bit-identical", False: "DIFFERS", None: "no way back"}[row.round_trip_identical]
    numbers = f"{row.largest_logit:.3f} | {row.largest_difference:.1e} | {row.tolerance:.1e}"
    ok = "yes" if row.ok else "NO"
    return f"| {row.library} | {row.model} | {row.size} | {row.num_parameters:,} | {numbers} | {ok} | {trip} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="L and H too")
    parser.add_argument("--output", help="a JSON file for the numbers")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(HEADER + "\n" + "|---" * HEADER.count(" |") + "|")
    found = []
    for row in rows([size for size in SIZES if arguments.large or size not in LARGE]):
        found.append(row)
        print(line(row), flush=True)
    if arguments.output:
        write_record(arguments.output, "parity.py", sys.argv[1:], rows=[asdict(row) for row in found])
    return 0 if all(row.ok for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
