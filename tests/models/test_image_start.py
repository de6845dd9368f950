"""A video model out of an image model: exact identities for a clip of one repeated frame (ViViT §3.4)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from video_models import make, pixels, shake

from framework.errors import RecipeError
from framework.models import InputSpec
from framework.models.image_start import from_image, resize_places
from framework.models.joint import JointModel
from framework.recipe.init_sections import ImageInit

TIMES = 4
IMAGE, CLIP = {"source": InputSpec("image", 1, 32, 5)}, {"source": InputSpec("video", 8, 32, 5)}
PHOTO = pixels(IMAGE)["source"]
REPEATED = PHOTO.expand(-1, -1, 8, -1, -1)


def image_model(pool: str) -> JointModel:
    """A ViT with random weights everywhere."""
    model = make("vit_ti", IMAGE, pool=pool, gelu="tanh").eval()
    shake(model)
    return model


def start(name: str, image: JointModel, how: ImageInit, **changes: object) -> JointModel:
    """A video model with what the image model's tensors become, its classifier too."""
    model = make(name, CLIP, seed=9, gelu="tanh", **changes).eval()
    targets = model.state_dict()
    shapes = {key: tensor.shape for key, tensor in targets.items()}
    for key, tensor in image.state_dict().items():
        made = from_image(key, tensor, shapes, how, factorised=name.endswith("m3"))
        for wanted, (value, _) in made.items():
            targets[wanted].copy_(value)
    return model


def how(**choices: object) -> ImageInit:
    return ImageInit.model_validate({"run": "somewhere", **choices})


def reference(model: JointModel, *, class_key: float = 0.0, own_heads: int = 0) -> Tensor:
    """The logits of an image model, written out, with two changes to its attention.

    Args:
        model: with `pool` class_token or mean.
        class_key: is added to every logit of the first token as a key.
        own_heads: in so many heads every token attends to itself alone.
    """
    state = model.state_dict()
    kernel = state["tokenizer.tubes.0.weight"][:, :, 0]
    tokens = F.conv2d(PHOTO[:, :, 0], kernel, state["tokenizer.tubes.0.bias"], stride=8).flatten(2).mT
    tokens = tokens + state["places.weight"].flatten(0, 2)
    has_class = "places.class_token" in state
    if has_class:
        first = (state["places.class_token"] + state["places.class_place"]).expand(len(tokens), 1, -1)
        tokens = torch.cat([first, tokens], dim=1)

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, (32,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=-1)
        outputs = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            logits = q[..., part] @ k[..., part].mT / math.sqrt(8)
            logits[..., 0] += class_key
            weights = logits.softmax(dim=-1)
            if head < own_heads:
                weights = torch.eye(tokens.shape[1]).expand_as(weights)
            outputs.append(weights @ v[..., part])
        tokens = tokens + linear(f"{block}.attn.proj", torch.cat(outputs, dim=-1))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)), approximate="tanh")
        tokens = tokens + linear(f"{block}.mlp.fc2", hidden)
    tokens = norm("norm", tokens)
    return linear("heads.source", tokens[:, 0] if has_class else tokens.mean(dim=1))


@pytest.mark.parametrize("tubelet", ["central", "inflated"])
@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vivit_ti_m1", "mean"),
        ("vivit_ti_m3", "mean"),
        ("vivit_ti_avgpool", "mean"),
        ("vivit_ti_avgpool", "class_token"),
    ],
)
def test_logits_are_those_of_the_image(name: str, pool: str, tubelet: str) -> None:
    """No class token among many copies of the patches, or one for every time."""
    image = image_model(pool)
    video = start(name, image, how(tubelet=tubelet), pool=pool)
    expected = image({"source": PHOTO})["source"]
    torch.testing.assert_close(expected, reference(image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(video({"source": REPEATED})["source"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tubelet", ["central", "inflated"])
def test_model_1_with_a_class_token(tubelet: str) -> None:
    """Every patch stands there four times, so the class token is a key with its logit lowered by ln 4."""
    image = image_model("class_token")
    logits = start("vivit_ti_m1", image, how(tubelet=tubelet))({"source": REPEATED})["source"]
    expected = reference(image, class_key=-math.log(TIMES))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, reference(image), atol=1e-3)


def test_model_2_has_the_image_s_vector_at_every_time() -> None:
    image = image_model("class_token")
    video = start("vivit_ti_m2", image, how())
    frames = video.frame_features(video.read({"source": REPEATED}, None))  # type: ignore[operator]
    wanted = image.features(image.read({"source": PHOTO}, None))  # type: ignore[operator]
    expected = wanted.repeat_interleave(TIMES, dim=0)
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)


def test_model_4_attends_to_itself_along_time() -> None:
    image = image_model("mean")
    logits = start("vivit_ti_m4", image, how())({"source": REPEATED})["source"]
    torch.testing.assert_close(logits, reference(image, own_heads=2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, reference(image), atol=1e-3)


def test_timesformer_begins_as_the_image_model_does() -> None:
    image = image_model("class_token")
    expected = image({"source": PHOTO})["source"]
    for scheme in ("divided", "space"):
        logits = start(f"timesformer_ti_{scheme}", image, how())({"source": REPEATED})["source"]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_model_3_with_output_at_zero_is_spatial_only_and_its_kernels_move() -> None:
    """On any clip, before the first step; after it the temporal output has moved, after two all kernels."""
    image, clip = image_model("mean"), pixels(CLIP)["source"]
    model = start("vivit_ti_m3", image, how())
    spatial = start("vivit_ti_avgpool", image, how(), pool="mean")
    torch.testing.assert_close(
        model({"source": clip})["source"], spatial({"source": clip})["source"], rtol=1e-4, atol=1e-4
    )
    before, moved = steps(model, clip, 1)
    temporal = [name for name in before if "temporal_attn" in name and name.endswith("weight")]
    assert [name for name in temporal if name in moved] == [n for n in temporal if ".proj." in n]
    assert not torch.allclose(model({"source": clip})["source"], spatial({"source": clip})["source"])
    _, moved = steps(model, clip, 1)
    assert set(temporal) <= moved


def test_model_3_with_everything_at_zero_never_learns_time() -> None:
    """The paper's literal text: all gradients of the temporal kernels are exactly zero, for ever."""
    model, clip = start("vivit_ti_m3", image_model("mean"), how(zero="all")), pixels(CLIP)["source"]
    before, moved = steps(model, clip, 20)
    kernels = [name for name in before if "temporal_attn" in name and name.endswith("weight")]
    assert kernels
    assert not moved.intersection(kernels)
    assert all(model.get_parameter(name).abs().sum() == 0 for name in kernels)
    assert "blocks.0.attn.qkv.weight" in moved


def steps(model: JointModel, clip: Tensor, count: int) -> tuple[dict[str, Tensor], set[str]]:
    """Train by gradient descent; the weights before, and the names of those that moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model({"source": clip})["source"], torch.tensor([0, 3])).backward()
        optimizer.step()
    return before, {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}


def test_copied_temporal_attention_is_that_of_space() -> None:
    image = image_model("mean")
    state = start("vivit_ti_m3", image, how(zero="none")).state_dict()
    for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
        assert torch.equal(
            state[f"blocks.1.temporal_attn.{part}"], image.state_dict()[f"blocks.1.attn.{part}"]
        )


def test_random_tubelets_stay_what_they_are() -> None:
    image = image_model("mean")
    own = make("vivit_ti_m1", CLIP, seed=9, pool="mean").state_dict()
    state = start("vivit_ti_m1", image, how(tubelet="random"), pool="mean").state_dict()
    assert torch.equal(state["tokenizer.tubes.0.weight"], own["tokenizer.tubes.0.weight"])
    assert torch.equal(state["blocks.0.attn.qkv.weight"], image.state_dict()["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(("frames", "middle"), [(2, 1), (3, 1), (4, 2)])
def test_the_middle_frame_is_the_one_that_is_read(frames: int, middle: int) -> None:
    kernel = torch.randn(4, 3, 1, 8, 8)
    wanted = {"tokenizer.tubes.0.weight": torch.Size([4, 3, frames, 8, 8])}
    ((made, _),) = from_image(*("tokenizer.tubes.0.weight", kernel), wanted, how(), factorised=False).values()
    assert torch.equal(made[:, :, middle], kernel[:, :, 0])
    assert made.count_nonzero() == kernel.count_nonzero()


def test_places_are_repeated_interpolated_or_zoomed() -> None:
    places = torch.randn(1, 2, 2, 3)
    repeated, words = resize_places(places, torch.Size([4, 2, 2, 3]))
    assert words == "repeated over time"
    assert all(torch.equal(repeated[time], places[0]) for time in range(4))
    larger, words = resize_places(places, torch.Size([4, 4, 4, 3]))
    assert words == "interpolated and repeated over time"
    assert torch.equal(larger[0, 0, 0], places[0, 0, 0]), "beyond the outer centres nothing changes"
    torch.testing.assert_close(larger[2, 0, 1], 0.75 * places[0, 0, 0] + 0.25 * places[0, 0, 1])
    zoomed, words = resize_places(places, torch.Size([4, 2, 2, 3]), "resized")
    assert words == "zoomed as a square"
    square = resize_places(places, torch.Size([1, 4, 4, 3]))[0]
    assert torch.equal(zoomed.flatten(0, 2), square.flatten(0, 2))
    times = torch.arange(4.0).view(4, 1)
    torch.testing.assert_close(resize_places(times, torch.Size([2, 1]))[0], torch.tensor([[0.5], [2.5]]))
    with pytest.raises(RecipeError, match="3 x 2 x 2 is none"):
        resize_places(places, torch.Size([3, 2, 2, 3]), "resized")


def test_patches_of_another_size_are_refused() -> None:
    wanted = {"tokenizer.tubes.0.weight": torch.Size([4, 3, 2, 16, 16])}
    with pytest.raises(RecipeError, match="Take an image model with the same patches"):
        from_image("tokenizer.tubes.0.weight", torch.zeros(4, 3, 1, 8, 8), wanted, how(), factorised=False)
