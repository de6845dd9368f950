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
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from framework.models.inputs import InputSpec
from framework.models.kernels import ResizedProjection
from framework.models.pooling import AttentionPool, MapPool, ScalarPool
from framework.models.tubes import CHANNELS
from framework.models.tubevit import Size, TubeViT
from framework.recipe.schema import Tube

__all__ = [
    "Cost",
    "Parameters",
    "count_parameters",
    "encoder_multiply_adds",
    "forward_cost",
    "multiply_adds",
    "sequence_length",
]

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
    the blocks and the last norm. `tokenizer` holds all kernels, also that one, but no learned positions;
    `tubes` what each tube has of its own, which is the bias alone where it uses the `shared_kernel`.
    """

    total: int
    encoder: int
    tokenizer: int
    tubes: tuple[int, ...]
    shared_kernel: int
    positions: int
    class_token: int
    pool: int
    heads: dict[str, int]


def count_parameters(model: TubeViT) -> Parameters:
    """Count the parameters of a model that is not partitioned (it may be on the meta device)."""
    tokenizer = model.tokenizer
    tubes = tuple(_count(tube) for tube in tokenizer.tubes)
    shared = _count(tokenizer.kernel)
    flat = [number for number, tube in enumerate(tokenizer.shapes) if tube.kernel[0] == 1]
    image = tubes[flat[0]] if flat else 0
    if flat and isinstance(tokenizer.tubes[flat[0]], ResizedProjection):
        image += shared
    return Parameters(
        total=_count(model),
        encoder=image + _count(model.blocks) + _count(model.norm),
        tokenizer=sum(tubes) + shared,
        tubes=tubes,
        shared_kernel=shared,
        positions=_count(tokenizer.positions),
        class_token=_count(model.class_token),
        pool=_count(model.pool),
        heads={name: _count(head) for name, head in model.heads.items()},
    )


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def forward_cost(model: TubeViT, spec: InputSpec) -> Cost:
    """Operations of one forward pass of one sample of a source.

    Resizing a shared kernel is left out: it is done once per step, whatever the number of samples.
    """
    size, tokens = model.size, sequence_length(model, spec)
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    parts = [(model.tokenizer.shapes[grid.tube], grid.tokens) for grid in grids]
    work = multiply_adds(model, parts, spec.classes)
    softmax = 2 * size.depth * size.heads * tokens**2
    elementwise = ELEMENTWISE * size.width * tokens * size.depth
    return Cost(multiply_adds=work, flops=2 * work, published=round(work + softmax + elementwise))


def multiply_adds(model: TubeViT, tubes: Sequence[tuple[Tube, int]], classes: int) -> int:
    """Multiply-adds of one sample, if the model read it with these tubes, each with its number of tokens."""
    width = model.size.width
    tokens = sum(count for _, count in tubes) + (model.class_token is not None)
    # a token's sub-tubes share its width, so Space-to-Depth leaves the work at volume x width
    embedding = sum(count * CHANNELS * math.prod(tube.kernel) * width for tube, count in tubes)
    encoder = encoder_multiply_adds(model.size, tokens)
    return embedding + encoder + _pooling_multiply_adds(model, tokens) + width * classes


def sequence_length(model: TubeViT, spec: InputSpec) -> int:
    """Tokens of one sample of a source as the encoder sees them, a class token included."""
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    return sum(grid.tokens for grid in grids) + (model.class_token is not None)


def encoder_multiply_adds(size: Size, tokens: int) -> int:
    """Multiply-adds of all blocks for one sample of so many tokens."""
    projections = tokens * (4 * size.width**2 + 2 * size.width * size.mlp_width)
    return size.depth * (projections + 2 * tokens**2 * size.width)


def _pooling_multiply_adds(model: TubeViT, tokens: int) -> int:
    width = model.size.width
    if isinstance(model.pool, AttentionPool):
        return 2 * tokens * model.size.heads * width + width**2
    if isinstance(model.pool, ScalarPool):
        return 2 * tokens * width
    if isinstance(model.pool, MapPool):
        mlp = 2 * width * model.size.mlp_width
        # the query is projected once for all samples; it is counted for each, like everything else
        return 2 * tokens * width**2 + 2 * tokens * width + 2 * width**2 + mlp
    return 0
