"""What a model costs: parameters, tokens and operations, computed from its shape alone.

Operations of one forward pass of one sample are given in the three ways in which papers count them:

- `multiply_adds`: one multiplication with its addition counts 1 (what most tables call FLOPs).
- `flops`: the same counted 2, what the data sheets of accelerators and utilisation figures mean.
- `published`: multiply-adds, plus what the authors' tool adds for softmax (2 per attention logit) and for
  norms, GELU, biases and residuals (22,800 per token and layer at width 768). The authors' ViViT paper counts
  so (arXiv 2103.15691, Table 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from framework.models.inputs import InputSpec
from framework.models.pooling import AttentionPool
from framework.models.tubes import CHANNELS
from framework.models.tubevit import TubeViT

__all__ = ["Cost", "Parameters", "count_parameters", "forward_cost"]

ELEMENTWISE = 22.8e3 / 768  # per token, layer and channel


@dataclass(frozen=True)
class Cost:
    """Operations of one forward pass of one sample; see the module for the ways of counting."""

    multiply_adds: int
    flops: int
    published: int


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    `encoder` is the ViT that reads images, without its classifier: the kernel shared with images (if any),
    the blocks and the last norm. `tokenizer` holds all tube kernels, also that one.
    """

    total: int
    encoder: int
    tokenizer: int
    tubes: tuple[int, ...]
    pool: int
    heads: dict[str, int]


def count_parameters(model: TubeViT) -> Parameters:
    """Count the parameters of a model that is not partitioned (it may be on the meta device)."""
    tubes = tuple(_count(tube) for tube in model.tokenizer.tubes)
    flat = [number for number, tube in enumerate(model.tokenizer.shapes) if tube.kernel[0] == 1]
    image = tubes[flat[0]] if flat else 0
    return Parameters(
        total=_count(model),
        encoder=image + _count(model.blocks) + _count(model.norm),
        tokenizer=sum(tubes),
        tubes=tubes,
        pool=_count(model.pool),
        heads={name: _count(head) for name, head in model.heads.items()},
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forward_cost(model: TubeViT, spec: InputSpec) -> Cost:
    """Operations of one forward pass of one sample of a source."""
    size, tubes = model.size, model.tokenizer.shapes
    width = size.width
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    tokens = sum(grid.tokens for grid in grids)
    # a token's sub-tubes share its width, so Space-to-Depth leaves the work at volume x width
    embedding = sum(grid.tokens * CHANNELS * math.prod(tubes[grid.tube].kernel) * width for grid in grids)
    projections = tokens * (4 * width**2 + 2 * width * size.mlp_width)
    attention = 2 * tokens**2 * width
    pooling = 2 * tokens * size.heads * width + width**2 if isinstance(model.pool, AttentionPool) else 0
    work = embedding + size.depth * (projections + attention) + pooling + width * spec.classes
    softmax = 2 * size.depth * size.heads * tokens**2
    elementwise = ELEMENTWISE * width * tokens * size.depth
    return Cost(multiply_adds=work, flops=2 * work, published=round(work + softmax + elementwise))
