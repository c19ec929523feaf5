"""A causal network over tokens: what learns text, or pixels one after the other."""

import math
from typing import Any, NamedTuple

import torch
from timm.layers.weight_init import trunc_normal_
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import layers
from ..layers import Mixer
from ._vit import bound

__all__ = ["Decoder", "DecoderState"]

POSITIONS = ("learned", "sinusoidal", "none")


class DecoderState(NamedTuple):
    """What the layers remember, and the number of tokens so far."""

    layers: tuple[Any, ...]
    tokens: int


class Decoder(nn.Module):
    """Logits of the next token behind every prefix: x = E[token] + P[t]; pre-norm blocks; norm; linear head.

    `forward` sees whole sequences, `step` one token after the other with a state that is constant in their
    number (softmax: a cache that grows); both give the same logits.

    Args:
        num_tokens: V, how many tokens there are.
        max_tokens: T, of a sequence with learned positions or a mechanism with learned position biases.
        positions: learned (T, C), sinusoidal (Vaswani et al., 2017, section 3.5) or none.
        mechanism: a file name of sansmax.layers with a causal form.
        mechanism_args: the layer's own options.
        drop: dropout behind the embeddings and every branch.
        drop_path_rate: of the last block; it grows from 0 linearly.

    Raises:
        ValueError: the mechanism has no causal form, or a size does not fit.

    Source: the blocks of image GPT (Chen et al., 2020), on which AFT's experiments follow (arXiv 2105.14103,
    section 5.1); AFT's projections have no width per head.
    """

    def __init__(
        self,
        num_tokens: int = 256,
        max_tokens: int = 1024,
        embed_dim: int = 256,
        depth: int = 24,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        mechanism: str = "softmax",
        mechanism_args: dict[str, Any] | None = None,
        positions: str = "learned",
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        layer = layers.mechanism(mechanism)
        if not (layer.traits.causal and layer.traits.streaming):
            fit = ", ".join(name for name, one in layers.mechanisms().items() if one.traits.causal)
            raise ValueError(
                f"mechanism: expected one with a causal form ({fit}), got {mechanism}; choose another"
            )
        if positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {positions!r}")
        self.num_tokens, self.embed_dim = num_tokens, embed_dim
        # Of the longest sequence; None: any.
        self.limit = max_tokens if positions == "learned" or layer.traits.needs == "tokens" else None
        self.embed = nn.Embedding(num_tokens, embed_dim)
        self.positions = positions
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(max_tokens, embed_dim))
        self.drop = nn.Dropout(drop)
        options = layer.sequence_words(max_tokens) | (mechanism_args or {})
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=drop,
                drop_path=drop_path_rate * i / max(1, depth - 1),
                attn_layer=bound(layer, options),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_tokens)
        self.grad_checkpointing = False
        self._draw()

    def _draw(self) -> None:
        """Weights of image GPT: normal with deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.embed.weight, std=0.02)
        if self.positions == "learned":
            trunc_normal_(self.pos_embed, std=0.02)

    def mixers(self) -> list[Mixer]:
        """The mechanism's layers."""
        blocks: Any = self.blocks
        return [block.attn for block in blocks]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The paper decays linear weights alone."""
        own = {f"blocks.{i}.attn.{p}" for i, m in enumerate(self.mixers()) for p in m.no_weight_decay()}
        return {"embed.weight", "pos_embed"} | own

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) of the token behind each."""
        self._check(tokens, tokens.shape[-1])
        x = self.drop(
            self.embed(tokens) + self._position(torch.arange(tokens.shape[1], device=tokens.device))
        )
        for block in self.blocks:
            x = checkpoint(block, x, is_causal=True) if self.grad_checkpointing else block(x, is_causal=True)
        return self.head(self.norm(x))

    def init_state(self, batch_size: int = 1) -> DecoderState:
        """Before the first token."""
        return DecoderState(tuple(m.init_state(batch_size) for m in self.mixers()), 0)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One token of each sequence, (B,) int64 -> logits (B, V) of the next, and the next state."""
        self._check(tokens, state.tokens + 1)
        position = torch.tensor([state.tokens], device=tokens.device)
        logits, states = self.advance(tokens, position, state.layers)
        return logits, DecoderState(states, state.tokens + 1)

    def advance(
        self, tokens: Tensor, position: Tensor, states: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """`step` on tensors alone, for a graph: position (1,) int64 and the layers' states."""
        x = self.embed(tokens) + self._position(position)
        after, blocks = [], self.blocks
        for block, before in zip(blocks, states, strict=True):
            one: Any = block
            y, state = one.attn.step(one.norm1(x), before)
            x = x + one.ls1(y)
            x = x + one.ls2(one.mlp(one.norm2(x)))
            after.append(state)
        return self.head(self.norm(x)), tuple(after)

    def _check(self, tokens: Tensor, count: int) -> None:
        if self.limit is not None and count > self.limit:
            raise ValueError(
                f"tokens: expected at most {self.limit}, for which positions are learned, got {count}; give "
                "fewer, or train with a larger max_tokens"
            )
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected int64, got {tokens.dtype}; use tokens.long()")

    def _position(self, at: Tensor) -> Tensor | float:
        """(n, C) of the positions `at` (n,)."""
        if self.positions == "none":
            return 0.0
        if self.positions == "learned":
            return self.pos_embed[at]
        half = self.embed_dim // 2
        rates = torch.exp(torch.arange(half, device=at.device) * (-math.log(10_000.0) / half))
        angles = at[:, None] * rates
        wave = torch.cat((angles.sin(), angles.cos()), 1)
        return nn.functional.pad(wave, (0, self.embed_dim - 2 * half)).to(self.embed.weight.dtype)
