"""TubeViT: one forward pass for images and videos, gradients, noise, checkpointing and the state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models import InputSpec, TubeViT, build_model, model_names
from framework.models.layers import Attention, Block
from framework.recipe.schema import Model, Tube

TUBES = (
    Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
    Tube(kernel=(8, 4, 4), stride=(3, 16, 16), offset=(2, 4, 4), space_to_depth=(1, 2, 2)),
    Tube(kernel=(2, 6, 6), stride=(8, 16, 16), offset=(0, 8, 8)),
    Tube(kernel=(1, 8, 8), stride=(16, 8, 8)),
)
INPUTS = {
    "clips": InputSpec("video", 16, 32, 5),
    "photos": InputSpec("image", 1, 32, 7),
    "long": InputSpec("video", 32, 32, 3),
}


def tiny(**changes: object) -> TubeViT:
    torch.manual_seed(0)
    options = {"name": "tubevit_ti", "width": 48, "depth": 3, "tubes": TUBES, **changes}
    model = build_model(Model.model_validate(options), INPUTS)
    assert isinstance(model, TubeViT)
    return model


def pixels(seed: int = 0, **samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(
            0, 256, (count, 3, INPUTS[name].frames, 32, 32), dtype=torch.uint8, generator=generator
        )
        for name, count in samples.items()
    }


def seeds_for(clips: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.arange(len(clip)) + 1000 * number for number, (name, clip) in enumerate(clips.items())
    }


def loss_of(logits: dict[str, Tensor]) -> Tensor:
    """A loss whose gradient differs from class to class and from sample to sample."""
    total = torch.zeros(())
    for value in logits.values():
        labels = torch.arange(len(value)) % value.shape[1]
        total = total + nn.functional.cross_entropy(value, labels)
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, "attention") for name in model_names("tubevit")), ("tubevit_ti", "mean")]
)
def test_gradients_reach_every_parameter_in_a_joint_step(name: str, pool: str) -> None:
    torch.manual_seed(0)
    model = build_model(
        Model.model_validate({"name": name, "depth": 2, "tubes": TUBES, "pool": pool}), INPUTS
    )
    found = gradients(model, loss_of(model(pixels(clips=2, photos=2, long=1))))
    assert set(found) == {parameter for parameter, _ in model.named_parameters()}
    assert [parameter for parameter, gradient in found.items() if not gradient.any()] == []


def test_gradients_reach_every_tube_of_the_paper() -> None:
    model = build_model(
        Model(name="tubevit_ti", depth=1),
        {"video": InputSpec("video", 32, 224, 4), "image": InputSpec("image", 1, 224, 4)},
    )
    clips = {
        name: torch.randint(0, 256, (1, 3, frames, 224, 224), dtype=torch.uint8)
        for name, frames in (("video", 32), ("image", 1))
    }
    found = gradients(model, loss_of(model(clips)))
    assert all(gradient.any() for gradient in found.values())
    assert set(found) == {parameter for parameter, _ in model.named_parameters()}


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("position", ["fixed", "none"])
def test_joint_forward_equals_separate_forwards(pool: str, position: str) -> None:
    model = tiny(pool=pool, position=position)
    if pool == "attention":
        nn.init.normal_(model.pool.query)
    clips = pixels(photos=3, long=1, clips=2)
    joint = model(clips)
    assert {name: tuple(value.shape) for name, value in joint.items()} == {
        "clips": (2, 5),
        "photos": (3, 7),
        "long": (1, 3),
    }
    for name, clip in clips.items():
        for row in range(len(clip)):
            alone = model({name: clip[row : row + 1]})
            torch.testing.assert_close(alone[name][0], joint[name][row], atol=1e-5, rtol=1e-5)


def test_an_image_is_the_one_frame_case_of_a_video() -> None:
    """A video of one frame, read by the flat tube alone, gives what the image gives."""
    inputs = {"clips": INPUTS["clips"], "photos": InputSpec("image", 1, 32, 5)}
    options = {"name": "tubevit_ti", "width": 48, "depth": 2}
    model = build_model(Model.model_validate({**options, "tubes": TUBES}), inputs)
    flat = build_model(Model.model_validate({**options, "tubes": TUBES[3:]}), inputs)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer")}
    flat.load_state_dict(
        {
            **state,
            **{
                f"tokenizer.tubes.0.{key}": model.state_dict()[f"tokenizer.tubes.3.{key}"]
                for key in ("weight", "bias")
            },
        }
    )
    flat.heads["clips"].load_state_dict(flat.heads["photos"].state_dict())
    image = pixels(photos=2)["photos"]
    # of 16 frames the flat tube with a temporal stride of 16 reads the first
    video = torch.cat([image, pixels(1, clips=2)["clips"][:, :, 1:]], dim=2)
    expected = model({"photos": image})["photos"]
    torch.testing.assert_close(flat({"clips": video})["clips"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flat({"clips": image})["clips"], expected, atol=1e-6, rtol=1e-5)


def test_order_of_frames_matters_to_tubes() -> None:
    model = tiny()
    clip = pixels(clips=1)["clips"]
    forward, backward = model({"clips": clip})["clips"], model({"clips": clip.flip(2)})["clips"]
    assert (forward - backward).abs().max() > 1e-3


def test_floats_are_taken_as_normalised() -> None:
    model = tiny()
    clips = pixels(clips=2)
    normalised = {"clips": clips["clips"].float() / 127.5 - 1}
    torch.testing.assert_close(model(clips)["clips"], model(normalised)["clips"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "noise", [{"stochastic_depth": 0.5}, {"dropout": 0.3}, {"stochastic_depth": 0.3, "dropout": 0.2}]
)
def test_noise_does_not_depend_on_the_split_or_order_of_a_batch(noise: dict[str, float]) -> None:
    model = tiny(**noise).train()
    clips = pixels(clips=4, photos=6)
    seeds = seeds_for(clips)
    whole = model(clips, seeds)
    quiet = model(clips)
    assert (whole["clips"] - quiet["clips"]).abs().max() > 1e-3
    for name in clips:
        for rows in ([2], [3, 1], [0, 2, 3]):
            part = model({name: clips[name][rows]}, {name: seeds[name][rows]})
            torch.testing.assert_close(part[name], whole[name][rows], atol=1e-5, rtol=1e-5)
    torch.manual_seed(99)  # no generator is asked
    assert torch.equal(model(clips, seeds)["clips"], whole["clips"])
    other = model(clips, {name: value + 1 for name, value in seeds.items()})
    assert (other["clips"] - whole["clips"]).abs().max() > 1e-3


def test_noise_is_off_in_evaluation_and_without_seeds() -> None:
    model, clips = tiny(stochastic_depth=0.5, dropout=0.3), pixels(clips=2)
    without = model.train()(clips)["clips"]
    assert torch.equal(model.eval()(clips, seeds_for(clips))["clips"], without)
    assert torch.equal(model(clips)["clips"], without)


def test_a_dropped_branch_adds_nothing() -> None:
    block, tokens = Block(32, 4, 64), torch.randn(6, 32)
    groups = ((2, 3),)
    nothing, all_of_it = torch.zeros(2, 6, 1), torch.ones(2, 6, 1)
    assert torch.equal(block(tokens, groups, nothing), tokens)
    torch.testing.assert_close(block(tokens, groups, all_of_it), block(tokens, groups))


@pytest.mark.parametrize("noise", [{}, {"stochastic_depth": 0.5}, {"stochastic_depth": 0.3, "dropout": 0.2}])
def test_activation_checkpointing_gives_the_same_gradients(noise: dict[str, float]) -> None:
    model = tiny(**noise).train()
    clips = pixels(clips=2, photos=3)
    seeds = seeds_for(clips)
    expected = gradients(model, loss_of(model(clips, seeds)))
    calls = [0]
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.activation_checkpointing = True
    found = gradients(model, loss_of(model(clips, seeds)))
    assert calls[0] == 2 * len(model.blocks)  # computed a second time
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_attention_stays_inside_a_sample_and_matches_torch() -> None:
    torch.manual_seed(0)
    attention, reference = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3)
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.load_state_dict(attention.proj.state_dict())
    first, second = torch.randn(2, 5, 32), torch.randn(3, 4, 32)
    together = attention(torch.cat([first.flatten(0, 1), second.flatten(0, 1)]), ((2, 5), (3, 4)))
    for part, tokens in zip(together.split([10, 12]), (first, second), strict=True):
        expected = reference(tokens, tokens, tokens, need_weights=False)[0]
        torch.testing.assert_close(part.view_as(tokens), expected, atol=1e-5, rtol=1e-5)


def test_attention_pooling_is_multi_head_attention_with_one_query() -> None:
    torch.manual_seed(0)
    model, reference = tiny(heads=4), nn.MultiheadAttention(48, 4, batch_first=True)
    query = torch.randn(48)
    tokens = torch.randn(2, 9, 48)
    key = reference.in_proj_weight[48:96].view(4, 12, 48)
    with torch.no_grad():
        reference.out_proj.weight.copy_(torch.eye(48))
        projected = (reference.in_proj_weight[:48] @ query).view(4, 12)
        # ours scales by the whole width, not by that of a head
        model.pool.query.copy_(torch.einsum("ho,how->hw", projected, key) * (48 / 12) ** 0.5)
        model.pool.value.weight.copy_(reference.in_proj_weight[96:])
    expected = reference(query.expand(2, 1, 48), tokens, tokens, need_weights=False)[0][:, 0]
    found = model.pool(tokens.flatten(0, 1), ((2, 9),))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_state_dict_goes_through_a_file(tmp_path: object) -> None:
    model, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    file = f"{tmp_path}/weights.pt"
    torch.save(model.state_dict(), file)
    other.load_state_dict(torch.load(file, weights_only=True))
    clips = pixels(clips=2, photos=2)
    assert torch.equal(model(clips)["photos"], other(clips)["photos"])
    assert torch.equal(copy.deepcopy(model)(clips)["clips"], model(clips)["clips"])


def test_bf16_weights_take_bytes_and_give_float32_logits() -> None:
    model, clips = tiny(stochastic_depth=0.2, dropout=0.1), pixels(clips=2, photos=2)
    expected = model(clips)
    found = model.to(torch.bfloat16)(clips)
    for name, logits in found.items():
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected[name], atol=0.05, rtol=0.05)
    gradients(model.train(), loss_of(model(clips, seeds_for(clips))))


def test_weight_decay_spares_vectors_and_the_query() -> None:
    model = tiny()
    spared = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        assert (name in spared) == (parameter.ndim == 1 or name == "pool.query")


def test_blocks_compile_and_agree() -> None:
    model, clips = tiny(depth=2, stochastic_depth=0.5, dropout=0.2).train(), pixels(clips=2, photos=2)
    seeds = seeds_for(clips)
    expected = model(clips, seeds)
    for block in model.blocks:
        # without a code generator: what is proved is that the whole block is one graph
        block.compile(fullgraph=True, backend="aot_eager")
    found = model(clips, seeds)
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected[name], atol=1e-5, rtol=1e-5)
    loss_of(found).backward()


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({"films": torch.zeros(1, 3, 16, 32, 32)}, "unknown source films.*clips, photos, long"),
        ({}, "no source"),
        ({"clips": torch.zeros(1, 16, 3, 32, 32)}, "source clips: pixels must be"),
        ({"clips": torch.zeros(3, 16, 32, 32)}, "source clips: pixels must be"),
        ({"clips": torch.zeros(1, 3, 4, 32, 32)}, "source clips: tube 1 of 4.*sub-tubes of 4 frames"),
    ],
)
def test_inputs_that_do_not_fit(clips: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny()(clips)
