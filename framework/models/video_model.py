"""What ViViT and the systems it is compared with share: tubelets, learned places, stochastic depth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.inputs import InputSpec
from framework.models.joint import JointModel, Size
from framework.models.layers import Groups, matrix, rows
from framework.models.noise import depth_scales
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import AXES
from framework.models.work import Work
from framework.recipe.schema import Tube

__all__ = ["Places", "Reading", "Times", "VideoClassifier", "VideoModel", "place_frames"]

Triple = tuple[int, int, int]


class Reading(NamedTuple):
    """The tokens of one micro-batch before anything is added to them; lists have one entry a source."""

    names: list[str]
    parts: list[Tensor]
    """(samples, tokens, width), by time, height, width."""
    shapes: list[Triple]
    """The grid of a sample's tokens."""
    seeds: Tensor | None
    """int64 (total_samples,); None where nothing is dropped."""

    @property
    def samples(self) -> list[int]:
        """How many samples each source has."""
        return [part.shape[0] for part in self.parts]

    @property
    def grids(self) -> tuple[Triple, ...]:
        """(samples, times, places of one time) of each source."""
        return tuple(
            (part.shape[0], time, height * width)
            for part, (time, height, width) in zip(self.parts, self.shapes, strict=True)
        )

    @property
    def frames(self) -> tuple[list[Tensor], list[Triple]]:
        """Parts and shapes with every time of every sample by itself: (samples * times, places, width)."""
        parts = [
            part.reshape(samples * times, places, -1)
            for part, (samples, times, places) in zip(self.parts, self.grids, strict=True)
        ]
        return parts, [(1, height, width) for _, height, width in self.shapes]

    def whole(self, groups: Groups) -> Groups:
        """Groups of pieces of samples as groups of samples: (samples, rows of a sample) of each source."""
        counts = zip(self.samples, rows(groups), strict=True)
        return tuple((samples, count // samples) for samples, count in counts)


class Places(nn.Module):
    """A learned vector for every place of a grid, and a class token with a place of its own.

    `weight` is (time, height, width, channels). Smaller grids take the corner with which the table begins.
    The class token starts at zero, as in the authors' code.
    """

    def __init__(self, size: Triple, width: int, *, class_token: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*size, width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.has_class_token = class_token
        if class_token:
            self.class_token = nn.Parameter(torch.zeros(width))
            self.class_place = nn.Parameter(torch.empty(width))
            nn.init.trunc_normal_(self.class_place, std=0.02)
        self.size = size

    def forward(self, parts: Sequence[Tensor], shapes: Sequence[Triple]) -> tuple[Tensor, Groups]:
        """Add places to tokens (samples, tokens, width), and put the class token before them.

        Returns:
            The token matrix (total_tokens, width), and its groups.

        Errors:
            ModelError: a grid is larger than those of the sources that the model was built for.
        """
        return matrix([self._place(part, shape) for part, shape in zip(parts, shapes, strict=True)])

    def _place(self, part: Tensor, shape: Triple) -> Tensor:
        check_room(shape, self.size)
        table = self.weight[: shape[0], : shape[1], : shape[2]].flatten(0, 2)
        part = part + table.to(part.dtype)
        if not self.has_class_token:
            return part
        first = (self.class_token + self.class_place).to(part.dtype)
        return torch.cat((first.expand(part.shape[0], 1, -1), part), dim=1)


def place_frames(places: Places, reading: Reading) -> list[Tensor]:
    """The tokens of every frame with their places, a class token first.

    Returns:
        Per source (samples, times, places of one time + 1, width).

    Errors:
        ModelError: as `Places`.
    """
    tokens, groups = places(*reading.frames)
    return [
        part.view(samples, times, count + 1, -1)
        for part, (samples, times, count) in zip(tokens.split(rows(groups)), reading.grids, strict=True)
    ]


class Times(nn.Module):
    """A learned vector for every time, `weight` (times, width), which starts at zero."""

    def __init__(self, times: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(times, width))
        self.times = times

    def forward(self, part: Tensor) -> Tensor:
        """Add to (samples, times, places, width).

        Errors:
            ModelError: more times than those of the sources that the model was built for.
        """
        check_room((part.shape[1], 1, 1), (self.times, 1, 1))
        return part + self.weight[: part.shape[1], None].to(part.dtype)


def check_room(shape: Triple, room: Triple) -> None:
    """Refuse a grid of tokens that is larger than the table of places.

    Errors:
        ModelError: names the axis.
    """
    for axis, (wanted, there) in enumerate(zip(shape, room, strict=True)):
        if wanted > there:
            raise ModelError(
                f"a clip makes {wanted} tokens along the {AXES[axis]}, but {there} places were learned "
                "there; feed clips like those of the recipe's sources"
            )


class VideoModel(JointModel, ABC):
    """A model whose tokens all come from one kind of patch or tubelet, on one grid.

    An image is read as a clip in which it is repeated to the length of one tubelet.
    """

    tokenizer: TubeTokenizer

    def __init__(
        self, size: Size, tube: Tube, inputs: Mapping[str, InputSpec], *, stochastic_depth: float
    ) -> None:
        """Build the tokenizer with random weights.

        Errors:
            ModelError: a source that is smaller than a tubelet; the message names it.
        """
        super().__init__(size, inputs, stochastic_depth=stochastic_depth)
        self.tube = tube
        self.tokenizer = TubeTokenizer([tube], size.width, position="none")
        self.shapes = {name: self.shape_of(spec, name) for name, spec in inputs.items()}

    @property
    def largest(self) -> Triple:
        """The grid that holds those of all sources."""
        time, height, width = (max(lengths) for lengths in zip(*self.shapes.values(), strict=True))
        return time, height, width

    def shape_of(self, spec: InputSpec, name: str = "") -> Triple:
        """The grid of tokens of a sample of a source: (time, height, width)."""
        return self._shape((spec.frames, spec.size, spec.size), name)

    @abstractmethod
    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""

    @abstractmethod
    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source, with all class tokens that go along with them."""

    def embedding_work(self, spec: InputSpec) -> Work:
        """The work of the tokenizer."""
        time, height, width = self.shape_of(spec)
        volume = self.tube.kernel[0] * self.tube.kernel[1] * self.tube.kernel[2]
        return Work().linear(time * height * width, 3 * volume, self.size.width)

    def _shape(self, clip: Triple, name: str) -> Triple:
        clip = (self._frames(clip[0]), *clip[1:])
        try:
            return self.tokenizer.grids(clip)[0].shape
        except ModelError as error:
            raise ModelError(f"source {name}: {error}" if name else str(error)) from error

    def _frames(self, frames: int) -> int:
        """The frames that are read of so many: an image fills one tubelet."""
        return self.tube.kernel[0] + self.tube.offset[0] if frames == 1 else frames

    def read(self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None) -> Reading:
        """The tokens of a micro-batch, without places.

        Args:
            pixels: per source (batch, 3, frames, height, width); uint8, or floats that are already
                normalised. One frame is an image. Any subset of the sources, each with a batch of its own.
            seeds: per source int64 (batch,). None, or a model in evaluation mode: nothing is dropped.

        Errors:
            ModelError: an unknown source, or a wrong shape.
        """
        names = self._sources(pixels)
        clips = []
        for name in names:
            clip = pixels[name]
            self._check_shape(name, clip)
            frames = self._frames(clip.shape[2])
            clips.append(clip if frames == clip.shape[2] else clip.expand(-1, -1, frames, -1, -1))
        shapes = [
            self._shape((clip.shape[2], clip.shape[3], clip.shape[4]), name)
            for name, clip in zip(names, clips, strict=True)
        ]
        joined = torch.cat([seeds[name] for name in names]) if self.training and seeds is not None else None
        return Reading(names, self.tokenizer.tokens(clips), shapes, joined)

    def drop(
        self, reading: Reading, groups: Groups, layers: int, *, branches: int = 2, first: int = 0
    ) -> list[Tensor | None]:
        """What stochastic depth does to each layer, (branches, rows, 1), or None.

        Args:
            reading: whose samples these are.
            groups: (samples, rows of a sample) of each source.
            layers: of the encoder.
            branches: of a block.
            first: branches of encoders before this one.
        """
        if reading.seeds is None or self.stochastic_depth == 0:
            return [None] * layers
        dtype = reading.parts[0].dtype
        rate = self.stochastic_depth
        scales = depth_scales(reading.seeds, groups, layers, rate, dtype, branches=branches, first=first)
        return list(scales.unbind(0))


class VideoClassifier(VideoModel):
    """A video model that makes one vector of every sample, which is classified."""

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits of all samples of a micro-batch; see `VideoModel.read` for the arguments.

        Returns:
            Per source float32 (batch, classes).

        Errors:
            ModelError: an unknown source, a wrong shape, or a clip that is larger than the learned places.
        """
        reading = self.read(pixels, seeds)
        return self.classify(self.features(reading), reading.samples, reading.names)

    @abstractmethod
    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
