"""A large video model from a small one and a large image model (TubeViT §3.6).

The tubes come from a small TubeViT, the 2D patches and the encoder from a large model of images. The first
blocks are frozen with everything before them; the tokens that entered the encoder come in once more through a
gate on the output of the block after them:

    z_s = MLP(LN(y_s)) + y_s + tanh(alpha) z_0        (equation 8), alpha = 0 at the start

Widths are bridged without new weights. A tube of the small model makes tokens of c channels; the large one
needs D. Each token becomes ceil(D / c) *sub-tokens*: the same kernels at places moved by some frames or
pixels, concatenated and cut off at D channels (192 to 768: four, exactly; 768 to 1024 or 1280: two, of which
the second loses its last channels). It is Space-to-Depth (§3.4) once more, outside of the tube's own, with as
many tokens as before; the first c channels are the token that the small model would have made. How the paper
bridges 768 to 1280 is not known.

Sub-tokens are spread evenly over the tube's (sub-)stride, on a box of f_t x f_h x f_w places. Where a place
of the last token lies beyond the clip, the clip's last frame, row or column is repeated. Of all boxes, the
most compact one is taken; then the one that reaches least beyond the clips, measured in kernels; then one
that is square in space, then the one that is longer in time: Table 7c has two in time before two in space,
and four in space before four in time. With the tubes of the paper and clips of 224 pixels, two sub-tokens
reach beyond the clip by one frame of sixteen where it has 64 frames, and by three where it has 32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import RecipeError
from framework.models.inputs import InputSpec
from framework.models.kernels import TubeProjection
from framework.models.noise import dropout
from framework.models.positions import FixedPositions
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import check_tubes, cut, grids_of, sub_stride
from framework.models.tubevit import Size, TubeViT
from framework.recipe.schema import Position, ScaleUp, Tube

__all__ = ["Bridge", "BridgedTokenizer", "Gate", "ScaledTubeViT", "find_bridge", "image_tube"]

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Bridge:
    """Where the sub-tokens of a token lie: a box of `counts` places, `shifts` frames and pixels apart."""

    counts: Triple
    shifts: Triple

    def places(self) -> Iterator[Triple]:
        """What is added to the tube's offset for each sub-token; time first, then height, then width."""
        for time, height, width in itertools.product(*map(range, self.counts)):
            yield time * self.shifts[0], height * self.shifts[1], width * self.shifts[2]

    def beyond(self, room: Triple) -> Triple:
        """How far the last place reaches beyond clips with so much room behind the last token."""
        time, height, width = (
            max(0, (count - 1) * shift - free)
            for count, shift, free in zip(self.counts, self.shifts, room, strict=True)
        )
        return time, height, width

    def union(self, tube: Tube) -> Tube:
        """A tube whose tokens have their centres where those of all sub-tokens together have it."""
        kernel = [
            length + (count - 1) * shift
            for length, count, shift in zip(tube.kernel, self.counts, self.shifts, strict=True)
        ]
        return tube.model_copy(update={"kernel": tuple(kernel)})


def image_tube(tubes: Sequence[Tube]) -> int | None:
    """The index of the tube that reads images, or None."""
    return next((number for number, tube in enumerate(tubes) if tube.kernel[0] == 1), None)


def find_bridge(tubes: Sequence[Tube], number: int, parts: int, clips: Sequence[Triple]) -> Bridge:
    """The places of `parts` sub-tokens of a tube which reads these clips (see the module)."""
    tube = tubes[number]
    room = [
        _room(tube, grid.shape, clip)
        for clip in clips
        for grid in grids_of(tubes, clip)
        if grid.tube == number
    ]
    found = []
    for counts in itertools.product(range(1, parts + 1), repeat=3):
        if math.prod(counts) == parts:
            time, height, width = (
                max(1, step // count) for count, step in zip(counts, sub_stride(tube), strict=True)
            )
            bridge = Bridge((counts[0], counts[1], counts[2]), (time, height, width))
            beyond = [
                over / length
                for free in room
                for over, length in zip(bridge.beyond(free), tube.kernel, strict=True)
            ]
            rank = (max(counts), max(beyond, default=0.0), counts[1] != counts[2], -counts[0])
            found.append((rank, bridge))
    return min(found, key=lambda pair: pair[0])[1]


def _room(tube: Tube, grid: Triple, clip: Triple) -> Triple:
    """Frames and pixels of a clip that lie behind the last token of a tube."""
    room = []
    for axis, inner in enumerate(sub_stride(tube)):
        start = tube.offset[axis] + (grid[axis] - 1) * tube.stride[axis]
        room.append(clip[axis] - start - (tube.space_to_depth[axis] - 1) * inner - tube.kernel[axis])
    return room[0], room[1], room[2]


def _extend(clip: Tensor, beyond: Triple) -> Tensor:
    """Repeat the last frames, rows and columns of (batch, 3, frames, height, width) so many times."""
    for axis, count in enumerate(beyond, start=2):
        if count:
            last = clip.narrow(axis, clip.shape[axis] - 1, 1)
            clip = torch.cat([clip, last.expand(*(count if n == axis else -1 for n in range(5)))], dim=axis)
    return clip


class BridgedTokenizer(TubeTokenizer):
    """A tokenizer whose tubes, all but the one for images, have the kernels of a narrower model."""

    def __init__(
        self,
        tubes: Sequence[Tube],
        width: int,
        *,
        tube_width: int,
        clips: Sequence[Triple],
        position: Position = "fixed",
    ) -> None:
        """Build with random weights.

        Args:
            tubes: their shapes, those of the narrower model.
            width: channels of a token.
            tube_width: channels of a token of the narrower model.
            clips: (frames, height, width) of what will be read.
            position: what tells tokens where they come from; nothing that is learned.

        Errors:
            ModelError: a tube does not fit a width, or does not fit a clip.
        """
        super().__init__(tubes, width, clips=clips, position=position)
        check_tubes(tubes, tube_width)
        self.tube_width = tube_width
        parts = math.ceil(width / tube_width)
        self.bridges: dict[int, Bridge] = {}
        unions = list(self.shapes)
        for number, tube in enumerate(self.shapes):
            if number == image_tube(tubes):
                continue
            self.bridges[number] = find_bridge(tubes, number, parts, clips)
            self.tubes[number] = TubeProjection(tube, tube_width)
            unions[number] = self.bridges[number].union(tube)
        if self.positions is not None:
            self.positions = FixedPositions(unions, width, position)

    def read_tube(self, number: int, clips: Sequence[Tensor], shapes: Sequence[Triple]) -> list[Tensor]:
        """As of every tokenizer; sub-tokens are read one by one and concatenated."""
        bridge = self.bridges.get(number)
        if bridge is None:
            return super().read_tube(number, clips, shapes)
        tube, places = self.shapes[number], list(bridge.places())
        boxes = []
        for clip, shape in zip(clips, shapes, strict=True):
            size = (clip.shape[2], clip.shape[3], clip.shape[4])
            longer = _extend(clip, bridge.beyond(_room(tube, shape, size)))
            for time, height, width in places:
                moved = longer[
                    :, :, time : time + size[0], height : height + size[1], width : width + size[2]
                ]
                boxes.append(cut(moved, tube, shape))
        projected = iter(self._project(number, boxes).split([len(box) for box in boxes]))
        tokens = []
        for clip in clips:
            parts = [next(projected).reshape(len(clip), -1, self.tube_width) for _ in places]
            tokens.append(torch.cat(parts, dim=-1)[..., : self.width])
        return tokens


class Gate(nn.Module):
    """z + tanh(alpha) z_0, with `alpha` learned, one for all channels or one each, and 0 at the start.

    At 0 the output is z itself, and the gradient of alpha is the product of z_0 and the gradient of z.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width if kind == "channel" else 1))
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, tokens: Tensor, first: Tensor) -> Tensor:
        """Let the first tokens in; both (total_tokens, width)."""
        opened = self.alpha.tanh()
        added = opened * first
        result = tokens + added
        if self.training:  # kept on the device, and read at logging points only
            with torch.no_grad():
                share = _norm(added) / _norm(result)
            self._seen = opened.detach().float().mean(), share
        return result

    def telemetry(self) -> dict[str, float]:
        """Of the last pass on this rank: the mean of tanh(alpha), and |tanh(alpha) z_0| / |z_s|."""
        if self._seen is None:
            return {}
        opened, share = self._seen
        return {"gate/tanh_alpha": float(opened), "gate/ratio": float(share)}


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.detach(), dtype=torch.float32)


class ScaledTubeViT(TubeViT):
    """A TubeViT with the tubes of a narrower one, a frozen beginning, and a gate after it.

    What is frozen runs without autograd and without noise, and has `requires_grad` off: optimizer, ZeRO and
    checkpoints hold nothing of it but its weights.
    """

    def __init__(
        self,
        size: Size,
        tubes: Sequence[Tube],
        inputs: Mapping[str, InputSpec],
        scale_up: ScaleUp,
        *,
        position: Position = "fixed",
        **options: Any,
    ) -> None:
        """Build with random weights.

        Args:
            size: the numbers of the encoder.
            tubes: shapes of the tubes.
            inputs: what each source will feed.
            scale_up: width of the tubes, what is frozen, and the gate.
            position: what tells tokens where they come from; nothing that is learned.
            options: pool, dropout and stochastic_depth, as of `TubeViT`.

        Errors:
            RecipeError: widths or layers that do not go together.
            ModelError: a tube does not fit a width or a source; the message names it.
        """
        _check(size, scale_up, position)
        super().__init__(size, tubes, inputs, position=position, **options)
        clips = [(spec.frames, spec.size, spec.size) for spec in inputs.values()]
        self.tokenizer = BridgedTokenizer(
            tubes, size.width, tube_width=scale_up.tube_width, clips=clips, position=position
        )
        self.scale_up = scale_up
        self.gate = Gate(size.width, scale_up.gate) if scale_up.gate != "none" else None
        self._freeze()

    def _freeze(self) -> None:
        if self.scale_up.train_tokenizer:
            return
        for part in (self.tokenizer, self.class_token, *self.blocks[: self.scale_up.frozen_layers]):
            if part is not None:
                part.requires_grad_(False)

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits of all samples of a micro-batch, as of every TubeViT."""
        names = self._sources(pixels)
        groups = tuple(self._group(name, pixels[name]) for name in names)
        clips = [pixels[name] for name in names]
        frozen, whole = self.scale_up.frozen_layers, self.scale_up.train_tokenizer
        with torch.set_grad_enabled(whole and torch.is_grad_enabled()):
            raw = self.tokenizer.tokens(clips)
            tokens = self.tokenizer.place(raw, clips)
            first = tokens if self._gate_sees_positions() else torch.cat([part.flatten(0, 1) for part in raw])
            if self.class_token is not None:
                placed = first is tokens
                tokens, longer = self.class_token(tokens, groups)
                first = tokens if placed else self.class_token(first, groups)[0]
                groups = longer
            noise = self._noise(tokens, groups, names, seeds)
            if whole and noise.embedding is not None:
                tokens = dropout(tokens, noise.embedding, self.dropout)
            for block in self.blocks[:frozen]:
                tokens = block(tokens, groups)
        layers = range(frozen, len(self.blocks))
        if self.gate is not None:
            tokens = self.gate(self._encode(tokens, groups, noise, layers[:1]), first)
            layers = layers[1:]
        return self._classify(self._encode(tokens, groups, noise, layers), groups, names)

    def _gate_sees_positions(self) -> bool:
        return self.gate is None or self.scale_up.gate_input == "after_position"

    def telemetry(self) -> dict[str, float]:
        """How far the gate is open (see `Gate.telemetry`)."""
        return {} if self.gate is None else self.gate.telemetry()


def _check(size: Size, scale_up: ScaleUp, position: Position) -> None:
    if scale_up.tube_width > size.width:
        raise RecipeError(
            f"model.scale_up.tube_width is {scale_up.tube_width}, more than the model's width of "
            f"{size.width}: tubes come from a model that is at most as wide"
        )
    last = size.depth - (scale_up.gate != "none")
    if scale_up.frozen_layers > last:
        reason = "the gate needs a block that is trained" if last < size.depth else "the model has no more"
        raise RecipeError(
            f"model.scale_up.frozen_layers is {scale_up.frozen_layers} of {size.depth} layers; "
            f"at most {last}: {reason}"
        )
    if position == "learned":
        raise RecipeError(
            "model.position: learned does not go with `model.scale_up`, because nobody has learned positions "
            "of the tubes at the large width; take `fixed`"
        )
