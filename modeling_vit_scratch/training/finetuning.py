"""What of a pretrained network is trained: all of it, the head, the last layers, attention, or LoRA beside it.

LoRA's layers are peft's, put into the network in place: it stays the ViTScratchForImageClassification that it was, with
more parameters, so that training, averaging and checkpoints need not know of them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.model_folder import written_whole
from ..weights import LoadingReport
from .recipe import Recipe

MODES = ("full", "head", "last:K", "attention", "lora")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*ATTENTION, "fc1", "fc2")},
    "attention": ATTENTION,
    "all-linear": (*ATTENTION, "fc1", "fc2"),
}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PEFT_PREFIX = "base_model.model."  # of every tensor's name in peft's files


@dataclass(frozen=True)
class Finetuning:
    """What is trained: its parameters, all parameters of the network, and the bytes of the trained ones."""

    mode: str
    num_trained: int
    num_parameters: int
    num_bytes: int

    def __str__(self) -> str:
        share, kilobytes = self.num_trained / self.num_parameters, self.num_bytes / 1e3
        size = f"{kilobytes / 1e3:,.1f} MB" if kilobytes >= 1e3 else f"{kilobytes:.1f} kB"
        of = f"{self.num_trained:,} of {self.num_parameters:,} parameters"
        return f"finetune {self.mode}: {of} are trained ({share:.2%}, {size})"


def parse_finetune(text: str) -> tuple[str, int | None]:
    """(mode, number of layers, for "last:K" alone). Raises UserError for what is none of MODES."""
    mode, _, count = text.partition(":")
    if mode == "last":
        if not count.isdecimal() or int(count) == 0:
            raise UserError(f"--finetune last:K takes a number of layers from 1 up, got {text!r}; last:2 works.")
        return mode, int(count)
    if text not in MODES:
        raise unknown("finetune", text, MODES)
    return text, None


def prepare_finetuning(model: ViTScratchForImageClassification, recipe: Recipe) -> Finetuning:
    """Sets which parameters are trained, in place; for LoRA, puts its matrices in.

    head: the classifier. last:K: the last K layers, the final norm, the classifier. attention: every layer's attention,
    learned positions and the classifier, as in 2203.09795, section 4, and the code of its authors (DeiT's attn-only).
    lora: LoRA's matrices beside those that `lora_target_modules` names, and the classifier, whole.
    Raises UserError for another mode, for more layers than there are, and where peft is not installed.
    """
    mode, count = parse_finetune(recipe.finetune)
    num_layers = len(model.vit.layers)
    if count is not None and count > num_layers:
        raise UserError(f"--finetune {recipe.finetune}: the network has {num_layers} layers; use at most that many.")
    if mode == "lora":
        _add_lora(model, recipe)
    else:
        model.requires_grad_(False)
        for part in _trained_parts(model, mode, count):
            part.requires_grad_(True)
    parameters = [parameter for name, parameter in model.named_parameters() if ".original_module." not in name]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Finetuning(
        recipe.finetune, _size(trained), _size(parameters), sum(p.numel() * p.element_size() for p in trained)
    )


def _trained_parts(
    model: ViTScratchForImageClassification, mode: str, count: int | None
) -> list[nn.Module | nn.Parameter]:
    vit, classifier = model.vit, model.classifier
    if mode == "head":
        return [classifier]
    if mode == "last":
        return [*vit.layers[-count:], vit.layernorm, classifier]
    if mode == "attention":
        positions = vit.embeddings.position_embeddings
        learned = [] if positions is None else [positions]
        return [*learned, *(layer.attention for layer in vit.layers), classifier]
    return [model]


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def head_rate_scale(recipe: Recipe, report: LoadingReport | None) -> float:
    """The classifier's rate as a multiple of the others': as the recipe says, else 10 for a head that is drawn anew
    beside pretrained weights."""
    if recipe.head_learning_rate_scale is not None:
        return recipe.head_learning_rate_scale
    is_new = report is not None and any(name.startswith("classifier.") for name in report.replaced)
    return 10.0 if is_new and recipe.finetune != "head" else 1.0


def set_train_mode(model: nn.Module):
    """As model.train(), but what is frozen stays in eval mode, without dropout and stochastic depth.

    A module trains where it holds a trained parameter; one that holds no parameters, as a dropout, does as the module
    around it. So with LoRA in the attention of a layer, the dropouts of that attention and of the layer's branches are
    on, those inside its MLP and on the embeddings off.
    """
    _set_mode(model, False)


def _set_mode(module: nn.Module, is_around_training: bool):
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else is_around_training
    for child in module.children():
        _set_mode(child, module.training)


def refuse_idle_rates(model: ViTScratchForImageClassification, rates: dict[str, float | None], finetune: str):
    """Raises UserError for a rate of what is left out in training that acts in frozen modules alone.

    rates: those that a person gave, by the configuration's field; a rate of zero is asked for in vain nowhere.
    """
    set_train_mode(model)
    # the others act beside every layer's branches or before the layers, of which each way of fine-tuning trains some
    where: dict[str, list[nn.Module]] = {
        "embedding_dropout_prob": [model.vit.embeddings.dropout],
        "mlp_dropout_prob": [layer.mlp.hidden_dropout for layer in model.vit.layers],
    }
    idle = [name for name, modules in where.items() if rates.get(name) and not any(m.training for m in modules)]
    model.eval()
    if idle:
        raise UserError(
            f"--config_overrides {idle[0]} has no effect here: with --finetune {finetune} what it acts on is frozen."
        )


# ---------------------------------------------------------------- LoRA


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError("--finetune lora needs peft: pip install peft.") from None
    return peft


def _add_lora(model: ViTScratchForImageClassification, recipe: Recipe):
    peft = _peft()
    targets: list[str] = []
    for name in (part.strip() for part in recipe.lora_target_modules.split(",")):
        if name not in LORA_TARGETS:
            raise unknown("lora_target_modules", name, LORA_TARGETS)
        targets += LORA_TARGETS[name]
    if not len(model.vit.layers):
        raise UserError("--finetune lora adds to the matrices of layers, and this network has none.")
    config = peft.LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=sorted(set(targets)),
        modules_to_save=["classifier"],  # trained whole, and kept with the adapter
    )
    peft.inject_adapter_in_model(config, model)


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA's matrices are in the network."""
    return hasattr(model, "peft_config")  # peft sets it on the network that it changes


def save_adapter(
    model: ViTScratchForImageClassification, folder: Path, base_model_name_or_path: str, revision: str | None = None
):
    """Writes LoRA's matrices and the classifier to `folder`, whole or not at all, as peft.PeftModel loads them.

    base_model_name_or_path, revision: the checkpoint that the network was before, for who wants to load it.
    """
    peft = _peft()
    # "auto" would look for the base's configuration on the Hub, to see whether its vocabulary had grown
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision, config.inference_mode = base_model_name_or_path, revision, True
    on_cpu = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(Path(folder)) as partial:
        config.save_pretrained(partial)
        save_file(on_cpu, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: ViTScratchForImageClassification, folder: Path) -> ViTScratchForImageClassification:
    """The network with the adapter in it, in place, for use, not for training.

    model: the base of the adapter, with a classifier for as many classes as the adapter's.
    Raises UserError where the folder holds no LoRA adapter, or one that does not fit the network tensor by tensor.
    """
    peft, folder = _peft(), Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no adapter: it has no {name}.")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        saved = load_file(folder / ADAPTER_WEIGHTS)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"The adapter in {folder} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, peft.LoraConfig):
        raise UserError(f"{folder} holds an adapter of the kind {config.peft_type.value}, expected LORA.")
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
    head = {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    if _shapes(head) != _shapes({name: tensor for name, tensor in tensors.items() if name.startswith("classifier.")}):
        raise UserError(
            f"The classifier of the adapter in {folder} does not fit this network's, of {model.num_labels} classes: "
            "give the base a classifier for the adapter's classes first."
        )
    peft.inject_adapter_in_model(config, model)
    found, expected = _shapes(tensors), _shapes(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise UserError(f"The adapter in {folder} is of another network: {', '.join(wrong[:3])} do not fit.")
    peft.set_peft_model_state_dict(model, tensors)
    return model.requires_grad_(False).eval()


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def merged(model: ViTScratchForImageClassification) -> ViTScratchForImageClassification:
    """A plain copy of a network with LoRA, W + B A * lora_alpha / lora_r in the place of W; without LoRA, itself."""
    if not has_adapter(model):
        return model
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            plain.set_submodule(name, module.modules_to_save["default"])
    del plain.peft_config
    return plain
