"""Parameter groups and optimizers. Learning rates are in schedules.py."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from .lamb import Lamb
from .lion import Lion
from .muon import Muon
from .recipe import Recipe
from .schedules import num_warmup_steps


@dataclass(frozen=True)
class ParameterGroup:
    """Names and parameters that share a weight decay, a share of the learning rate and, for Muon, a kind."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    weight_decay: float
    rate_scale: float = 1.0  # of the run's learning rate
    is_hidden_matrix: bool = False  # told apart only where parameter_groups was asked to split them


def parameter_groups(
    model: ViTScratchPreTrainedModel,
    weight_decay: float,
    layer_decay: float = 1.0,
    split_hidden: bool = False,
    head_rate_scale: float = 1.0,
) -> list[ParameterGroup]:
    """Groups of the trainable parameters, each of which stands in exactly one: matrices, which decay, then norms,
    biases, LayerScale, tokens and positions, which do not (article 1 leaves its tokens and positions out of both).

    layer_decay: with L layers the rate of layer i (from 0) is layer_decay ** (L - i) of the highest, that of the
    embeddings layer_decay ** (L + 1); groups then go from the embeddings up. This is BEiT's rule (2106.08254), which
    gives the final norm the classifier's rate; timm gives it the last layer's.
    split_hidden: the matrices inside the layers (q, k, v, o, fc1, fc2) form groups of their own, before the others.
    LoRA's are not among them: each is one factor of a matrix. They decay as the matrices they stand for, as in LoRA's
    own runs (2106.09685, appendix D.4), and have their layer's rate.
    head_rate_scale: the classifier's rate is this multiple of the highest; its groups then come last.
    """
    without = model.no_weight_decay()
    top = model.config.num_hidden_layers + 1
    head = top + (head_rate_scale != 1)
    rows: dict[tuple[int, bool, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in without
            is_inside = 0 < _depth(name, top) < top and ".lora_" not in name
            is_hidden = split_hidden and decays and parameter.ndim == 2 and is_inside
            depth = top if layer_decay == 1 else _depth(name, top)
            depth = head if name.startswith("classifier.") else depth
            rows.setdefault((depth, not decays, not is_hidden), []).append((name, parameter))
    return [
        ParameterGroup(
            names=[name for name, _ in members],
            parameters=[parameter for _, parameter in members],
            weight_decay=0.0 if is_kept else weight_decay,
            rate_scale=head_rate_scale if depth == head else layer_decay ** (top - depth),
            is_hidden_matrix=not is_other,
        )
        for (depth, is_kept, is_other), members in sorted(rows.items(), key=lambda item: item[0])
    ]


def _depth(name: str, top: int) -> int:
    """0: the embeddings, i + 1: layer i, top: what comes after the layers."""
    found = re.match(r"(?:vit\.)?(?:embeddings|layers\.(\d+))\.", name)
    if found is None:
        return top
    return 0 if found[1] is None else int(found[1]) + 1


def parameter_table(groups: list[ParameterGroup], learning_rate: float) -> str:
    """An aligned table for reading: name, shape, highest rate and weight decay of each parameter, then the totals."""
    rows = [("name", "shape", "rate", "decay")]
    for group in groups:
        rate, decay = f"{learning_rate * group.rate_scale:.4g}", f"{group.weight_decay:g}"
        for name, parameter in zip(group.names, group.parameters, strict=True):
            rows.append((name, "x".join(map(str, parameter.shape)) or "1", rate, decay))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {rate:>{widths[2]}}  {decay:>{widths[3]}}"
        for name, shape, rate, decay in rows
    ]
    sizes = [(sum(map(torch.numel, group.parameters)), group.weight_decay > 0) for group in groups]
    decayed = sum(size for size, decays in sizes if decays)
    total = sum(size for size, _ in sizes)
    return "\n".join((*lines, f"total: {len(rows) - 1} tensors, {total:,} weights, {decayed:,} of them decay"))


# ---------------------------------------------------------------- optimizers


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the groups that are hidden matrices and torch.optim.AdamW on the rest, as one optimizer.

    Its groups stand in the order given and its state is that of both, so that it is saved, loaded, scaled and cleared
    like any other; a step lends groups and state to the two, and what says that it must be left out.
    """

    _step_supports_amp_scaling = True  # both leave out a step where `found_inf` is set, and wait for nothing to know
    found_inf: torch.Tensor | None = None

    def __init__(self, settings: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]):
        hidden = [group for group in settings if group["is_hidden_matrix"]]
        others = [group for group in settings if not group["is_hidden_matrix"]]
        self.parts: dict[bool, torch.optim.Optimizer] = {True: Muon(hidden, **muon)}
        if others:
            self.parts[False] = torch.optim.AdamW(others, **adamw)
        complete = {kind: iter(part.param_groups) for kind, part in self.parts.items()}
        super().__init__([next(complete[group["is_hidden_matrix"]]) for group in settings], defaults={})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure's result, if there is one, after a step of both."""
        result = None if closure is None else torch.enable_grad()(closure)()
        for is_hidden, part in self.parts.items():
            # here, not once: load_state_dict puts new objects in the place of both
            part.param_groups = [group for group in self.param_groups if group["is_hidden_matrix"] == is_hidden]
            part.state = self.state
            part.grad_scale, part.found_inf = getattr(self, "grad_scale", None), self.found_inf
            part.step()
        return result


def _settings(groups: list[ParameterGroup], recipe: Recipe) -> list[dict[str, Any]]:
    return [
        {
            "params": group.parameters,
            "weight_decay": group.weight_decay,
            "lr": recipe.learning_rate * group.rate_scale,
            "rate_scale": group.rate_scale,
        }
        for group in groups
    ]


def _moments(recipe: Recipe) -> dict[str, Any]:
    return {"betas": (recipe.adam_beta1, recipe.adam_beta2), "eps": recipe.adam_epsilon}


def _adam_options(recipe: Recipe) -> dict[str, Any]:
    return {**_moments(recipe), "fused": True}


def build_adamw(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (1711.05101): weights shrink by rate * decay a step, apart from the gradient."""
    return torch.optim.AdamW(_settings(groups, recipe), lr=recipe.learning_rate, **_adam_options(recipe))


def build_adam(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam (1412.6980). Its weight decay is an L2 penalty: it joins the gradient and is normalised with it."""
    return torch.optim.Adam(_settings(groups, recipe), lr=recipe.learning_rate, **_adam_options(recipe))


def build_lamb(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """LAMB: of each tensor that decays a step is as long as the rate times the tensor."""
    return Lamb(_settings(groups, recipe), lr=recipe.learning_rate, **_moments(recipe))


def build_nadamw(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with Nesterov's momentum (Dozat, 2016), its decay apart from the gradient as AdamW's."""
    settings = _settings(groups, recipe)
    return torch.optim.NAdam(settings, lr=recipe.learning_rate, decoupled_weight_decay=True, **_moments(recipe))


def build_lion(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """Lion: each weight moves by the rate, whatever the size of its gradient."""
    return Lion(_settings(groups, recipe), lr=recipe.learning_rate, betas=_moments(recipe)["betas"])


def build_sgd(groups: list[ParameterGroup], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum, 0.9 unless the recipe says, heavy-ball or Nesterov's; its weight decay is an L2 penalty on the
    gradient."""
    momentum = 0.9 if recipe.momentum is None else recipe.momentum
    # Never fused: torch 2.14's fused kernel leaves the momentum uninitialised where the first step is skipped, as the
    # scaler of fp16 does; test_a_skipped_first_step_leaves_no_trace tells when that has changed.
    return torch.optim.SGD(
        _settings(groups, recipe), lr=recipe.learning_rate, momentum=momentum, nesterov=recipe.nesterov
    )


def build_muon(
    groups: list[ParameterGroup], recipe: Recipe, compute_dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """Muon on hidden matrices, AdamW on embeddings, norms, biases and classifier, with one learning rate and decay.

    compute_dtype: of Muon's products; None: the parameters' own.

    Updates of Muon are scaled by 0.2 * sqrt(larger side), to the root mean square of AdamW's (2502.16982, section 2.2).
    Keller Jordan's own scale, sqrt(max(1, rows / columns)), would need another rate for each width.
    Raises UserError where no matrix inside the layers is trained.
    """
    if not any(group.is_hidden_matrix for group in groups):
        raise UserError("--optim muon needs matrices inside the layers, and none is trained here. Use --optim adamw.")
    settings = [
        {**group_settings, "is_hidden_matrix": group.is_hidden_matrix}
        for group_settings, group in zip(_settings(groups, recipe), groups, strict=True)
    ]
    momentum = 0.95 if recipe.momentum is None else recipe.momentum
    return MuonWithAdamW(
        settings,
        muon={"lr": recipe.learning_rate, "momentum": momentum, "compute_dtype": compute_dtype},
        adamw={"lr": recipe.learning_rate, **_adam_options(recipe)},
    )


OPTIMIZERS: dict[str, Callable[[list[ParameterGroup], Recipe], torch.optim.Optimizer]] = {
    "adamw": build_adamw,
    "adam": build_adam,
    "nadamw": build_nadamw,
    "lamb": build_lamb,
    "lion": build_lion,
    "sgd": build_sgd,
    "muon": build_muon,
}
COMPUTE_DTYPES: dict[str, torch.dtype | None] = {
    "no": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16,
}  # fmt: skip


def build_optimizer(groups: list[ParameterGroup], recipe: Recipe, mixed_precision: str) -> torch.optim.Optimizer:
    """The recipe's optimizer. mixed_precision is the run's: Muon multiplies in it, as the network does."""
    if recipe.optim == "muon":
        return build_muon(groups, recipe, COMPUTE_DTYPES[mixed_precision])
    return OPTIMIZERS[recipe.optim](groups, recipe)


def optimizer_warning(recipe: Recipe, total_steps: int) -> str | None:
    """What to try where SGD starts without warmup, in a sentence; else None.

    Article 3 logs four such runs on MNIST whose loss stayed at 2.30 = ln 10 for ten epochs with a class token's head;
    mean pooling learned a little, and Adam worked.
    """
    if recipe.optim != "sgd" or num_warmup_steps(recipe.warmup_steps, total_steps) > 0:
        return None
    return (
        "SGD without warmup may not train a ViT: the loss can stay at ln(number of classes), most of all with a class "
        "token. If it does, try a higher --learning_rate (0.1), --warmup_steps 0.05, --optim adamw, or "
        "--config_overrides pooling=mean."
    )
