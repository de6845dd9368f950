"""Every model but TubeViT, small enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from framework.models import InputSpec, build_model
from framework.models.joint import JointModel
from framework.recipe.model_sections import AnyModel, ModelSection

INPUTS = {
    "clips": InputSpec("video", 8, 32, 5),
    "short": InputSpec("video", 4, 16, 3),
    "photos": InputSpec("image", 1, 32, 7),
}
SMALL = {"width": 32, "depth": 2, "heads": 4}
VIEWS = [
    {"frames": 2, "width": 32, "depth": 3, "heads": 4, "mlp_width": 64},
    {"frames": 4, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32},
]
MODELS: dict[str, dict[str, Any]] = {
    "vit_ti": {**SMALL, "patch": 8},
    **{f"vivit_ti_{kind}": {**SMALL, "tubelet": [2, 8, 8]} for kind in ("m1", "m2", "m3", "m4", "avgpool")},
    **{f"timesformer_ti_{kind}": {**SMALL, "patch": 8} for kind in ("divided", "joint", "space")},
    "videomae_ti": {**SMALL, "tubelet": [2, 8, 8]},
    "mtv_b": {
        "views": VIEWS,
        "patch": 8,
        "fusion_layers": [1],
        "global_depth": 1,
        "global_heads": 4,
        "global_mlp_width": 64,
    },
}
"""What the `model` section says beside the name."""

SECTION: TypeAdapter[AnyModel] = TypeAdapter(ModelSection)


def section(name: str, **changes: Any) -> AnyModel:
    """The `model` section of a small model."""
    return SECTION.validate_python({"name": name, **MODELS[name], **changes})


def make(name: str, inputs: dict[str, InputSpec] = INPUTS, *, seed: int = 0, **changes: Any) -> JointModel:
    """A small model with random weights, biases and vectors too, so that nothing is zero by chance."""
    torch.manual_seed(seed)
    model = build_model(section(name, **changes), inputs)
    assert isinstance(model, JointModel)
    return model


def shake(model: nn.Module) -> None:
    """Give weights that start at zero or one a random part."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def pixels(inputs: dict[str, InputSpec] = INPUTS, samples: int = 2) -> dict[str, torch.Tensor]:
    """Random clips of all sources."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(samples, 3, spec.frames, spec.size, spec.size, generator=generator) * 2 - 1
        for name, spec in inputs.items()
    }
