"""Random weights of Hugging Face's models give the same logits here, and come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.models.inputs import InputSpec
from framework.models.registry import build_model
from framework.models.weights.convert import Target, fill, format_of, to_format
from framework.models.weights.files import read_weights
from framework.models.weights.formats import FORMATS
from framework.recipe.schema import AnyModel, TimeSformer, VideoMAE, ViT, ViViT

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

NUMBERS = {"width": 48, "depth": 3, "heads": 3, "mlp_width": 96}
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "num_labels": 7,
    "layer_norm_eps": 1e-6,
}
IMAGE = InputSpec("image", 1, 32, 7)
VIDEO = InputSpec("video", 4, 32, 7)


def hf_vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(patch_size=8, **COMMON))


def hf_vivit() -> nn.Module:
    config = transformers.VivitConfig(num_frames=4, tubelet_size=[2, 8, 8], hidden_act="gelu_fast", **COMMON)
    return transformers.VivitForVideoClassification(config)


def hf_timesformer() -> nn.Module:
    config = transformers.TimesformerConfig(num_frames=4, patch_size=8, **COMMON)
    return transformers.TimesformerForVideoClassification(config)


def hf_videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(num_frames=4, patch_size=8, tubelet_size=2, **COMMON)
    return transformers.VideoMAEForVideoClassification(config)


CASES: dict[str, tuple[Callable[[], nn.Module], AnyModel, InputSpec]] = {
    "vit": (hf_vit, ViT(name="vit_ti", patch=8, **NUMBERS), IMAGE),
    "vivit": (hf_vivit, ViViT(name="vivit_ti_m1", tubelet=(2, 8, 8), **NUMBERS), VIDEO),
    "timesformer": (hf_timesformer, TimeSformer(name="timesformer_ti_divided", patch=8, **NUMBERS), VIDEO),
    "videomae": (hf_videomae, VideoMAE(name="videomae_ti", tubelet=(2, 8, 8), **NUMBERS), VIDEO),
}


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Random numbers everywhere: what starts at zero or one would hide mistakes."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


def their_logits(model: nn.Module, clip: Tensor, mean: Any, std: Any) -> Tensor:
    pixels = (clip.float() / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    if isinstance(model, transformers.ViTForImageClassification):
        return model(pixels[:, :, 0]).logits
    return model(pixels.transpose(1, 2)).logits


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_same(case: str, tmp_path: Path) -> None:
    make, section, spec = CASES[case]
    theirs = randomised(make())
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    known, tensors = format_of(read_weights(tmp_path))
    assert (known.name, known.family) == ("hf", case)
    model = build_model(section, {"data": spec}).eval()
    account = fill(model, tensors, known, Target("data"))
    assert account.new == account.unused == []
    clip = torch.randint(256, (2, 3, spec.frames, 32, 32), dtype=torch.uint8)
    expected = their_logits(theirs, clip, known.mean, known.std)
    assert float(expected.std()) > 0.01, "logits must say something"
    torch.testing.assert_close(model({"data": clip})["data"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_back_in_their_model_they_give_the_same_logits(case: str) -> None:
    make, section, spec = CASES[case]
    model = randomised(build_model(section, {"data": spec}))
    known = next(known for known in FORMATS if (known.name, known.family) == ("hf", case))
    written = to_format(model.state_dict(), known, 3, Target("data"))
    theirs = make().eval()
    loaded = type(theirs).from_pretrained(None, config=theirs.config, state_dict=written)  # type: ignore[attr-defined]
    clip = torch.randint(256, (2, 3, spec.frames, 32, 32), dtype=torch.uint8)
    expected = model({"data": clip})["data"]
    found = their_logits(loaded.eval(), clip, known.mean, known.std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
