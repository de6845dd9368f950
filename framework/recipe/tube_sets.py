"""Sets of tubes that have a name, so that recipes can say `model.tube_set: charades`, and who reads them.

What the paper says of each, and what it leaves open, stands beside it and in docs/published.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from framework.errors import RecipeError
from framework.recipe.schema import Model, Recipe, Tube

__all__ = [
    "ABLATION_KERNELS",
    "PAPER_TUBES",
    "TUBE_SETS",
    "check_tubes_are_read",
    "name_tube",
    "tubes_of",
    "tubes_that_read",
    "unread_tubes",
]

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


def tubes_of(model: Model) -> tuple[Tube, ...]:
    """The tubes of a recipe: its own, or those of the set that it names."""
    if model.tubes is not None:
        return model.tubes
    return PAPER_TUBES if model.tube_set is None else TUBE_SETS[model.tube_set]


def tubes_that_read(tubes: Sequence[Tube], frames: int) -> list[int]:
    """Which tubes read clips of so many frames; of one frame, the first with a temporal kernel of 1."""
    if frames > 1:
        return list(range(len(tubes)))
    return [number for number, tube in enumerate(tubes) if tube.kernel[0] == 1][:1]


def name_tube(tubes: Sequence[Tube], number: int) -> str:
    """The words by which messages call a tube."""
    tube = tubes[number]
    parts = {
        "kernel": tube.kernel,
        "stride": tube.stride,
        "offset": tube.offset,
        "space_to_depth": tube.space_to_depth,
    }
    text = ", ".join(f"{key} {'x'.join(map(str, value))}" for key, value in parts.items())
    return f"tube {number + 1} of {len(tubes)} (`model.tubes[{number}]`: {text})"


def unread_tubes(recipe: Recipe) -> list[str]:
    """The trainable tubes that no source of the mixture reads, in words."""
    model = recipe.model
    if not isinstance(model, Model) or (model.scale_up is not None and not model.scale_up.train_tokenizer):
        return []
    tubes = tubes_of(model)
    learned = [recipe.data.sources[name] for name in recipe.data.mixture]
    read = {
        number
        for source in learned
        if source.loss_weight > 0
        for number in tubes_that_read(tubes, source.frames)
    }
    return [name_tube(tubes, number) for number in range(len(tubes)) if number not in read] if read else []


def check_tubes_are_read(recipe: Recipe) -> None:
    """Refuse to train tubes that no source of the mixture reads; `guards.dead: 0` lets them be.

    Errors:
        RecipeError: names the tubes.
    """
    unread = unread_tubes(recipe)
    if not unread or not recipe.guards.dead:
        return
    listing = "\n  ".join(unread)
    raise RecipeError(
        "model: nothing in data.mixture that is learned from reads these tubes, so they would stay random:\n"
        f"  {listing}\nAdd a source of videos to data.mixture, or leave these tubes out of `model.tubes` "
        "(for images alone `model.name: vit_b` and its like are the models). If that is right, "
        "`guards.dead: 0` says so"
    )
