"""Checks of images, patches and tokens: what depends on what, and on whose order."""

import torch

from .anatomy import Anatomy, Call, footprints, map_tensors, permute_tables, recording
from .findings import NotApplicable, Verdict
from .subject import Subject, relative_change

SAME = 1e-3  # rounding gives about 1e-6, a bug more than 1e-1
MOST_FOOTPRINTS = 16


@torch.no_grad()
def batch_independence(subject: Subject) -> Verdict:
    """The logits of an image, and its tokens after the last layer, are the same alone and beside others."""
    module, images = subject.varied(), subject.images(5)
    others = torch.cat((images[:1], subject.images(4, seed=9)))
    together, beside_others, alone = (_of_first_image(subject, module, batch) for batch in (images, others, images[:1]))
    change, what = max(
        (relative_change(values, reference), what)
        for outputs in (beside_others, alone)
        for what, values, reference in zip(("logits", "tokens"), outputs, together)
    )
    sequence_first = any(
        isinstance(part, torch.nn.MultiheadAttention) and not part.batch_first for part in module.modules()
    )
    return Verdict(
        change < SAME,
        f"{what} change by {change:.2g} of their spread",
        f"below {SAME}",
        "attention runs over the batch: nn.MultiheadAttention has its sequence on the first axis"
        if sequence_first
        else "images of a batch are mixed: attention, a norm or a reshape works along the batch's axis",
        "nn.MultiheadAttention(..., batch_first=True)"
        if sequence_first
        else "keep the batch on the first axis through every view, reshape and softmax",
    )


def _of_first_image(subject: Subject, module: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The logits of the first image and, where there are layers, its tokens after the last."""
    with recording(module) as calls:
        outputs = [subject.logits(module, images)[:1]]
    anatomy = subject.anatomy
    if anatomy.layers:
        last = [call for call in calls if call.name == anatomy.layers[-1].name][-1]
        outputs.append(last.result.select(1 - anatomy.sequence_axis, 0))
    return outputs


def every_patch_counts(subject: Subject) -> Verdict:
    """The logits depend on every pixel."""
    module = subject.varied()
    images = subject.images(4).requires_grad_()
    logits = subject.logits(module, images)
    if not logits.requires_grad:
        raise NotApplicable("the logits have no gradient back to the pixels")
    direction = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((logits @ direction).sum(), images, allow_unused=True)
    if gradient is None:
        raise NotApplicable("the logits have no gradient back to the pixels")
    size = gradient.abs().amax(dim=(0, 1))  # (H, W)
    seen = size > 1e-6 * size.max()
    rows, columns = seen.any(dim=1), seen.any(dim=0)
    border = not seen.all() and bool(seen[rows][:, columns].all())
    return Verdict(
        bool(seen.all()),
        f"{seen.float().mean().item():.1%} of the pixels count",
        "100%",
        f"only {int(rows.sum())} x {int(columns.sum())} of {len(rows)} x {len(columns)} pixels are cut into patches"
        if border
        else "the class output is cut off from some patches: attention does not reach them, or they are not read",
        "choose a patch size that divides the image, or pad the image"
        if border
        else "follow the tokens from the patches to the head; a class token must attend to all patches",
    )


# ---------------------------------------------------------------- patches


def _patch_masks(subject: Subject) -> torch.Tensor:
    """Footprints (n, C, H, W) of up to MOST_FOOTPRINTS patch tokens. Raises NotApplicable where they have none."""
    anatomy = subject.require_layers()
    indices = anatomy.patch_tokens()
    if len(indices) < 2:
        raise NotApplicable("fewer than two tokens depend on the image")
    chosen = torch.linspace(0, len(indices) - 1, min(len(indices), MOST_FOOTPRINTS)).round().long().tolist()
    masks = footprints(anatomy, [indices[position] for position in chosen])
    if not masks.flatten(1).any(dim=1).all():
        raise NotApplicable("the tokens have no gradient back to the pixels")
    return masks


def true_patches(subject: Subject) -> Verdict:
    """Each token before the first layer is made of one rectangle of the image, in all its channels."""
    masks = _patch_masks(subject)
    faults = [fault for mask in masks if (fault := _fault(mask))]
    height, width = _sides(masks[0])
    return Verdict(
        not faults,
        f"{len(faults)} of {len(masks)} tokens looked at: {faults[0]}" if faults else f"{height} x {width} pixels each",
        "each a rectangle, all channels",
        "the image is reshaped into patches without bringing the axes of a patch side by side",
        "patches = images.reshape(B, C, H//P, P, W//P, P).permute(0, 2, 4, 1, 3, 5), then flatten; or nn.Conv2d with "
        "stride P",
    )


def _fault(mask: torch.Tensor) -> str | None:
    """What is wrong with the footprint (C, H, W) of a patch; None where nothing is."""
    channels = mask.flatten(1).any(dim=1)
    if not channels.all():
        return f"{int(channels.sum())} of {len(channels)} channels, {'x'.join(map(str, _sides(mask)))} pixels"
    if mask.all():
        return "the whole image"
    box = mask[:, mask.any(dim=(0, 2))][:, :, mask.any(dim=(0, 1))]
    if not box.all():
        return "scattered pixels"
    sides = [mask.any(dim=dims).nonzero().flatten() for dims in ((0, 2), (0, 1))]
    if any(int(side[-1] - side[0]) + 1 != len(side) for side in sides):
        return "rows or columns that are not neighbours"
    return None


def _sides(mask: torch.Tensor) -> tuple[int, int]:
    return int(mask.any(dim=(0, 2)).sum()), int(mask.any(dim=(0, 1)).sum())


def patch_order_matters(subject: Subject) -> Verdict:
    """Patches exchanged for one another in the image change the logits."""
    masks = _patch_masks(subject).flatten(1)
    sizes = masks.sum(dim=1)
    if (masks.sum(dim=0) > 1).any() or (sizes != sizes[0]).any():
        raise NotApplicable("the patches overlap or are of several sizes: they cannot be exchanged")
    module, images = subject.varied(), subject.images(4)
    exchanged = images.flatten(1).clone()
    places = [mask.nonzero().flatten() for mask in masks]
    for place, source in zip(places, [*places[1:], places[0]]):
        exchanged[:, place] = images.flatten(1)[:, source]
    with torch.no_grad():
        change = relative_change(subject.logits(module, exchanged.view_as(images)), subject.logits(module, images))
    return Verdict(
        change > SAME,
        f"changes by {change:.2g} of the logits' spread",
        f"above {SAME}",
        "nothing tells the network where a patch stands: positions are missing, or are not added",
        "add a learned table: tokens + nn.Parameter(torch.randn(1, N, D) * 0.02); where positions are off on purpose, "
        "skip this check",
    )


# ---------------------------------------------------------------- the order of tokens


def _reordered(num_tokens: int, movable: list[int]) -> torch.Tensor:
    """An order of the tokens that moves all of `movable` and no other."""
    order = torch.arange(num_tokens)
    order[movable] = torch.tensor([*movable[1:], movable[0]])
    return order


def _layer_change(anatomy: Anatomy, layer: Call) -> float:
    """How far a layer's output for reordered tokens is from its output, reordered."""
    order = _reordered(anatomy.num_tokens, list(range(anatomy.num_tokens)))
    axis, tokens = anatomy.sequence_axis, layer.tokens
    wanted = layer.result.index_select(axis, order)
    return min(
        relative_change(layer.again(tokens.index_select(axis, order), permute_tables(order, masks)), wanted)
        for masks in (False, True)
    )


def _acts_on_positions(anatomy: Anatomy, layer: Call) -> bool:
    """Whether the layer itself knows positions (rotary ones, relative biases), as opposed to confusing tokens.

    Such a layer gives equal tokens equal outputs, since their values are the same whatever the weights are, and lets
    every token see every other.
    """
    axis, tokens = anatomy.sequence_axis, layer.tokens
    equal = tokens.narrow(axis, 0, 1).expand_as(tokens)
    output = layer.again(equal)
    if relative_change(output, output.narrow(axis, 0, 1).expand_as(output)) > SAME:
        return False
    last = tokens.clone()
    last.select(axis, anatomy.num_tokens - 1).neg_()
    first_output = (anatomy.select(result, 0) for result in (layer.again(last), layer.result))
    return relative_change(*first_output) > 1e-6


@torch.no_grad()
def layer_equivariance(subject: Subject) -> Verdict:
    """Each layer gives reordered tokens the same outputs, reordered."""
    anatomy = subject.require_layers()
    changes = [_layer_change(anatomy, layer) for layer in anatomy.layers]
    change = max(changes)
    layer = anatomy.layers[changes.index(change)]
    passed = change < SAME
    if not passed and all(_acts_on_positions(anatomy, layer) for layer in anatomy.layers):
        raise NotApplicable("the layers act on positions themselves (rotary, relative), equal tokens stay equal")
    return Verdict(
        passed,
        f"{layer.name} changes by {change:.2g}" if not passed else f"{len(changes)} layers change by {change:.1g}",
        f"below {SAME}",
        "heads are split or merged by a view or reshape without a transpose, so that tokens get pieces of one another, "
        "or a mask hides tokens",
        "x.view(B, N, A, F).transpose(1, 2) to split, x.transpose(1, 2).reshape(B, N, D) to merge, and no causal mask",
    )


@torch.no_grad()
def token_equivariance(subject: Subject) -> Verdict:
    """Once positions have been added, the order of the patch tokens does not change the logits."""
    anatomy = subject.require_layers()
    movable = anatomy.patch_tokens()
    if len(movable) < 2:
        raise NotApplicable("fewer than two tokens depend on the image")
    order = _reordered(anatomy.num_tokens, movable)
    module, images = anatomy.module, anatomy.images
    before = subject.logits(module, images)
    change = min(
        relative_change(_logits_of_reordered(subject, anatomy, order, masks), before) for masks in (False, True)
    )
    passed = change < SAME
    layers_differ = not passed and max(_layer_change(anatomy, layer) for layer in anatomy.layers) > SAME
    if layers_differ and all(_acts_on_positions(anatomy, layer) for layer in anatomy.layers):
        raise NotApplicable("the layers act on positions themselves (rotary, relative)")
    return Verdict(
        passed,
        f"changes by {change:.2g} of the logits' spread",
        f"below {SAME}",
        "between the embeddings and the head something other than positions depends on the order of tokens",
        "see layer_equivariance; if it passes, look at what stands between the layers and at the pooling",
    )


def _logits_of_reordered(subject: Subject, anatomy: Anatomy, order: torch.Tensor, masks: bool) -> torch.Tensor:
    """Logits with the tokens reordered where they enter the first layer, and their tables at every layer."""
    change_table = permute_tables(order, masks)
    first = anatomy.layers[0].tokens

    def reorder(module, args, kwargs):
        is_first = module is anatomy.layers[0].module

        def change(tensor):
            if tensor.shape == first.shape:
                return tensor.index_select(anatomy.sequence_axis, order) if is_first else tensor
            return change_table(tensor)

        return map_tensors(args, change), map_tensors(kwargs, change)

    hooks = [layer.module.register_forward_pre_hook(reorder, with_kwargs=True) for layer in anatomy.layers]
    try:
        return subject.logits(anatomy.module, anatomy.images)
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- what the head reads


def pooling(subject: Subject) -> Verdict:
    """The head reads class tokens, or all patches: never a part of them."""
    anatomy = subject.require_layers()
    kept = {}

    def keep(module, args, output):
        kept["tokens"] = output if isinstance(output, torch.Tensor) else output[0]
        kept["tokens"].requires_grad_(True)

    module, last = anatomy.module, anatomy.layers[-1].module
    hook = last.register_forward_hook(keep)
    try:
        logits = subject.logits(module, anatomy.images)
    finally:
        hook.remove()
    direction = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(2))
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad((logits @ direction).sum(), kept["tokens"], allow_unused=True)
    if gradient is None or not gradient.any():
        raise NotApplicable("the logits have no gradient back to the last layer's tokens")
    size = gradient.abs().amax(dim=(1 - anatomy.sequence_axis, 2))
    read = (size > 1e-6 * size.max()).nonzero().flatten().tolist()
    patches = set(anatomy.patch_tokens())
    prefix = anatomy.num_tokens - len(patches)
    read_patches = len(patches & set(read))
    return Verdict(
        read_patches in (0, len(patches)),
        f"{len(read) - read_patches} of {prefix} class or register tokens, {read_patches} of {len(patches)} patches",
        "class tokens, or all patches",
        f"the head reads token {read[0]} of {anatomy.num_tokens}, which is a patch: "
        + ("the class token is elsewhere" if prefix else "no class token was put in front"),
        "put the class token in front and read tokens[:, 0], or read tokens.mean(dim=1)",
    )
