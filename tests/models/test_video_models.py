"""ViT, ViViT, TimeSformer, VideoMAE and MTV: the contract that every model keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from video_models import INPUTS, MODELS, SECTION, VIEWS, make, pixels, section, shake

from framework.errors import ModelError, RecipeError
from framework.models import InputSpec, build_model, model_names
from framework.models.mtv import MTV
from framework.models.registry import build_tokenizer
from framework.models.video_model import VideoModel


@pytest.mark.parametrize("name", MODELS)
def test_sources_together_are_the_sources_alone(name: str) -> None:
    model = make(name).eval()
    shake(model)
    clips = pixels()
    together = model(clips)
    assert {source: tuple(logits.shape) for source, logits in together.items()} == {
        source: (2, spec.classes) for source, spec in INPUTS.items()
    }
    for source, clip in clips.items():
        alone = model({source: clip[1:]})[source]
        torch.testing.assert_close(alone, together[source][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(name: str, checkpointing: bool) -> None:
    model = make(name, stochastic_depth=0.2)
    shake(model)
    model.activation_checkpointing = checkpointing
    seeds = {source: torch.arange(2) + number for number, source in enumerate(INPUTS)}
    sum(logits.square().sum() for logits in model(pixels(), seeds).values()).backward()  # type: ignore[union-attr]
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", MODELS)
def test_weights_survive_a_file(name: str, tmp_path: Path) -> None:
    model, other = make(name).eval(), make(name, seed=5).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert not torch.equal(model(pixels())["clips"], other(pixels())["clips"])
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(model(pixels())["clips"], other(pixels())["clips"])


@pytest.mark.parametrize("name", MODELS)
def test_cost_is_what_torch_counts(name: str) -> None:
    for source, spec in INPUTS.items():
        model = make(name, {source: spec}).eval()
        assert isinstance(model, VideoModel | MTV)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model({source: torch.zeros(1, 3, spec.frames, spec.size, spec.size)})
        assert 2 * model.work(spec).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_stochastic_depth_is_applied_and_belongs_to_the_sample(name: str) -> None:
    model = make(name, stochastic_depth=0.5)
    shake(model)
    clips = pixels(samples=4)
    clips = {source: clip[:1].expand(4, -1, -1, -1, -1) for source, clip in clips.items()}
    seeds = {source: torch.tensor([11, 12, 13, 11]) + 100 * n for n, source in enumerate(INPUTS)}
    with torch.no_grad():
        dropped = model(clips, seeds)
        whole = model(clips)
        alone = model({"clips": clips["clips"][2:]}, {"clips": seeds["clips"][2:]})
    for source, logits in dropped.items():
        assert not torch.allclose(logits, whole[source], atol=1e-4), "something is dropped"
        torch.testing.assert_close(logits[0], logits[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped["clips"][0], dropped["clips"][1], atol=1e-4)
    torch.testing.assert_close(alone["clips"], dropped["clips"][2:], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        evaluated = model.eval()(clips, seeds)
    torch.testing.assert_close(evaluated["clips"], whole["clips"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vivit_ti_m3", "timesformer_ti_divided"])
def test_each_of_three_branches_is_dropped_by_itself(name: str) -> None:
    """At a rate near 1 the last block does nothing for nearly any sample, whatever its branches are."""
    inputs = {"clips": INPUTS["clips"]}
    model = make(name, inputs, stochastic_depth=0.999)
    shake(model)
    clips = pixels(inputs)
    before = model(clips, {"clips": torch.tensor([1, 2])})["clips"]
    last = list(model.children())[[n for n, _ in model.named_children()].index("blocks")][-1]  # type: ignore[index]
    shake(last)
    after = model(clips, {"clips": torch.tensor([1, 2])})["clips"]
    assert torch.equal(before, after)
    assert not torch.equal(model(clips)["clips"], before)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_floats_are_the_same_clip(name: str) -> None:
    model = make(name).eval()
    raw = {k: ((v + 1) * 127.5).round().to(torch.uint8) for k, v in pixels().items()}
    normalised = {k: v.float() * (2 / 255) - 1 for k, v in raw.items()}
    for source, logits in model(raw).items():
        torch.testing.assert_close(logits, model(normalised)[source], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_places_vectors_and_class_tokens_do_not_decay(name: str) -> None:
    model = make(name)
    spared = model.no_weight_decay()
    for parameter_name, parameter in model.named_parameters():
        learned_place = "places." in parameter_name or "times." in parameter_name
        assert (parameter_name in spared) == (parameter.ndim <= 1 or learned_place)


@pytest.mark.parametrize("name", ["vivit_ti_m1", "vivit_ti_m2", "timesformer_ti_divided", "mtv_b"])
def test_a_clip_that_is_larger_than_the_places_is_refused(name: str) -> None:
    model = make(name, {"clips": INPUTS["clips"]})
    with pytest.raises(ModelError, match="places were learned"):
        model({"clips": torch.zeros(1, 3, 16, 32, 32)})
    with pytest.raises(ModelError, match="pixels of height"):
        model({"clips": torch.zeros(1, 3, 8, 40, 32)})


@pytest.mark.parametrize("name", MODELS)
def test_wrong_input_is_named(name: str) -> None:
    model = make(name)
    with pytest.raises(ModelError, match="unknown source others"):
        model({"others": torch.zeros(1, 3, 8, 32, 32)})
    with pytest.raises(ModelError, match="source clips: pixels must be"):
        model({"clips": torch.zeros(1, 1, 8, 32, 32)})
    with pytest.raises(ModelError, match="source tiny: tube 1 of 1"):
        make(name, {**INPUTS, "tiny": InputSpec("video", 8, 4, 2)})


def test_an_image_is_a_clip_of_one_tubelet() -> None:
    inputs = {"clips": InputSpec("video", 2, 32, 5), "photos": InputSpec("image", 1, 32, 5)}
    model = make("vivit_ti_m2", inputs).eval()
    model.heads["photos"].load_state_dict(model.heads["clips"].state_dict())
    image = pixels(inputs)["photos"]
    logits = model({"photos": image, "clips": image.expand(-1, -1, 2, -1, -1)})
    torch.testing.assert_close(logits["photos"], logits["clips"])


def test_uniform_frame_sampling_reads_the_middle_frames_alone() -> None:
    inputs = {"clips": INPUTS["clips"]}
    model = make("vivit_ti_m1", inputs, embedding="frames", tubelet=[4, 8, 8]).eval()
    assert model.get_parameter("tokenizer.tubes.0.weight").shape == (32, 3, 1, 8, 8)
    clip = pixels(inputs)["clips"]
    other = clip.clone()
    other[:, :, [0, 1, 3, 4, 5, 7]] = 0  # read are 2 and 6
    assert torch.equal(model({"clips": clip})["clips"], model({"clips": other})["clips"])
    other[:, :, 6] = 0
    assert not torch.equal(model({"clips": clip})["clips"], model({"clips": other})["clips"])


def test_order_of_model_3() -> None:
    inputs = {"clips": INPUTS["clips"]}
    space, time = (make("vivit_ti_m3", inputs, order=o).eval() for o in ("space_time", "time_space"))
    time.load_state_dict(space.state_dict())
    assert not torch.allclose(space(pixels(inputs))["clips"], time(pixels(inputs))["clips"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vivit_ti_m4", {"width": 30, "heads": 3}, "model 4 needs an even number"),
        ("mtv_b", {"global_heads": 5}, "global_heads 5 do not divide 48"),
        (
            "mtv_b",
            {"views": [{**VIEWS[0], "heads": 3}]},
            r"model.views.0: width 32 cannot be cut into 3 heads",
        ),
        ("vivit_ti_m1", {"stochastic_depth": 1.0}, "stochastic_depth must be smaller than 1"),
        ("videomae_ti", {"pretrain": {"ratio": 0.01}}, "masks 0 of 16 places"),
        (
            "videomae_ti",
            {"pretrain": {"decoder_width": 30, "decoder_heads": 4}},
            "cannot be cut into 4 heads",
        ),
    ],
)
def test_models_that_cannot_be(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_model(section(name, **changes), {"clips": INPUTS["clips"]})


def test_mtv_begins_without_fusion_and_learns_it() -> None:
    """The last layer of the cross-view attention starts at zero, and gets a gradient at once."""
    inputs = {"clips": INPUTS["clips"]}
    fused, apart = make("mtv_b", inputs), make("mtv_b", inputs, fusion_layers=[])
    apart.load_state_dict({k: v for k, v in fused.state_dict().items() if not k.startswith("fusions.")})
    assert torch.equal(fused(pixels(inputs))["clips"], apart(pixels(inputs))["clips"])
    fused(pixels(inputs))["clips"].square().sum().backward()
    gradient = fused.get_parameter("fusions.1.attentions.0.proj.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_timesformer_begins_as_attention_over_space_alone() -> None:
    """Its temporal branch ends in zeros; the classes differ from `space` only in how frames are averaged."""
    inputs = {"clips": INPUTS["clips"]}
    model = make("timesformer_ti_divided", inputs).eval()
    clip = pixels(inputs)["clips"]
    shuffled = clip[:, :, torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])]
    torch.testing.assert_close(model({"clips": clip})["clips"], model({"clips": shuffled})["clips"])
    shake(model)
    assert not torch.allclose(model({"clips": clip})["clips"], model({"clips": shuffled})["clips"], atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(model_names()) - set(model_names("tubevit"))))
def test_every_name_builds_in_its_size(name: str) -> None:
    spec = InputSpec("image", 1, 224, 2) if name.startswith("vit_") else InputSpec("video", 32, 224, 2)
    with torch.device("meta"):
        model = build_model(SECTION.validate_python({"name": name}), {"source": spec})
    widths = {"ti": 192, "s": 384, "b": 768, "l": 1024, "h": 1280}
    assert isinstance(model, VideoModel | MTV)
    assert model.size.width == widths[name.split("_")[1]]


def test_pictures_of_a_model_find_its_tokenizer() -> None:
    tokenizer = build_tokenizer(section("vivit_ti_m3"), INPUTS)
    weights = make("vivit_ti_m3").state_dict()
    tokenizer.load_state_dict(
        {name.removeprefix("tokenizer."): part for name, part in weights.items() if "tokenizer" in name}
    )
    with pytest.raises(RecipeError, match="several lengths"):
        build_tokenizer(section("mtv_b"), INPUTS)
