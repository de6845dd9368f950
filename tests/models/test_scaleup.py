"""Scale-up: bridged tubes, the frozen beginning, and the gate (TubeViT §3.6)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from framework.errors import ModelError, RecipeError
from framework.models.inputs import InputSpec
from framework.models.layers import Block
from framework.models.registry import build_model, size_of
from framework.models.scaleup import BridgedTokenizer, ScaledTubeViT, find_bridge
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import centres, grids_of, sub_stride
from framework.models.tubevit import TubeViT
from framework.recipe.schema import Model, ScaleUp, Tube
from framework.recipe.tube_sets import PAPER_TUBES
from framework.training.optim import parameter_groups

TUBES = (
    Tube(kernel=(2, 8, 8), stride=(4, 16, 16)),
    Tube(kernel=(4, 4, 4), stride=(2, 16, 16), offset=(1, 2, 2), space_to_depth=(1, 2, 2)),
    Tube(kernel=(1, 8, 8), stride=(4, 8, 8)),
)
CLIP = (8, 32, 32)
INPUTS = {"clips": InputSpec("video", 8, 32, 5), "pictures": InputSpec("image", 1, 32, 7)}
WIDTH, TUBE_WIDTH = 48, 12


def make(**options: Any) -> ScaledTubeViT:
    """A small model with a scale-up, drawn from one seed."""
    torch.manual_seed(0)
    position, pool = options.pop("position", "fixed"), options.pop("pool", "attention")
    section = ScaleUp(**{"tube_width": TUBE_WIDTH, "frozen_layers": 2, **options})
    model = Model(
        name="tubevit_ti", width=WIDTH, depth=4, heads=4, tubes=TUBES, position=position, pool=pool,
        dropout=0.1, stochastic_depth=0.3, scale_up=section,
    )  # fmt: skip
    built = build_model(model, INPUTS)
    assert isinstance(built, ScaledTubeViT)
    return built


def pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(
            0, 256, (2, 3, spec.frames, 32, 32), dtype=torch.uint8, generator=generator
        )
        for name, spec in INPUTS.items()
    }  # fmt: skip


SEEDS = {"clips": torch.tensor([3, 4]), "pictures": torch.tensor([5, 6])}


@pytest.mark.parametrize("width", [12, 24, 36, 48, 16, 20, 44])
def test_sub_tokens_are_what_the_small_tubes_make_of_moved_clips(width: int) -> None:
    small = TubeTokenizer(TUBES, TUBE_WIDTH, position="none")
    large = BridgedTokenizer(TUBES, width, tube_width=TUBE_WIDTH, clips=[CLIP], position="none")
    for number in (0, 1):
        large.tubes[number].load_state_dict(small.tubes[number].state_dict())
    clip = pixels()["clips"]
    (ours,), (theirs,) = large.tokens([clip]), small.tokens([clip])
    videos = sum(grid.tokens for grid in small.grids(CLIP)[:2])
    assert ours.shape[:2] == theirs.shape[:2], "as many tokens as before"
    assert torch.equal(ours[:, :videos, :TUBE_WIDTH], theirs[:, :videos])
    for number, grid in enumerate(small.grids(CLIP)[:2]):
        start = number * small.grids(CLIP)[0].tokens
        for part, place in enumerate(large.bridges[number].places()):
            moved = F.pad(clip.double(), [0, 20, 0, 20, 0, 20], mode="replicate").to(torch.uint8)
            moved = moved[:, :, place[0] :, place[1] :, place[2] :][:, :, :8, :32, :32]
            (expected,) = small.read_tube(number, [moved], [grid.shape])
            channels = slice(part * TUBE_WIDTH, min((part + 1) * TUBE_WIDTH, width))
            found = ours[:, start : start + grid.tokens, channels]
            assert torch.equal(found, expected[..., : found.shape[-1]])
    assert math.prod(large.bridges[0].counts) == math.ceil(width / TUBE_WIDTH)


def test_positions_are_centres_of_all_sub_tokens() -> None:
    tokenizer = BridgedTokenizer(TUBES, WIDTH, tube_width=TUBE_WIDTH, clips=[CLIP])
    for number, bridge in tokenizer.bridges.items():
        grid = tokenizer.grids(CLIP)[number]
        places = torch.tensor(list(bridge.places()), dtype=torch.float64)
        expected = centres(TUBES[number], grid.shape) + places.mean(0)
        assert torch.equal(centres(bridge.union(TUBES[number]), grid.shape), expected)


@pytest.mark.parametrize("frames", [32, 64])
@pytest.mark.parametrize(("small", "large"), [(192, 768), (384, 768), (768, 1024), (768, 1280)])
def test_the_tubes_of_the_paper_are_bridged_inside_the_clip(frames: int, small: int, large: int) -> None:
    clip, parts = (frames, 224, 224), math.ceil(large / small)
    for grid in grids_of(PAPER_TUBES, clip)[:3]:
        tube = PAPER_TUBES[grid.tube]
        bridge = find_bridge(PAPER_TUBES, grid.tube, parts, [clip, (1, 224, 224)])
        assert len(set(bridge.places())) == parts
        last = torch.tensor(tube.offset) + (torch.tensor(grid.shape) - 1) * torch.tensor(tube.stride)
        inside = (torch.tensor(tube.space_to_depth) - 1) * torch.tensor(sub_stride(tube))
        ends = last + inside + torch.tensor(list(bridge.places())).amax(0) + torch.tensor(tube.kernel)
        beyond = (ends - torch.tensor(clip)).clamp(min=0) / torch.tensor(tube.kernel)
        assert beyond.max() <= ({64: 1 / 16, 32: 3 / 16}[frames] if parts == 2 else 1), (grid.tube, bridge)


def test_gate_is_shut_at_the_start() -> None:
    gated, plain = make(), make(gate="none")
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if k != "gate.alpha"})
    for mode in (True, False):
        ours, theirs = gated.train(mode)(pixels(), SEEDS), plain.train(mode)(pixels(), SEEDS)
        assert all(torch.equal(ours[name], theirs[name]) for name in INPUTS)


@pytest.mark.parametrize("pool", ["attention", "class_token"])
@pytest.mark.parametrize("gate_input", ["after_position", "before_position"])
@pytest.mark.parametrize("gate", ["scalar", "channel"])
@torch.no_grad()
def test_gate_formula_against_the_plain_one(gate: str, gate_input: str, pool: str) -> None:
    model = make(gate=gate, gate_input=gate_input, pool=pool).eval()
    alpha = torch.linspace(-1, 1, model.gate.alpha.numel()) if gate == "channel" else torch.tensor([0.7])  # type: ignore[union-attr]
    model.gate.alpha.copy_(alpha)  # type: ignore[union-attr]
    clips = pixels()["clips"]
    groups: tuple[tuple[int, int], ...] = ((2, sum(g.tokens for g in model.tokenizer.grids(CLIP))),)
    tokens, first = model.tokenizer([clips]), model.tokenizer([clips])
    if gate_input == "before_position":
        first = model.tokenizer.tokens([clips])[0].flatten(0, 1)
    if model.class_token is not None:
        first, _ = model.class_token(first, groups)
        tokens, groups = model.class_token(tokens, groups)
    for block in model.blocks[:2]:
        tokens = block(tokens, groups)
    third = model.blocks[2]
    assert isinstance(third, Block)
    middle = tokens + third.attn(third.norm1(tokens), groups)  # y_s
    tokens = third.mlp(third.norm2(middle)) + middle + torch.tanh(alpha) * first
    tokens = model.blocks[3](tokens, groups)
    expected = model.heads["clips"](model.pool(model.norm(tokens), groups))
    assert torch.allclose(model({"clips": clips})["clips"], expected, atol=1e-5)


def test_gate_is_no_dead_start_and_tells_how_far_it_is_open() -> None:
    model = make().train()
    model(pixels())["clips"].square().sum().backward()
    assert model.gate is not None
    assert model.gate.alpha.grad is not None
    assert model.gate.alpha.grad.abs() > 0
    assert model.telemetry() == {"gate/tanh_alpha": 0.0, "gate/ratio": 0.0}
    with torch.no_grad():
        model.gate.alpha.fill_(0.5)
    model(pixels())
    told = model.telemetry()
    assert told["gate/tanh_alpha"] == pytest.approx(math.tanh(0.5))
    assert 0 < told["gate/ratio"] < 2


def test_only_what_comes_after_the_frozen_blocks_is_trained() -> None:
    model = make(pool="class_token").train()
    model(pixels(), SEEDS)["clips"].sum().backward()
    frozen = ("tokenizer.", "class_token.", "blocks.0.", "blocks.1.")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
        assert parameter.grad is None or parameter.requires_grad
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]  # type: ignore[union-attr]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert "gate.alpha" in model.no_weight_decay()


def test_no_noise_falls_on_what_is_frozen() -> None:
    entered = []
    model = make().train()
    model.blocks[2].register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    model(pixels(), SEEDS)
    model(pixels(), {name: seeds + 10 for name, seeds in SEEDS.items()})
    assert torch.equal(*entered)
    assert not entered[0].requires_grad


def test_everything_may_be_trained() -> None:
    model = make(frozen_layers=0, train_tokenizer=True).train()
    sum(logits.sum() for logits in model(pixels(), SEEDS).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.parameters())
    assert model.tokenizer.tubes[0].weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_as_wide_as_the_small_model_it_is_a_plain_tubevit() -> None:
    scaled = make(tube_width=WIDTH, gate="none").eval()
    plain = TubeViT(size_of(Model(name="tubevit_ti", width=WIDTH, depth=4, heads=4)), TUBES, INPUTS).eval()
    plain.load_state_dict(scaled.state_dict())
    ours, theirs = scaled(pixels()), plain(pixels())
    assert all(torch.equal(ours[name], theirs[name]) for name in INPUTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tube_width": 96}, r"tube_width is 96, more than the model's width of 48"),
        ({"tube_width": 10}, r"tube 2 of 3 .* does not divide the model's width of 10"),
        ({"frozen_layers": 4}, r"frozen_layers is 4 of 4 layers; at most 3: the gate needs"),
        ({"frozen_layers": 5, "gate": "none"}, r"at most 4: the model has no more"),
        ({"position": "learned"}, r"learned does not go with"),
        ({"tube_width": 1}, r"divide the model's width of 1"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ModelError, RecipeError), match=words) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_of_tubes_that_fill_the_clip_the_last_rows_are_repeated() -> None:
    tubes = (Tube(kernel=(4, 8, 8), stride=(4, 8, 8)),)
    clip = torch.randint(0, 256, (1, 3, 8, 16, 16), dtype=torch.uint8)
    tokenizer = BridgedTokenizer(tubes, 16, tube_width=4, clips=[(8, 16, 16)], position="none")
    assert tokenizer.bridges[0].counts == (1, 2, 2)
    (tokens,) = tokenizer.tokens([clip])
    assert tokens.shape == (1, 2 * 2 * 2, 16)


def test_frozen_blocks_cost_their_forward_pass_only() -> None:
    operations = []
    whole = {"frozen_layers": 0, "train_tokenizer": True, "gate": "none"}
    for options in (whole, {"frozen_layers": 3}):
        model = make(**options).train()
        with FlopCounterMode(display=False) as counter:
            model(pixels())["clips"].sum().backward()
        operations.append(counter.get_total_flops())
    # forward 1 and backward 2 for each block, and a little for pooling and tubes
    assert operations[1] / operations[0] == pytest.approx((1 + 2 * 1 / 4) / 3, abs=0.03)
