"""What a TubeViT costs: parameters, tokens and operations, computed from its shape alone.

The ways in which operations are counted stand in `framework.models.work`.
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
from framework.models.tubevit import TubeViT
from framework.models.work import Work
from framework.recipe.schema import Tube

__all__ = [
    "Parameters",
    "count_parameters",
    "forward_cost",
    "multiply_adds",
    "sequence_length",
]


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


def forward_cost(model: TubeViT, spec: InputSpec) -> Work:
    """What one forward pass of one sample of a source takes.

    Resizing a shared kernel is left out: it is done once per step, whatever the number of samples.
    """
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    return _work(model, [(model.tokenizer.shapes[grid.tube], grid.tokens) for grid in grids], spec.classes)


def multiply_adds(model: TubeViT, tubes: Sequence[tuple[Tube, int]], classes: int) -> int:
    """Multiply-adds of one sample, if the model read it with these tubes, each with its number of tokens."""
    return _work(model, tubes, classes).multiply_adds


def _work(model: TubeViT, tubes: Sequence[tuple[Tube, int]], classes: int) -> Work:
    width, work = model.size.width, Work()
    for tube, count in tubes:
        # a token's sub-tubes share its width, so Space-to-Depth leaves the work at volume x width
        work.linear(count, CHANNELS * math.prod(tube.kernel), width)
    tokens = sum(count for _, count in tubes) + (model.class_token is not None)
    work.encoder(model.size, tokens, tokens**2)
    work.multiply_adds += _pooling_multiply_adds(model, tokens)
    return work.linear(1, width, classes)


def sequence_length(model: TubeViT, spec: InputSpec) -> int:
    """Tokens of one sample of a source as the encoder sees them, a class token included."""
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    return sum(grid.tokens for grid in grids) + (model.class_token is not None)


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
