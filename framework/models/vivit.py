"""ViViT: models 1 to 4 and the average-pool baseline (arXiv 2103.15691, §3.3), and the image ViT.

All read tubelets, add learned places and classify one vector per sample. They differ in who attends to whom:

1. all tokens to all (`SpaceTime`); with patches of one frame it is the image ViT;
2. the tokens of one time to each other, then one vector per time to each other (`FactorisedEncoder`); without
   the second encoder, the mean over time is the average-pool baseline;
3. in every block first over space, then over time (`FactorisedAttention`);
4. in every block half of the heads over time, half over space (`FactorisedAttention` with `split`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from framework.models.inputs import InputSpec
from framework.models.joint import Size, encoder_blocks
from framework.models.layers import Groups, LayerNorm, rows
from framework.models.pooling import FirstToken, MeanPool
from framework.models.video_blocks import FactorisedBlock, SplitBlock
from framework.models.video_model import Places, Reading, VideoClassifier
from framework.models.work import Work
from framework.recipe.schema import Gelu, Tube

__all__ = ["FactorisedAttention", "FactorisedEncoder", "SpaceTime"]


class SpaceTime(VideoClassifier):
    """Model 1: one encoder over all tokens; `vit` is the same with patches of a single frame."""

    positions = ("places.",)

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        *,
        class_token: bool = True,
        gelu: Gelu = "tanh",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights.

        Errors:
            ModelError: a source that is smaller than a tubelet.
        """
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        self.places = Places(self.largest, size.width, class_token=class_token)
        self.blocks = encoder_blocks(size, gelu=gelu)
        self.norm = LayerNorm(size.width)
        self.pool = FirstToken() if class_token else MeanPool()
        self.add_heads(size.width)

    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
        tokens, groups = self.places(reading.parts, reading.shapes)
        depths = self.drop(reading, groups, self.size.depth)
        tokens = self._run_all(self.blocks, tokens, groups, depths)
        return self.pool(self.norm(tokens), groups)

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source, the class token included."""
        time, height, width = self.shape_of(spec)
        return time * height * width + self.places.has_class_token

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        tokens = self.sequence_length(spec)
        work = self.embedding_work(spec).encoder(self.size, tokens, tokens**2)
        return work.linear(1, self.size.width, spec.classes)


class FactorisedEncoder(VideoClassifier):
    """Model 2: a spatial encoder for each time, then a temporal encoder; or, without it, the baseline.

    Both encoders have a class token and places of their own and end with a norm. With `class_token` false
    both take the mean of their tokens.
    """

    positions = ("places.",)

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        *,
        temporal_depth: int,
        class_token: bool = True,
        gelu: Gelu = "tanh",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights; with `temporal_depth` 0 vectors are averaged over time.

        Errors:
            ModelError: a source that is smaller than a tubelet.
        """
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        times, height, width = self.largest
        self.places = Places((1, height, width), size.width, class_token=class_token)
        self.blocks = encoder_blocks(size, gelu=gelu)
        self.norm = LayerNorm(size.width)
        self.pool = FirstToken() if class_token else MeanPool()
        self.mean = MeanPool()
        self.temporal_size = replace(size, depth=temporal_depth)
        if temporal_depth:
            self.temporal_places = Places((times, 1, 1), size.width, class_token=class_token)
            self.temporal_blocks = encoder_blocks(self.temporal_size, gelu=gelu)
            self.temporal_norm = LayerNorm(size.width)
        self.add_heads(size.width)

    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
        frames = self.frame_features(reading)
        times: Groups = tuple((samples, time) for samples, time, _ in reading.grids)
        if not self.temporal_size.depth:
            return self.mean(frames, times)
        parts = [part.view(*group, -1) for part, group in zip(frames.split(rows(times)), times, strict=True)]
        tokens, groups = self.temporal_places(parts, [(time, 1, 1) for _, time in times])
        depths = self.drop(reading, groups, self.temporal_size.depth, first=2 * self.size.depth)
        tokens = self._run_all(self.temporal_blocks, tokens, groups, depths)
        return self.pool(self.temporal_norm(tokens), groups)

    def frame_features(self, reading: Reading) -> Tensor:
        """One vector for each time of each sample, in the order of the samples: (samples * times, width)."""
        tokens, groups = self.places(*reading.frames)
        # all times of a sample share its draws
        depths = self.drop(reading, reading.whole(groups), self.size.depth)
        tokens = self._run_all(self.blocks, tokens, groups, depths)
        return self.pool(self.norm(tokens), groups)

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source that the spatial encoder sees, one class token for each time."""
        time, height, width = self.shape_of(spec)
        return time * (height * width + self.places.has_class_token)

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        times, tokens = self.shape_of(spec)[0], self.sequence_length(spec)
        work = self.embedding_work(spec).encoder(self.size, tokens, tokens**2 / times)
        if self.temporal_size.depth:
            later = times + self.temporal_places.has_class_token
            work.encoder(self.temporal_size, later, later**2)
        return work.linear(1, self.size.width, spec.classes)


class FactorisedAttention(VideoClassifier):
    """Models 3 and 4: attention along space and along time, one after the other, or in different heads."""

    positions = ("places.",)

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        *,
        split: bool,
        time_first: bool = False,
        gelu: Gelu = "tanh",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights; `split` is model 4, and `time_first` the order in model 3.

        Errors:
            ModelError: a source that is smaller than a tubelet.
        """
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        self.split = split
        self.places = Places(self.largest, size.width, class_token=False)
        numbers = (size.width, size.heads, size.mlp_width, gelu)
        self.blocks = nn.ModuleList(
            SplitBlock(*numbers) if split else FactorisedBlock(*numbers, time_first=time_first)
            for _ in range(size.depth)
        )
        self.norm = LayerNorm(size.width)
        self.pool = MeanPool()
        self.add_heads(size.width)

    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
        tokens, groups = self.places(reading.parts, reading.shapes)
        branches = 2 if self.split else FactorisedBlock.branches
        depths = self.drop(reading, groups, self.size.depth, branches=branches)
        tokens = self._run_all(self.blocks, tokens, reading.grids, depths)
        return self.pool(self.norm(tokens), groups)

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source."""
        time, height, width = self.shape_of(spec)
        return time * height * width

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        times, height, width = self.shape_of(spec)
        places, tokens, size = height * width, self.sequence_length(spec), self.size
        over_space, over_time = times * places**2, places * times**2
        work = self.embedding_work(spec)
        for _ in range(size.depth):
            if self.split:
                work.attention(size.width, size.heads, tokens, (over_space + over_time) / 2)
            else:
                work.attention(size.width, size.heads, tokens, over_space)
                work.attention(size.width, size.heads, tokens, over_time)
            work.mlp(size.width, size.mlp_width, tokens)
        return work.linear(1, size.width, spec.classes)
