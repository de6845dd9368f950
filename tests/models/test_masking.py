"""VideoMAE's pretraining: what is masked, what is predicted, and what the encoder sees (arXiv 2203.12602)."""

from __future__ import annotations

import torch
from video_models import INPUTS, make, pixels, shake

from framework.models.noise import split_places
from framework.models.tubes import Grid
from framework.models.videomae import VideoMAEPretraining, pixel_targets
from framework.recipe.schema import Tube

CLIPS = {"clips": INPUTS["clips"]}
TUBE = Tube(kernel=(2, 8, 8), stride=(2, 8, 8))


def masked_model() -> VideoMAEPretraining:
    model = make("videomae_ti", CLIPS, pretrain={"ratio": 0.75, "decoder_depth": 1})
    assert isinstance(model, VideoMAEPretraining)
    shake(model)
    return model


def test_places_are_split_by_the_seed_and_evenly() -> None:
    seeds = torch.arange(2000)
    seen, hidden = split_places(seeds, 16, 12)
    assert (seen.shape, hidden.shape) == ((2000, 4), (2000, 12))
    assert torch.equal(torch.cat((seen, hidden), dim=1).sort(dim=1).values, torch.arange(16).expand(2000, -1))
    again = split_places(seeds[1000:], 16, 12)[0]
    assert torch.equal(again, seen[1000:]), "a sample's mask does not depend on its batch"
    shares = torch.bincount(hidden.flatten(), minlength=16) / 2000
    assert (shares - 0.75).abs().max() < 0.04
    assert len({tuple(row) for row in seen.tolist()}) > 1000


def test_losses_belong_to_samples_and_come_from_what_is_masked() -> None:
    model, clip = masked_model(), pixels(CLIPS, samples=3)["clips"]
    seeds = torch.tensor([5, 6, 7])
    losses = model({"clips": clip}, {"clips": seeds})["clips"]
    assert losses.shape == (3,)
    alone = model({"clips": clip[1:]}, {"clips": seeds[1:]})["clips"]
    torch.testing.assert_close(alone, losses[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model({"clips": clip}, {"clips": seeds + 9})["clips"], losses)


def test_the_same_places_are_hidden_in_all_frames() -> None:
    """The prediction does not change with what is hidden, and does with everything else."""
    model, clip = masked_model(), pixels(CLIPS, samples=1)["clips"]
    seeds = torch.tensor([5])
    seen, hidden = (part[0].tolist() for part in split_places(seeds, 16, 12))
    inputs: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda module, given, output: inputs.append(output))
    model({"clips": clip}, {"clips": seeds})
    for place in range(16):
        y, x = divmod(place, 4)
        for time in range(4):
            changed = clip.clone()
            changed[:, :, 2 * time : 2 * time + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 0
            model({"clips": changed}, {"clips": seeds})
            assert torch.equal(inputs[0], inputs[-1]) == (place in hidden), (place, time)
    assert len(seen) == 4


def test_targets_are_normalised_patches() -> None:
    clip = pixels(CLIPS, samples=2)["clips"]
    raw = pixel_targets(clip, TUBE, (4, 4, 4), normalised=False)
    assert raw.shape == (2, 64, 2 * 8 * 8 * 3)
    # token (time 1, row 2, column 3), pixel (1, 4, 5) of it, green
    pixel = (clip[1, 1, 2 * 1 + 1, 8 * 2 + 4, 8 * 3 + 5] + 1) / 2
    assert raw[1, 16 + 4 * 2 + 3, ((1 * 8 + 4) * 8 + 5) * 3 + 1] == pixel
    colours = pixel_targets(clip, TUBE, (4, 4, 4)).view(2, 64, 128, 3)
    torch.testing.assert_close(colours.mean(dim=2), torch.zeros(2, 64, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(colours.std(dim=2), torch.ones(2, 64, 3), rtol=1e-4, atol=1e-4)
    as_bytes = ((clip + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(
        pixel_targets(as_bytes, TUBE, (4, 4, 4), normalised=False), raw, rtol=0, atol=2e-3
    )


def test_it_learns_to_fill_in_and_every_parameter_takes_part() -> None:
    model = masked_model()
    clip = pixels(CLIPS, samples=2)["clips"][:, :, :2, :8, :8].repeat(1, 1, 4, 4, 4)  # all tubelets alike
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model({"clips": clip}, {"clips": torch.tensor([1, 2])})["clips"].mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert model.tokenizer.grids((8, 32, 32)) == (Grid(0, (4, 4, 4)),)
