"""What all models share: several sources in one forward pass, their classifiers, and stochastic depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.errors import ModelError
from framework.models.heads import build_head
from framework.models.inputs import InputSpec
from framework.models.layers import Block
from framework.models.tubes import CHANNELS
from framework.recipe.schema import Gelu

__all__ = ["JointModel", "Size", "encoder_blocks"]


@dataclass(frozen=True)
class Size:
    """The numbers of a transformer encoder."""

    width: int
    depth: int
    heads: int
    mlp_width: int


def encoder_blocks(size: Size, *, dropout: float = 0.0, gelu: Gelu = "exact") -> nn.ModuleList:
    """The plain blocks of an encoder, with random weights."""
    return nn.ModuleList(
        Block(size.width, size.heads, size.mlp_width, dropout, gelu) for _ in range(size.depth)
    )


class JointModel(nn.Module):
    """A model that reads clips of several sources, and has a classifier for each.

    Set `activation_checkpointing` to compute blocks a second time in the backward pass, instead of keeping
    what is inside them.
    """

    returns_losses = False
    """Whether the forward pass gives a loss for each sample, (batch,), instead of logits."""
    positions: tuple[str, ...] = ()
    """What the names of learned positions and single queries contain."""

    def __init__(self, size: Size, inputs: Mapping[str, InputSpec], *, stochastic_depth: float = 0.0) -> None:
        """Build what is common; `add_heads` comes last, so that the order of parameters is that of use."""
        super().__init__()
        self.size = size
        self.inputs = dict(inputs)
        self.stochastic_depth = stochastic_depth
        self.activation_checkpointing = False

    def add_heads(self, width: int) -> None:
        """Add the classifier of every source."""
        self.heads = nn.ModuleDict({name: build_head(width, spec) for name, spec in self.inputs.items()})

    def classify(self, pooled: Tensor, samples: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Logits of each source from one vector per sample, (total_samples, width)."""
        parts = pooled.split(list(samples))
        return {name: self.heads[name](part) for name, part in zip(names, parts, strict=True)}

    def telemetry(self) -> dict[str, float]:
        """What a logging point shows of the model besides its losses."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: vectors, positions, single queries."""
        names = set()
        for name, parameter in self.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens what it partitions
            if len(shape) <= 1 or any(part in name for part in self.positions):
                names.add(name)
        return names

    def _sources(self, pixels: Mapping[str, Tensor]) -> list[str]:
        """The sources of this micro-batch in the model's own order, the same on every rank."""
        unknown = [name for name in pixels if name not in self.inputs]
        if unknown or not pixels:
            wrong = f"unknown source {', '.join(unknown)}" if unknown else "no source at all"
            raise ModelError(f"{wrong} in the input; this model was built for {', '.join(self.inputs)}")
        return [name for name in self.inputs if name in pixels]

    def _check_shape(self, name: str, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != CHANNELS:
            raise ModelError(
                f"source {name}: pixels must be (batch, {CHANNELS}, frames, height, width), "
                f"not {tuple(pixels.shape)}"
            )

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        """One block, computed twice where activations are not kept."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # The noise is an argument and nothing draws from a generator: there is no state to preserve.
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def _run_all(
        self,
        blocks: Iterable[nn.Module],
        tokens: Tensor,
        groups: Sequence[tuple[int, ...]],
        depths: Iterable[Tensor | None],
    ) -> Tensor:
        """Block after block, each with its part of `noise.depth_scales`."""
        for block, depth in zip(blocks, depths, strict=True):
            tokens = self._run(block, tokens, groups, depth)
        return tokens
