"""Sets of tubes that have a name, so that recipes can say `model.tube_set: charades`.

What the paper says of each, and what it leaves open, stands beside it and in docs/published.md.
"""

from __future__ import annotations

from framework.recipe.schema import Tube

__all__ = ["ABLATION_KERNELS", "PAPER_TUBES", "TUBE_SETS"]

PAPER_TUBES = (
    Tube(kernel=(8, 8, 8), stride=(16, 32, 32), space_to_depth=(2, 1, 1)),
    Tube(kernel=(16, 4, 4), stride=(6, 32, 32), offset=(4, 8, 8), space_to_depth=(1, 2, 2)),
    Tube(kernel=(4, 12, 12), stride=(16, 32, 32), offset=(0, 16, 16)),
    Tube(kernel=(1, 16, 16), stride=(32, 16, 16)),
)
"""Table 12 of the paper. The last one is shared with images."""

ABLATION_KERNELS = (
    (4, 32, 32),
    (4, 4, 4),
    (4, 12, 12),
    (8, 8, 8),
    (16, 4, 4),
    (16, 16, 16),
    (32, 8, 8),
)
"""The tubes among the eight shapes of Table 14; the eighth is the 1x16x16 patch."""

DENSE_PATCH = Tube(kernel=(1, 16, 16), stride=(16, 16, 16))

TUBE_SETS: dict[str, tuple[Tube, ...]] = {
    # 2D patches of every 16th frame alone (§3.2: 392 tokens of 32 frames). Which tube Table 7
    # means by one is not said.
    "one": (DENSE_PATCH,),
    # The core model of §3.4: both kernels at strides of 16.
    "two": (Tube(kernel=(8, 8, 8), stride=(16, 16, 16)), DENSE_PATCH),
    "paper": PAPER_TUBES,
    # Table 12 with the patches of every 16th frame: 735 tokens of 32 frames, which cost the published 72 GF.
    "paper_dense": (*PAPER_TUBES[:3], DENSE_PATCH),
    # Which eight Table 7 means is not said; these are the eight shapes of Table 14, tubes at strides of 32:
    # 735 tokens too.
    "eight": (*(Tube(kernel=kernel, stride=(32, 32, 32)) for kernel in ABLATION_KERNELS), DENSE_PATCH),
    # Appendix B: 128 frames, strides (and, here, offsets) those of Table 12, kernels interpolated; no
    # Space-to-Depth is mentioned. Goes with `model.kernels: interpolated`.
    "charades": (
        Tube(kernel=(16, 16, 16), stride=(16, 32, 32)),
        Tube(kernel=(32, 8, 8), stride=(6, 32, 32), offset=(4, 8, 8)),
        Tube(kernel=(4, 32, 32), stride=(16, 32, 32), offset=(0, 16, 16)),
        Tube(kernel=(1, 16, 16), stride=(32, 16, 16)),
    ),
}
