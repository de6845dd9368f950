"""MTV: several encoders that read tubelets of different lengths, and look at each other (arXiv 2201.04288).

A view is the tubelets of one length with an encoder of its own; views with short tubelets have most tokens.
All views are cut at the times of the longest tubelets, and attention stays inside such a piece. At the fusion
layers the tokens of a view also attend to those of the next longer one. In the end the class tokens of one
time are put side by side, those of longer tubelets repeated, and a global encoder attends over time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.inputs import InputSpec
from framework.models.joint import JointModel, Size, encoder_blocks
from framework.models.layers import Groups, LayerNorm, Linear, add, join, rows
from framework.models.pooling import FirstToken
from framework.models.video_blocks import ZeroLinear
from framework.models.video_model import Places, Reading, Times, VideoModel, place_frames
from framework.models.work import Work
from framework.recipe.schema import Gelu, Tube

__all__ = ["MTV"]

BRANCHES = 3  # attention to the next view, attention, MLP


class View(VideoModel):
    """The tubelets of one length with their places, class tokens and blocks."""

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        span: int,
        *,
        gelu: Gelu,
        stochastic_depth: float,
    ) -> None:
        self.span = span
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        times, height, width = self.largest
        self.places = Places((1, height, width), size.width, class_token=True)
        self.times = Times(times, size.width)
        self.blocks = encoder_blocks(size, gelu=gelu)

    def _frames(self, frames: int) -> int:
        """An image fills the longest tubelet of all views."""
        return self.span if frames == 1 else frames

    def place(self, reading: Reading) -> list[Tensor]:
        """The tokens with places, and a class token for each time: (samples, times, places + 1, width)."""
        framed = place_frames(self.places, reading)
        return [torch.cat((self.times(part[:, :, :1]), part[:, :, 1:]), dim=2) for part in framed]

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source, with the class token of each time."""
        time, height, width = self.shape_of(spec)
        return time * (height * width + 1)

    def work(self, spec: InputSpec, pieces: int = 1) -> Work:
        """What one forward pass of one sample takes that is cut into so many pieces, each by itself."""
        tokens = self.sequence_length(spec)
        return self.embedding_work(spec).encoder(self.size, tokens, tokens**2 / pieces)


class CrossViewAttention(nn.Module):
    """Attention of a view's tokens to those of the next view; its last layer starts at zero."""

    def __init__(self, width: int, heads: int, other_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key = Linear(other_width, width)
        self.value = Linear(other_width, width)
        self.proj = ZeroLinear(width, width)

    def forward(self, tokens: Tensor, others: Tensor, groups: Groups, other_groups: Groups) -> Tensor:
        """Attend; tokens (total_tokens, width), others (their total_tokens, their width) to tokens' shape."""
        query, key, value = self.query(tokens), self.key(others), self.value(others)
        lengths, other_lengths = rows(groups), rows(other_groups)
        attended = []
        for part, group, of_key, of_value, other in zip(
            query.split(lengths), groups, key.split(other_lengths), value.split(other_lengths), other_groups,
            strict=True,
        ):  # fmt: skip
            queries, keys, values = (
                matrix.view(*shape, self.heads, -1).transpose(1, 2)
                for matrix, shape in ((part, group), (of_key, other), (of_value, other))
            )
            attended.append(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))
        return self.proj(join([part.flatten(0, 1) for part in attended]))


class Fusion(nn.Module):
    """Cross-view attention of one layer: each view to the next, from the longest tubelets on."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(size.width) for size in sizes)
        self.attentions = nn.ModuleList(
            CrossViewAttention(size.width, size.heads, other.width) for size, other in pairwise(sizes)
        )

    def forward(
        self, tokens: list[Tensor], groups: Sequence[Groups], depths: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The tokens of all views, each (total_tokens, width), after they have looked at each other."""
        normed = [norm(part) for norm, part in zip(self.norms, tokens, strict=True)]
        fused = list(tokens)
        for number, attention in enumerate(self.attentions):
            branch = attention(normed[number], normed[number + 1], groups[number], groups[number + 1])
            depth = depths[number]
            fused[number] = add(tokens[number], branch, None if depth is None else depth[0])
        return fused


class MTV(JointModel):
    """The views, their fusion, and the global encoder."""

    positions = ("places.", "times.")

    def __init__(
        self,
        sizes: Sequence[Size],
        tubes: Sequence[Tube],
        inputs: Mapping[str, InputSpec],
        *,
        fusion_layers: Sequence[int],
        global_size: Size,
        gelu: Gelu = "tanh",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights.

        Args:
            sizes: the encoder of each view.
            tubes: their tubelets, from the shortest to the longest.
            inputs: what each source will feed.
            fusion_layers: layers with cross-view attention.
            global_size: the global encoder, as wide as all views together.
            gelu: of all MLPs.
            stochastic_depth: share of branches that are dropped at the last layer; linearly fewer before.

        Errors:
            ModelError: a source that is smaller than a tubelet, or whose times do not divide.
        """
        super().__init__(sizes[0], inputs, stochastic_depth=stochastic_depth)
        span = max(tube.kernel[0] for tube in tubes)
        self.views = nn.ModuleList(
            View(size, tube, inputs, span, gelu=gelu, stochastic_depth=stochastic_depth)
            for size, tube in zip(sizes, tubes, strict=True)
        )
        self.sizes = tuple(sizes)
        depth = max(size.depth for size in sizes)
        self.fusions = nn.ModuleDict({str(n): Fusion(sizes) for n in sorted(fusion_layers) if n < depth})
        self.global_size = global_size
        times = max(self._times(spec, name)[0] for name, spec in inputs.items())
        self.global_places = Places((times, 1, 1), global_size.width, class_token=True)
        self.global_blocks = encoder_blocks(global_size, gelu=gelu)
        self.global_norm = LayerNorm(global_size.width)
        self.pool = FirstToken()
        self.add_heads(global_size.width)

    @property
    def readers(self) -> list[View]:
        """The views, from the shortest tubelets to the longest."""
        return [cast(View, view) for view in self.views]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all encoders."""
        return [*(block for view in self.readers for block in view.blocks), *self.global_blocks]

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits of all samples of a micro-batch; see `VideoModel.read` for the arguments.

        Returns:
            Per source float32 (batch, classes).

        Errors:
            ModelError: an unknown source, a wrong shape, or a clip that is larger than the learned places.
        """
        readings = [view.read(pixels, seeds) for view in self.readers]
        names, samples = readings[0].names, readings[0].samples
        pieces = [min(reading.shapes[number][0] for reading in readings) for number in range(len(names))]
        placed = [view.place(reading) for view, reading in zip(self.readers, readings, strict=True)]
        groups = [
            tuple(
                (part.shape[0] * piece, part.shape[1] * part.shape[2] // piece)
                for part, piece in zip(parts, pieces, strict=True)
            )
            for parts in placed
        ]
        tokens = [join([part.flatten(0, 2) for part in parts]) for parts in placed]
        tokens = self._encode(readings, tokens, groups)
        framed = [
            [
                part.view(like.shape)[:, :, 0]  # the class tokens: (samples, times, width)
                for part, like in zip(matrix.split(rows(group)), parts, strict=True)
            ]
            for matrix, group, parts in zip(tokens, groups, placed, strict=True)
        ]
        return self.classify(self._over_time(readings[0], framed), samples, names)

    def _encode(
        self, readings: Sequence[Reading], tokens: list[Tensor], groups: Sequence[Groups]
    ) -> list[Tensor]:
        """Run the blocks of all views, layer by layer."""
        drops, first = [], 0
        for view, reading, group in zip(self.readers, readings, groups, strict=True):
            samples = reading.whole(group)
            drops.append(view.drop(reading, samples, len(view.blocks), branches=BRANCHES, first=first))
            first += BRANCHES * len(view.blocks)
        for layer in range(max(size.depth for size in self.sizes)):
            depths = [drop[min(layer, len(drop) - 1)] for drop in drops]
            if str(layer) in self.fusions:
                tokens = self._run(self.fusions[str(layer)], tokens, groups, depths)
            for number, view in enumerate(self.readers):
                if layer < len(view.blocks):
                    depth = depths[number]
                    depth = None if depth is None else depth[1:]
                    tokens[number] = self._run(view.blocks[layer], tokens[number], groups[number], depth)
        return tokens

    def _over_time(self, reading: Reading, framed: Sequence[Sequence[Tensor]]) -> Tensor:
        """The global encoder: class tokens (samples, times, width) of each view to (total_samples, width)."""
        parts = []
        for views in zip(*framed, strict=True):
            times = max(view.shape[1] for view in views)
            repeated = [view.repeat_interleave(times // view.shape[1], dim=1) for view in views]
            parts.append(torch.cat(repeated, dim=2))
        tokens, groups = self.global_places(parts, [(part.shape[1], 1, 1) for part in parts])
        first = BRANCHES * sum(size.depth for size in self.sizes)
        depths = self.readers[0].drop(reading, groups, len(self.global_blocks), first=first)
        tokens = self._run_all(self.global_blocks, tokens, groups, depths)
        return self.pool(self.global_norm(tokens), groups)

    def _times(self, spec: InputSpec, name: str) -> tuple[int, int]:
        """The times of the shortest and of the longest tubelets."""
        times = [view.shape_of(spec, name)[0] for view in self.readers]
        if any(count % min(times) for count in times):
            raise ModelError(
                f"source {name}: {spec.frames} frames make {', '.join(map(str, times))} tubelets in time for "
                "the views, and each number must be a multiple of the smallest; take a multiple of "
                f"{max(view.tube.kernel[0] for view in self.readers)} frames"
            )
        return max(times), min(times)

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source in all views, with the class token of each time."""
        return sum(view.sequence_length(spec) for view in self.readers)

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        times, pieces = self._times(spec, "")
        work = Work()
        for view in self.readers:
            work = work + view.work(spec, pieces)
        for _ in self.fusions:
            for view, other in pairwise(self.readers):
                size, tokens, others = view.size, view.sequence_length(spec), other.sequence_length(spec)
                work.attention(size.width, size.heads, tokens, tokens * others / pieces)
                # keys and values are made of the other view's tokens
                work.linear(others, other.size.width, 2 * size.width)
                work.linear(-tokens, size.width, 2 * size.width)
        work.encoder(self.global_size, times + 1, (times + 1) ** 2)
        return work.linear(1, self.global_size.width, spec.classes)
