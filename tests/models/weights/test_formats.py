"""Every format there and back, other patch sizes and grids, other tubes, and tensors that nobody named."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.inputs import InputSpec
from framework.models.registry import build_model
from framework.models.weights.convert import Target, fill, format_of, to_format
from framework.models.weights.files import read_weights
from framework.models.weights.formats import FORMATS, Format
from framework.models.weights.resize import denormalise, renormalise, resize_kernel, to_grid
from framework.recipe.schema import AnyModel, Model, TimeSformer, Tube, VideoMAE, ViT, ViViT

NUMBERS: dict[str, Any] = {"width": 48, "depth": 2, "heads": 3, "mlp_width": 96}
IMAGE, VIDEO = InputSpec("image", 1, 32, 7), InputSpec("video", 4, 32, 7)
MODELS: dict[str, tuple[AnyModel, InputSpec]] = {
    "vit": (ViT(name="vit_ti", patch=8, **NUMBERS), IMAGE),
    "vivit": (ViViT(name="vivit_ti_m1", tubelet=(2, 8, 8), **NUMBERS), VIDEO),
    "timesformer": (TimeSformer(name="timesformer_ti_divided", patch=8, **NUMBERS), VIDEO),
    "videomae": (VideoMAE(name="videomae_ti", tubelet=(2, 8, 8), **NUMBERS), VIDEO),
}
TARGET = Target("data")
NAMES = [f"{known.name}-{known.family}" for known in FORMATS]


@torch.no_grad()
def random_model(section: AnyModel, spec: InputSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(section, {"data": spec}).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


def save(tensors: dict[str, Tensor], known: Format, folder: Path) -> Path:
    if known.name == "npz":
        path = folder / "weights.npz"
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    elif known.name == "torchvision":
        path = folder / "weights.pth"
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        path = folder / "weights.safetensors"
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("known", FORMATS, ids=NAMES)
def test_a_round_trip_gives_the_same_tensors(known: Format, tmp_path: Path) -> None:
    section, spec = MODELS[known.family]
    model, other = random_model(section, spec, 1), random_model(section, spec, 2)
    if known.family == "videomae":  # this format has no place for a bias of the keys, which changes nothing
        with torch.no_grad():
            for block in model.blocks:  # type: ignore[union-attr]
                block.attn.qkv.bias[48:96] = 0
    path = save(to_format(model.state_dict(), known, 3, TARGET), known, tmp_path)
    found, tensors = format_of(read_weights(path))
    assert found is known
    account = fill(other, tensors, found, TARGET)
    assert account.new == account.unused == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    clip = torch.randint(256, (2, 3, spec.frames, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(
        other({"data": clip})["data"], model({"data": clip})["data"], rtol=1e-4, atol=1e-4
    )


def test_timm_without_a_class_token(tmp_path: Path) -> None:
    section = ViT(name="vit_ti", patch=8, pool="mean", **NUMBERS)
    model, other = random_model(section, IMAGE, 1), random_model(section, IMAGE, 2)
    written = to_format(model.state_dict(), FORMATS[0], 3, TARGET)
    assert written["pos_embed"].shape == (1, 16, 48)
    assert "cls_token" not in written
    fill(other, written, FORMATS[0], TARGET)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def timm_tensors(patch: int = 8, size: int = 32) -> dict[str, Tensor]:
    section = ViT(name="vit_ti", patch=patch, **NUMBERS)
    model = random_model(section, InputSpec("image", 1, size, 7), 3)
    return to_format(model.state_dict(), FORMATS[0], 3, TARGET)


def test_other_patches_and_pictures_are_resized_and_say_so() -> None:
    model = random_model(ViT(name="vit_ti", patch=16, **NUMBERS), InputSpec("image", 1, 96, 7))
    account = fill(model, timm_tensors(), FORMATS[0], TARGET)
    assert account.loaded["tokenizer.tubes.0.weight"] == "resized"
    assert account.loaded["places.weight"] == "interpolated"
    assert sum(change != "" for change in account.loaded.values()) == 2


def test_a_resized_kernel_sees_an_enlarged_patch_as_before() -> None:
    torch.manual_seed(0)
    kernel, patch = torch.randn(5, 3, 1, 8, 8), torch.rand(1, 3, 1, 8, 8)
    resized, how = resize_kernel(kernel, (5, 3, 1, 16, 16))
    larger = F.interpolate(patch[:, :, 0], (16, 16), mode="bilinear").unsqueeze(2)
    assert how == "resized"
    torch.testing.assert_close(
        (resized * larger).sum((1, 2, 3, 4)), (kernel * patch).sum((1, 2, 3, 4)), rtol=1e-4, atol=1e-4
    )


def test_places_keep_a_picture_that_changes_evenly() -> None:
    ramp = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 2)
    larger, _ = to_grid(ramp.reshape(16, 2), (1, 8, 8, 2))
    torch.testing.assert_close(larger[0, 2:6, 3, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]))
    over_time, how = to_grid(ramp.reshape(16, 2), (3, 4, 4, 2))
    assert "repeated over time" in how
    assert torch.equal(over_time[2], ramp[0])


def test_normalisation_goes_into_the_kernel_and_back() -> None:
    torch.manual_seed(0)
    kernel, bias, pixels = torch.randn(4, 3, 1, 8, 8), torch.randn(4), torch.rand(1, 3, 1, 8, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shape = (1, 3, 1, 1, 1)
    theirs = ((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape) * kernel).sum(
        (1, 2, 3, 4)
    ) + bias
    ours, our_bias = renormalise(kernel, bias, mean, std)
    torch.testing.assert_close(
        ((2 * pixels - 1) * ours).sum((1, 2, 3, 4)) + our_bias, theirs, rtol=1e-4, atol=1e-4
    )
    back = denormalise(ours, our_bias, mean, std)
    torch.testing.assert_close(back, (kernel, bias))


def test_an_image_model_becomes_the_patches_and_encoder_of_a_tubevit() -> None:
    tubes = (Tube(kernel=(4, 8, 8), stride=(4, 8, 8)), Tube(kernel=(1, 8, 8), stride=(4, 8, 8)))
    model: Any = random_model(Model(name="tubevit_ti", tubes=tubes, **NUMBERS), VIDEO)
    before = model.tokenizer.tubes[0].weight.clone()
    tensors = timm_tensors()
    with pytest.raises(ModelError, match=r"--new 'tokenizer\*,pool\*'.*--unused 'cls_token,pos_embed'"):
        fill(model, tensors, FORMATS[0], Target("data", kernel=1))
    fill(
        model,
        tensors,
        FORMATS[0],
        Target("data", kernel=1),
        new=["tokenizer*", "pool*"],
        unused=["cls_token", "pos_embed"],
    )
    assert torch.equal(model.tokenizer.tubes[1].weight[:, :, 0], tensors["patch_embed.proj.weight"])
    assert torch.equal(model.tokenizer.tubes[0].weight, before)
    assert torch.equal(model.blocks[1].attn.qkv.weight, tensors["blocks.1.attn.qkv.weight"])


def test_what_nobody_named_is_an_error_that_says_how_to_name_it() -> None:
    model = random_model(*MODELS["vit"])
    tensors = timm_tensors()
    del tensors["blocks.1.norm2.bias"]
    tensors["fc_norm.weight"] = torch.zeros(48)
    with pytest.raises(ModelError) as error:
        fill(model, tensors, FORMATS[0], TARGET)
    assert "nothing for blocks.1.norm2.bias" in str(error.value)
    assert "no place for fc_norm.weight" in str(error.value)
    account = fill(model, tensors, FORMATS[0], TARGET, new=["blocks.1.*"], unused=["fc_norm.*"])
    assert account.new == ["blocks.1.norm2.bias"]
    assert account.unused == ["fc_norm.weight"]


def test_another_number_of_classes_is_an_error_with_both_shapes() -> None:
    model = random_model(MODELS["vit"][0], InputSpec("image", 1, 32, 9))
    with pytest.raises(
        ModelError, match=r"heads.data.weight has the shape \[7, 48\] in the file and \[9, 48\]"
    ):
        fill(model, timm_tensors(), FORMATS[0], TARGET)


def test_a_model_that_a_format_cannot_hold() -> None:
    model = random_model(ViViT(name="vivit_ti_m3", tubelet=(2, 8, 8), **NUMBERS), VIDEO)
    vivit = next(known for known in FORMATS if known.family == "vivit")
    with pytest.raises(ModelError, match=r"has no place for .*--to safetensors"):
        to_format(model.state_dict(), vivit, 3, TARGET)


class Harmful:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.npz", "weights.bin"])
def test_damaged_and_harmful_files_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x80\x02nonsense" * 30)
    with pytest.raises(ModelError, match=name):
        read_weights(path)
    torch.save({"state_dict": {"weight": torch.zeros(2), "harm": Harmful()}}, tmp_path / "harm.pth")
    with pytest.raises(ModelError, match=r"harm\.pth: .* never loaded; ask its authors") as caught:
        read_weights(tmp_path / "harm.pth")
    assert "weights_only" not in str(caught.value), "torch's advice is to run what is in it"
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ModelError, match=r"empty\.pth: the file is empty"):
        read_weights(tmp_path / "empty.pth")
    assert "never be printed" not in capsys.readouterr().out


def test_files_of_another_content_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    for text in ("{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match="index: cannot be read as weights"):
            read_weights(folder)
    for first in map(chr, range(32, 127)):  # the unpickler takes it for an order
        (tmp_path / "text.pt").write_text(f"{first}his is text\n")
        with pytest.raises(ModelError, match=r"text\.pt: is no PyTorch file"):
            read_weights(tmp_path / "text.pt")
    np.savez(tmp_path / "text.npz", name=np.array(["no number"]))
    with pytest.raises(ModelError, match=r"text\.npz: cannot be read as weights"):
        read_weights(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ModelError, match=r"array\.npz: cannot be read as weights"):
        read_weights(tmp_path / "array.npz")


def test_an_array_that_declares_more_than_is_there_takes_no_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(header, facts)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", header.getvalue() + bytes(64))
    with pytest.raises(ModelError, match=r"bomb\.npz: .*kernel\.npy declares"):
        read_weights(tmp_path / "bomb.npz")


def test_unknown_names_and_missing_files_are_one_line(tmp_path: Path) -> None:
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="in no format that is known"):
        format_of(read_weights(tmp_path / "other.safetensors"))
    with pytest.raises(ModelError, match="no such file"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        read_weights(tmp_path)
