"""Operations of a transformer, added up from its parts.

Those of one forward pass of one sample are given in the three ways in which papers count them:

- `multiply_adds`: one multiplication with its addition counts 1 (what most tables call FLOPs).
- `flops`: the same counted 2, what the data sheets of accelerators and utilisation figures mean.
- `published`: multiply-adds, plus what the authors' tool adds for softmax (2 per attention logit) and for
  norms, GELU, biases and residuals. The authors' ViViT paper counts so (arXiv 2103.15691, Table 2).

What the authors' tool adds to multiply-adds is 2 per attention logit, and for norms, GELU, biases and
residuals 22,800 per token and layer at width 768; a second attention in a layer adds a fifth of that. The
totals of the ViViT paper (arXiv 2103.15691, Table 2) fix these numbers, and the shares follow from counting a
norm as 7 operations an element, a bias and a residual as one each, and a tanh GELU as 9: about 6 channels'
worth for an attention, 4.5 for an MLP, and 5 for each of its hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from framework.models.joint import Size

__all__ = ["Work"]

ATTENTION, MLP, HIDDEN = 5.9375, 4.4375, 4.828125
"""Element-wise operations, counted a half each, per row: of an attention and an MLP for each channel, and of
an MLP for each hidden channel. With four hidden channels a channel they add up to 29.6875 = 22800 / 768."""


@dataclass
class Work:
    """What one forward pass of one sample takes."""

    multiply_adds: int = 0
    logits: int = 0
    elementwise: float = 0.0

    @property
    def flops(self) -> int:
        """A multiply-add counted as two."""
        return 2 * self.multiply_adds

    @property
    def published(self) -> int:
        """As the authors' tool counts."""
        return round(self.multiply_adds + 2 * self.logits + self.elementwise)

    def linear(self, rows: int, inputs: int, outputs: int) -> Work:
        """Add a linear layer."""
        self.multiply_adds += rows * inputs * outputs
        return self

    def attention(self, width: int, heads: int, rows: int, pairs: float) -> Work:
        """Add a self-attention of so many rows; `pairs` of a query with a key, averaged over the heads."""
        self.linear(rows, width, 4 * width)
        self.multiply_adds += round(2 * pairs * width)
        self.logits += round(heads * pairs)
        self.elementwise += ATTENTION * width * rows
        return self

    def mlp(self, width: int, hidden: int, rows: int) -> Work:
        """Add an MLP."""
        self.linear(rows, width, 2 * hidden)
        self.elementwise += (MLP * width + HIDDEN * hidden) * rows
        return self

    def encoder(self, size: Size, rows: int, pairs: float) -> Work:
        """Add the plain blocks of an encoder, each of which sees so many rows, and so many pairs of them."""
        block = Work().attention(size.width, size.heads, rows, pairs).mlp(size.width, size.mlp_width, rows)
        self.multiply_adds += size.depth * block.multiply_adds
        self.logits += size.depth * block.logits
        self.elementwise += size.depth * block.elementwise
        return self

    def __add__(self, other: Work) -> Work:
        """The sum of two parts."""
        return Work(
            self.multiply_adds + other.multiply_adds,
            self.logits + other.logits,
            self.elementwise + other.elementwise,
        )
