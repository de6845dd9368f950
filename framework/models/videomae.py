"""VideoMAE: masked autoencoders of video, and the classifiers that they become (arXiv 2203.12602).

In pretraining the same places are masked in all frames (§3.3); the encoder sees the other tokens alone, and a
small decoder predicts the pixels of what is masked. Fine-tuning classifies the mean over all tokens, with a
norm after it that pretraining did not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from framework.errors import RecipeError
from framework.models.inputs import InputSpec
from framework.models.joint import Size, encoder_blocks
from framework.models.layers import Groups, LayerNorm, Linear, matrix, rows
from framework.models.noise import split_places
from framework.models.pooling import MeanPool
from framework.models.positions import TEMPERATURE
from framework.models.tubes import CHANNELS, cut
from framework.models.video_model import Reading, VideoClassifier, VideoModel
from framework.models.work import Work
from framework.recipe.schema import Gelu, Masking, Tube

__all__ = ["VideoMAE", "VideoMAEPretraining", "decoder_size", "pixel_targets"]


class IndexPositions(nn.Module):
    """Sines and cosines of a token's number in its sample, as in Vaswani et al. 2017; nothing is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def forward(self, part: Tensor) -> Tensor:
        """The table for (samples, tokens, width): (tokens, width)."""
        key = (part.shape[1], part.device, part.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # training must be able to use what evaluation remembered
                channels = torch.arange(self.width, dtype=torch.float64, device="cpu")
                numbers = torch.arange(part.shape[1], dtype=torch.float64, device="cpu").unsqueeze(1)
                angles = numbers / TEMPERATURE ** (2 * (channels // 2) / self.width)
                table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
                self._tables[key] = table.to(part.device, part.dtype)
        return self._tables[key]


class _Encoder(VideoModel):
    """The tokens with their positions, and the blocks."""

    def __init__(
        self, size: Size, tube: Tube, inputs: Mapping[str, InputSpec], gelu: Gelu, stochastic_depth: float
    ) -> None:
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        self.places = IndexPositions(size.width)
        self.blocks = encoder_blocks(size, gelu=gelu)

    def encode(self, reading: Reading, parts: Sequence[Tensor]) -> tuple[Tensor, Groups]:
        """Run the blocks on tokens (samples, tokens, width) of each source: their matrix, and its groups."""
        tokens, groups = matrix(parts)
        depths = self.drop(reading, groups, self.size.depth)
        return self._run_all(self.blocks, tokens, groups, depths), groups

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source."""
        time, height, width = self.shape_of(spec)
        return time * height * width

    def encoder_work(self, spec: InputSpec, tokens: int) -> Work:
        """The work of tokenizer and blocks on so many tokens."""
        return self.embedding_work(spec).encoder(self.size, tokens, tokens**2)


class VideoMAE(_Encoder, VideoClassifier):
    """The classifier: all tokens, their mean, a norm."""

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        *,
        gelu: Gelu = "exact",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights.

        Errors:
            ModelError: a source that is smaller than a tubelet.
        """
        super().__init__(size, tube, inputs, gelu, stochastic_depth)
        self.pool = MeanPool()
        self.pool_norm = LayerNorm(size.width)
        self.add_heads(size.width)

    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
        tokens, groups = self.encode(reading, [part + self.places(part) for part in reading.parts])
        return self.pool_norm(self.pool(tokens, groups))

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        return self.encoder_work(spec, self.sequence_length(spec)).linear(1, self.size.width, spec.classes)


class Decoder(nn.Module):
    """From what the encoder made of the visible tokens to the pixels of the masked ones."""

    def __init__(self, size: Size, encoder_width: int, pixels: int, gelu: Gelu) -> None:
        super().__init__()
        self.size = size
        self.project = Linear(encoder_width, size.width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(size.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.places = IndexPositions(size.width)
        self.blocks = encoder_blocks(size, gelu=gelu)
        self.norm = LayerNorm(size.width)
        self.to_pixels = Linear(size.width, pixels)

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        """Predict the pixels of masked tokens.

        Args:
            visible: (samples, visible tokens, encoder width).
            order: int64 (samples, tokens), the numbers of the visible tokens, then of the masked ones.

        Returns:
            (samples, masked tokens, pixels).
        """
        tokens = self.project(visible)
        samples, seen, _ = tokens.shape
        masked = self.mask_token.to(tokens.dtype).expand(samples, order.shape[1] - seen, -1)
        tokens = torch.cat((tokens, masked), dim=1)
        tokens = tokens + self.places(tokens)[order]
        tokens, groups = matrix([tokens])
        for block in self.blocks:
            tokens = block(tokens, groups)
        return self.to_pixels(self.norm(tokens.view(samples, -1, self.size.width)[:, seen:]))

    def work(self, tokens: int, masked: int, encoder_width: int) -> Work:
        """What one sample takes."""
        work = Work().linear(tokens - masked, encoder_width, self.size.width)
        work.encoder(self.size, tokens, tokens**2)
        return work.linear(masked, self.size.width, self.to_pixels.out_features)


class VideoMAEPretraining(_Encoder):
    """The masked autoencoder. Its forward pass gives losses, not logits, and it has no classifiers."""

    returns_losses = True

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        masking: Masking,
        *,
        gelu: Gelu = "exact",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights.

        Errors:
            ModelError: a source that is smaller than a tubelet.
            RecipeError: so few places that none, or all, would be masked.
        """
        super().__init__(size, tube, inputs, gelu, stochastic_depth)
        self.masking = masking
        self.norm = LayerNorm(size.width)
        volume = tube.kernel[0] * tube.kernel[1] * tube.kernel[2]
        self.decoder = Decoder(decoder_size(size, masking), size.width, CHANNELS * volume, gelu)
        for spec in inputs.values():
            self._masked_of(self.shape_of(spec))

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Reconstruction losses of all samples of a micro-batch.

        Args:
            pixels: as of `VideoModel.read`.
            seeds: per source int64 (batch,), which decide what is masked; None: the place in the batch does.

        Returns:
            Per source float32 (batch,): the mean squared error over the masked pixels.

        Errors:
            ModelError: an unknown source, or a wrong shape.
        """
        reading = self.read(pixels, seeds)
        visible, orders = [], []
        for name, part, (samples, times, places), shape in zip(
            reading.names, reading.parts, reading.grids, reading.shapes, strict=True
        ):
            draws = torch.arange(samples, device=part.device) if seeds is None else seeds[name]
            seen, hidden = split_places(draws, places, self._masked_of(shape))
            seen, hidden = _over_times(seen, times, places), _over_times(hidden, times, places)
            visible.append(_take(part + self.places(part), seen))
            orders.append(torch.cat((seen, hidden), dim=1))
        tokens, groups = self.encode(reading, visible)
        parts = self.norm(tokens).split(rows(groups))
        losses = {}
        for name, part, order, group, shape in zip(
            reading.names, parts, orders, groups, reading.shapes, strict=True
        ):
            predicted = self.decoder(part.view(*group, -1), order)
            clip = pixels[name]
            clip = clip.expand(-1, -1, self._frames(clip.shape[2]), -1, -1)
            targets = pixel_targets(clip, self.tube, shape, normalised=self.masking.normalised)
            wanted = _take(targets, order[:, group[1] :])
            losses[name] = (predicted.float() - wanted).square().mean(dim=(1, 2))
        return losses

    def _masked_of(self, shape: tuple[int, int, int]) -> int:
        places = shape[1] * shape[2]
        masked = int(self.masking.ratio * places)
        if not 0 < masked < places:
            raise RecipeError(
                f"model.pretrain.ratio {self.masking.ratio} masks {masked} of {places} places, which leaves "
                "nothing to learn; take larger frames, smaller tubelets or another ratio"
            )
        return masked

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        shape = self.shape_of(spec)
        masked, tokens = shape[0] * self._masked_of(shape), self.sequence_length(spec)
        encoder = self.encoder_work(spec, tokens - masked)
        decoder = self.decoder.work(tokens, masked, self.size.width)
        return encoder + decoder


def decoder_size(size: Size, masking: Masking) -> Size:
    """The numbers of the decoder: by default half of the encoder's width and heads."""
    width = masking.decoder_width or size.width // 2
    heads = masking.decoder_heads or max(1, size.heads // 2)
    if width % heads:
        raise RecipeError(f"model.pretrain: a decoder of width {width} cannot be cut into {heads} heads")
    return Size(width, masking.decoder_depth, heads, 4 * width)


@torch.no_grad()
def pixel_targets(
    clip: Tensor, tube: Tube, shape: tuple[int, int, int], *, normalised: bool = True
) -> Tensor:
    """What a masked autoencoder predicts (arXiv 2203.12602, §3.1, and 2111.06377, §3).

    Args:
        clip: (samples, 3, frames, height, width); uint8, or floats from -1 to 1.
        tube: the tubelet.
        shape: the grid of tokens.
        normalised: bring every colour of a tubelet to mean 0 and deviation 1, else to values from 0 to 1.

    Returns:
        float32 (samples, tokens, pixels x 3): pixels by time, height, width, then the colours of each.
    """
    values = cut(clip, tube, shape).unflatten(1, (CHANNELS, -1)).float()  # (tokens of all, 3, pixels)
    values = values / 255 if clip.dtype == torch.uint8 else (values + 1) / 2
    if normalised:
        spread, mean = torch.var_mean(values, dim=2, keepdim=True)
        values = (values - mean) / (spread.sqrt() + 1e-6)
    return values.transpose(1, 2).reshape(clip.shape[0], -1, CHANNELS * values.shape[2])


def _over_times(chosen: Tensor, times: int, places: int) -> Tensor:
    """The same places in all frames: (samples, chosen) to token numbers (samples, times * chosen)."""
    starts = torch.arange(times, device=chosen.device).view(1, -1, 1) * places
    return (starts + chosen.unsqueeze(1)).flatten(1)


def _take(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Some tokens of each sample: (samples, tokens, width) to (samples, numbers, width)."""
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
