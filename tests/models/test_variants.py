"""All sizes in all variants: they build, run forward and backward, and go through a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from framework.models import InputSpec, build_model, model_names
from framework.recipe.schema import Model, Pool, Position, Tube

TUBES = (
    Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
    Tube(kernel=(8, 4, 4), stride=(3, 16, 16), offset=(2, 4, 4), space_to_depth=(1, 2, 2)),
    Tube(kernel=(1, 8, 8), stride=(16, 8, 8)),
)
EIGHT = (
    *TUBES[:2],
    *(Tube(kernel=(length, 8, 8), stride=(length, 16, 16)) for length in (2, 3, 4, 5, 16)),
    TUBES[2],
)
INPUTS = {
    "clips": InputSpec("video", 16, 32, 3),
    "photos": InputSpec("image", 1, 32, 7, (("place", 5), ("colour", 2))),
}
VARIANTS: list[dict[str, object]] = [
    *({"position": position} for position in get_args(Position)),
    *({"pool": pool} for pool in get_args(Pool)),
    *({"tubes": TUBES[-count:]} for count in (1, 2)),
    {"tubes": EIGHT},
    {"scale_up": {"tube_width": 96, "frozen_layers": 0}},
    {"scale_up": {"tube_width": 192, "frozen_layers": 0, "gate": "channel", "gate_input": "before_position"}},
    {"scale_up": {"tube_width": 96, "frozen_layers": 0, "gate": "none", "train_tokenizer": True}},
    {"kernels": "interpolated"},
    {"kernels": "interpolated", "interpolate_2d": True},
    {"kernels": "interpolated", "position": "learned", "pool": "class_token", "dropout": 0.1},
    {"stochastic_depth": 0.2, "dropout": 0.1},
]


def name_of(variant: dict[str, object]) -> str:
    return ",".join(f"{key}={len(value) if key == 'tubes' else value}" for key, value in variant.items())  # type: ignore[arg-type]


def build(name: str, variant: dict[str, object]) -> torch.nn.Module:
    options = {"name": name, "depth": 1, "tubes": TUBES, **variant}
    return build_model(Model.model_validate(options), INPUTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("name", model_names("tubevit"))
def test_every_size_in_every_variant(name: str, variant: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name, variant)
    clips = {
        source: torch.randint(0, 256, (2, 3, spec.frames, 32, 32), dtype=torch.uint8)
        for source, spec in INPUTS.items()
    }
    logits = model(clips, {source: torch.arange(2) for source in clips})
    assert {source: tuple(value.shape) for source, value in logits.items()} == {
        "clips": (2, 3),
        "photos": (2, 7),
    }
    torch.stack([value.logsumexp(1).sum() - value[:, 0].sum() for value in logits.values()]).sum().backward()
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    silent = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert silent == frozen
    assert all(key.startswith("tokenizer.") for key in frozen)
    scale_up: Any = variant.get("scale_up")
    assert bool(frozen) == (scale_up is not None and "train_tokenizer" not in scale_up)

    file = tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    with torch.device("meta"):
        other = build(name, variant)
    other.load_state_dict(torch.load(file, weights_only=True, mmap=True), assign=True)
    expected, found = model.eval()(clips), other.eval()(clips)
    for source in clips:
        assert torch.equal(found[source], expected[source])


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_variant_in_bf16(variant: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = build("tubevit_ti", variant).eval()
    clips = {"clips": torch.randint(0, 256, (2, 3, 16, 32, 32), dtype=torch.uint8)}
    expected = model(clips)["clips"]
    found = model.to(torch.bfloat16)(clips)["clips"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    found.square().sum().backward()
