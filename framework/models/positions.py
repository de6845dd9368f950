"""Fixed position embedding: sines and cosines of where the centre of a tube lies in the clip."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TEMPERATURE", "sincos"]

TEMPERATURE = 10_000.0


def sincos(centres: Tensor, width: int) -> Tensor:
    """Embed points of (time, height, width) in `width` channels (TubeViT §3.3, equations 3 to 7).

    With n = width // 6 frequencies w_j = 10000 ** (-j / n), channels 6j to 6j + 5 are
    sin(t w_j), cos(t w_j), sin(x w_j), cos(x w_j), sin(y w_j), cos(y w_j), where t counts frames and x, y run
    over the rows and columns of pixels. Channels that 6 does not divide stay zero: 4 of 1024, 2 of 1280.

    The paper prints the exponent as j, without dividing by n. Then w_1 is already 1e-4 and all but a few
    channels are the same for all tokens, so the exponent is normalised here, as in the authors' other code.

    Args:
        centres: (points, 3) in frames and pixels.
        width: channels of a token.

    Returns:
        float32 (points, width).
    """
    frequencies = width // 6
    exponents = torch.arange(frequencies, dtype=torch.float64, device=centres.device) / max(frequencies, 1)
    angles = centres.to(torch.float64).unsqueeze(1) * (TEMPERATURE**-exponents).unsqueeze(-1)
    embedding = torch.zeros(len(centres), width, dtype=torch.float32, device=centres.device)
    # (points, frequencies, axes, 2) in memory order is the interleaving [t, x, y] of the paper
    waves = torch.stack((angles.sin(), angles.cos()), dim=-1)
    embedding[:, : 6 * frequencies] = waves.flatten(1).to(torch.float32)
    return embedding
