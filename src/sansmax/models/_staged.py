"""timm's interface of networks in stages, whose last stage has a class token."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from timm.layers.weight_init import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..layers import Mixer
from ..layers._contract import Grid

__all__ = ["Stage", "Staged"]


class Staged(nn.Module):
    """Stages with blocks, a final norm and a head: all that timm asks of a network but its construction.

    A stage maps (B, C, height, width) and, if its `prefix` is 1, a class token to tokens (B, prefix + rows *
    columns, C') and their grid.
    """

    stages: nn.ModuleList
    cls_token: nn.Parameter
    norm: nn.Module
    head: nn.Module
    head_drop: nn.Module
    num_classes: int
    num_features: int
    global_pool: str

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def mixers(self) -> dict[str, Mixer]:
        """The mechanism's layers by module name, and softmax in the last stage."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Mixer)}

    def no_weight_decay(self) -> set[str]:
        """The class token and the layers' tables; SOFT's recipe decays its positions."""
        own = {f"{name}.{p}" for name, layer in self.mixers().items() for p in layer.no_weight_decay()}
        return {"cls_token"} | own

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by depth, for layer-wise learning rates."""
        stem = r"^cls_token|^stages\.0\.(?:embed|pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^stages\.(\d+)"}
        return {
            "stem": stem,
            "blocks": [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.(?:embed|pos_embed)", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the activations of the blocks again in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def set_pool(self, global_pool: str) -> None:
        if global_pool not in ("token", "avg", ""):
            raise ValueError(
                f"{type(self).__name__}: global_pool must be 'token', 'avg' or '' (none), got "
                f"{global_pool!r}; use 'token'"
            )
        self.global_pool = global_pool

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none); global_pool "token", "avg" or ""."""
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        like = self.cls_token
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The patch tokens behind the stages `indices`; see timm.models.

        Args:
            x: (B, in_chans, height, width).
            indices: stages; an int takes the last ones, None all.
            norm: the final norm on the last stage's tokens.
            stop_early: leaves stages out that no index asks for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leaves out the tokens of the last stage that ran, which are otherwise the
                first of two results; the final norm is on them if it was the network's last.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}; use NCHW"
            )
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        maps, tokens = [], x
        stages: Any = self.stages[: deepest + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            tokens, x = self._stage(stage, x)
            if i in wanted:
                y = (self._final(tokens, stage) if norm else tokens)[:, stage.prefix :]
                maps.append(y.mT.unflatten(-1, x.shape[2:]) if output_fmt == "NCHW" else y)
        return maps if intermediates_only else (self._final(tokens, stages[-1]), maps)

    def _final(self, tokens: Tensor, stage: Any) -> Tensor:
        return self.norm(tokens) if stage.prefix else tokens

    def _stage(self, stage: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with the class token, and the image of the others."""
        # A view would require gradients even under no_grad, and torch.utils.flop_counter then fails.
        tokens, grid = stage(x, self.cls_token.repeat(x.shape[0], 1, 1) if stage.prefix else None)
        return tokens, tokens[:, stage.prefix :].mT.unflatten(-1, grid)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out what stands behind the deepest stage that is asked for."""
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: deepest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width) -> (B, 1 + tokens, C), the class token first."""
        return self.forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x[:, 1:].mean(1) if self.global_pool == "avg" else x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """Convolutions, then blocks.

    (B, C, height, width) -> tokens (B, prefix + rows * columns, C') and their grid.
    """

    def __init__(self, embed: nn.Sequential, blocks: Iterable[nn.Module], prefix: int) -> None:
        super().__init__()
        self.embed, self.prefix = embed, prefix
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).mT
        if class_token is not None:
            x = torch.cat([class_token, x], 1)
        x = self.placed(x, grid)
        for block in self.blocks:
            x = _checkpointed(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x, grid

    def placed(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens with their positions, where a stage has any."""
        return x


def _checkpointed(block: nn.Module, x: Tensor, grid: Grid) -> Any:
    """block(x, grid), made again in the backward pass, where a batch must not enter the running statistics a
    second time: it would weigh 0.19 in them instead of BatchNorm's 0.1."""
    # A compiled network counts it once by itself, and takes no such contexts.
    words: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_contexts, block)}
    return checkpoint(block, x, grid, use_reentrant=False, **words)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _kept_statistics(block)


@contextlib.contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
