"""What a trained network no longer needs is folded into the weights beside it."""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers.layer_scale import LayerScale, LayerScale2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

__all__ = ["optimize_for_inference"]

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
# Of the largest output; what folding changed in the registered networks with random statistics was at most
# 2e-6 in float32.
BUDGET = {torch.float64: 1e-9, torch.float32: 1e-4}


def optimize_for_inference(
    model: nn.Module,
    *,
    example: Tensor | None = None,
    channels_last: bool = True,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> nn.Module:
    """A copy of `model` for evaluation alone, with the same outputs and less to do.

    BatchNorm goes into the convolution or linear layer whose output it takes, LayerScale (gamma, and beta
    where there is one) into the layer that ends its branch. Which follows which is seen as `example` passes,
    and the output for `example` is compared before and after.

    Args:
        model: any nn.Module; `model` itself stays as it is.
        example: an input; None: one random image of the size that timm's default_cfg names.
        channels_last: the memory format of convolutions.
        dtype: torch.bfloat16 or torch.float16 for the weights; inputs are cast.
        compile: torch.compile as well, at the first call.

    Raises:
        ValueError: there is no `example` to go by, or the network's outputs changed.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    weight = next(model.parameters())
    if example is None:
        config = getattr(model, "default_cfg", None)
        if not config:
            raise ValueError(
                f"optimize_for_inference: {type(model).__name__} has no default_cfg that gives an input "
                "size, got example=None; pass an input as example"
            )
        example = torch.rand(1, *config["input_size"])
    example = example.to(weight.device, weight.dtype)
    with torch.no_grad():
        before = _first(model(example))
        _fold(model, example)
        after = _first(model(example))
    budget = BUDGET.get(weight.dtype, 0.05)
    error = (after.double() - before.double()).abs().max() / before.double().abs().max().clamp(min=1e-30)
    if not error <= budget:
        raise ValueError(
            f"optimize_for_inference: the outputs of {type(model).__name__} must stay within {budget:g} of "
            f"the largest, got {error:.1e}; use the network as it is, and report its name"
        )
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if dtype is not None:
        model.to(dtype)
        model.register_forward_pre_hook(lambda _, inputs: tuple(_cast(x, dtype) for x in inputs))
    if compile:
        model.compile()
    return model


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first(next(iter(output)))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _fold(model: nn.Module, example: Tensor) -> None:
    for block in model.modules():
        if fold_scales := getattr(block, "fold_scales", None):
            fold_scales()
    names = {module: name for name, module in model.named_modules()}
    for taker, maker in _pairs(model, example):
        if isinstance(taker, _BatchNorm):
            fuse = fuse_linear_bn_eval if isinstance(maker, nn.Linear) else fuse_conv_bn_eval
            fused: nn.Module = fuse(maker, taker)  # pyright: ignore[reportArgumentType]
            model.set_submodule(names[maker], fused)
        else:
            scale_outputs(maker, taker.gamma)  # pyright: ignore[reportArgumentType]
        # timm's BatchNormAct2d holds the activation.
        model.set_submodule(names[taker], getattr(taker, "act", None) or nn.Identity())


def scale_outputs(layer: nn.Module, gamma: Tensor, beta: Tensor | None = None) -> None:
    """gamma layer(x) + beta as the layer's own weights, channel by channel."""
    weight, bias = layer.get_parameter("weight"), layer.bias
    weight.data = weight.data * gamma.view(-1, *[1] * (weight.ndim - 1))
    if isinstance(bias, Tensor):
        bias.data = bias.data * gamma if beta is None else bias.data * gamma + beta
    elif beta is not None:
        layer.bias = nn.Parameter(beta.clone(), requires_grad=False)


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """(norm or scale, the layer whose output it takes), where nothing else takes that output."""
    layers = *CONVOLUTIONS, nn.Linear
    folded = _BatchNorm, LayerScale, LayerScale2d
    made: dict[int, nn.Module] = {}
    held: list[Any] = []  # no other tensor gets the id of one that is held
    takers: dict[int, list[nn.Module]] = {}
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        held.append((inputs, output))
        for x in inputs:
            if isinstance(x, Tensor):
                takers.setdefault(id(x), []).append(module)
        if type(module) in layers:
            made[id(output)] = module

    leaves = [
        module for module in model.modules() if not list(module.children()) or isinstance(module, folded)
    ]
    passing = nn.Identity, nn.Dropout
    hooks = [leaf.register_forward_hook(note) for leaf in leaves if not isinstance(leaf, passing)]
    model(example)
    for hook in hooks:
        hook.remove()
    found = []
    for at, maker in made.items():
        match takers.get(at, []):
            case [taker] if isinstance(taker, folded) and calls[maker] == calls[taker] == 1:
                found.append((taker, maker))
    return found
