"""Weights come in, go out in every form, come in again as they were; and files are classified with them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from framework.data.augment import resize, view_boxes
from framework.data.limits import MAX_IMAGE_PIXELS
from framework.errors import CheckpointError, DataError, ModelError, RecipeError, TubeworksError
from framework.evaluation.metrics import SourceResult
from framework.evaluation.report import EvaluationReport, write_report
from framework.exchange.exporting import Kind, export_run
from framework.exchange.importing import account_table, import_weights
from framework.exchange.media import MAX_FILE_BYTES
from framework.exchange.predict import Predictor
from framework.exchange.run import open_finished
from framework.models.registry import build_model, inputs_of
from framework.models.weights.convert import Target, to_format
from framework.models.weights.formats import FORMATS
from framework.recipe import load_recipe
from launch.cli import app

RECIPE = """\
name: small
model: {{name: {model}, width: 48, depth: 2, heads: 3, mlp_width: 96, {options}}}
data:
  sources:
    things: {{path: nowhere, kind: {kind}, classes: 7, size: 32{clip}}}
  mixture: {{things: 8}}
optimizer: {{lr: 1e-3}}
train: {{steps: 4}}
evaluation: {{temporal_views: 2, spatial_views: 3}}
"""
VIDEO = {"kind": "video", "clip": ", clip: {frames: 4, stride: 2}"}
RECIPES = {
    "vit": RECIPE.format(model="vit_ti", options="patch: 8", kind="image", clip=""),
    "vivit": RECIPE.format(model="vivit_ti_m1", options="tubelet: [2, 8, 8]", **VIDEO),
    "timesformer": RECIPE.format(model="timesformer_ti_divided", options="patch: 8", **VIDEO),
    "videomae": RECIPE.format(model="videomae_ti", options="tubelet: [2, 8, 8]", **VIDEO),
}


def imported(family: str, folder: Path, seed: int = 1) -> Path:
    """A run of random weights that came out of a file."""
    path = folder / f"{family}.yaml"
    path.write_text(RECIPES[family])
    recipe = load_recipe(str(path)).recipe
    torch.manual_seed(seed)
    model = build_model(recipe.model, inputs_of(recipe))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("qkv.bias"):  # VideoMAE's format has none for keys
                parameter.normal_(0, 0.3)
    known = next(one for one in FORMATS if (one.name, one.family) == ("hf", family))
    folder.joinpath("file").mkdir()
    from safetensors.torch import save_file

    save_file(
        to_format(model.state_dict(), known, 3, Target("things")), folder / "file" / "model.safetensors"
    )
    return import_weights(folder / "file", str(path), (), folder / "run").run


def picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(path: Path, frames: int = 12) -> Path:
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(
                random.integers(256, size=(48, 64, 3), dtype=np.uint8), "rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


CASES: list[tuple[str, Kind]] = [
    ("vit", "hf"),
    ("vit", "timm"),
    ("vit", "npz"),
    ("vit", "torchvision"),
    ("vivit", "hf"),
    ("timesformer", "hf"),
    ("videomae", "hf"),
]


@pytest.mark.parametrize(("family", "kind"), CASES, ids=[f"{family}-{kind}" for family, kind in CASES])
def test_out_and_in_again(family: str, kind: Kind, tmp_path: Path) -> None:
    run = imported(family, tmp_path)
    done = export_run(run, kind, tmp_path / "out")
    assert {"README.md", "recipe.yaml"} < set(done.files)
    weights = next(path for path in done.folder.iterdir() if path.name.startswith("model."))
    again = import_weights(weights, str(tmp_path / f"{family}.yaml"), (), tmp_path / "again").run
    first, second = (open_finished(one).model(torch.device("cpu")).state_dict() for one in (run, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", list(RECIPES))
def test_hugging_face_loads_the_folder(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    run = imported(family, tmp_path)
    folder = export_run(run, "hf", tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    theirs = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    ours = open_finished(run).model(torch.device("cpu"))
    pixels = torch.randint(256, (1, 3, 1 if family == "vit" else 4, 32, 32), dtype=torch.uint8)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    prepare = getattr(transformers, preprocessor["image_processor_type"]).from_pretrained(folder)
    frames = list(pixels[0].permute(1, 2, 3, 0).numpy())
    values = prepare(frames[0] if family == "vit" else frames, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ours({"things": pixels})["things"]
        found = theirs(values).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def changed(override: str, folder: Path, family: str) -> Path:
    """A run of the file that `imported` made, by a recipe with another value."""
    imported(family, folder)
    return import_weights(folder / "file", str(folder / f"{family}.yaml"), (override,), folder / "new").run


def test_the_gelu_goes_along_or_the_export_is_refused(tmp_path: Path) -> None:
    run = changed("model.gelu=tanh", tmp_path, "vit")
    config = json.loads((export_run(run, "timm", tmp_path / "timm").folder / "config.json").read_text())
    assert config["model_args"]["act_layer"] == "gelu_tanh"
    config = json.loads((export_run(run, "hf", tmp_path / "hf").folder / "config.json").read_text())
    assert config["hidden_act"] == "gelu_fast"
    with pytest.raises(ModelError, match="torchvision's ViT has the exact GELU"):
        export_run(run, "torchvision", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tubelets_of_which_one_frame_is_read_are_in_no_other_library(tmp_path: Path) -> None:
    run = changed("model.embedding=frames", tmp_path, "vivit")
    with pytest.raises(ModelError, match="hf has no model like vivit_ti_m1 with `embedding: frames`"):
        export_run(run, "hf", tmp_path / "out")


def test_a_masked_autoencoder_has_no_logits_to_give(tmp_path: Path) -> None:
    imported("videomae", tmp_path)
    override, run = ("model.pretrain={ratio: 0.5}",), tmp_path / "new"
    new, unused = ["decoder.*", "norm.*"], ["classifier.*", "fc_norm.*"]
    import_weights(tmp_path / "file", str(tmp_path / "videomae.yaml"), override, run, new=new, unused=unused)
    with pytest.raises(RecipeError, match="which has no classifier"):
        Predictor(run)
    with pytest.raises(RecipeError, match="which has no classifier"):
        export_run(run, "onnx", tmp_path / "onnx")
    folder = export_run(run, "safetensors", tmp_path / "out").folder
    assert "tubeworks predict" not in (folder / "README.md").read_text()


def test_safetensors_keep_everything_under_our_names(tmp_path: Path) -> None:
    run = imported("vivit", tmp_path)
    folder = export_run(run, "safetensors", tmp_path / "out").folder
    kept = load_file(folder / "model.safetensors")
    model = open_finished(run).model(torch.device("cpu"))
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    card = (folder / "README.md").read_text()
    assert "imported from | file, Hugging Face ViViT" in card
    assert "## Results" in card


def test_the_card_says_how_each_result_was_measured(tmp_path: Path) -> None:
    run = imported("vivit", tmp_path)
    result = SourceResult(19_881, 0.25, 0.5, 0.25, 0.5, 2.0, 0.25)
    for step, shuffle in ((0, False), (0, True), (9, False)):
        report = EvaluationReport(
            str(run), "small", step, "raw", (4, 3), (2, 3), shuffle, 1, "float32", {"things": result}
        )
        write_report(run, report)
    card = (export_run(run, "safetensors", tmp_path / "out").folder / "README.md").read_text()
    shuffled, straight = [line for line in card.splitlines() if line.startswith("- things")]
    assert straight.startswith("- things (raw, 4x3 views): samples 19881, top1 0.25, ")
    assert shuffled.startswith("- things (raw, 4x3 views, frames shuffled): samples 19881, ")


def test_the_card_has_what_the_training_itself_found(tmp_path: Path) -> None:
    run = imported("vivit", tmp_path)
    lines = [
        {"step": step, "time": 1.0, "metrics": {"eval/things/top_1": value, "train/loss": 2.0}, "attempt": 0}
        for step, value in ((0, 0.567), (9, 0.9))
    ]
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = (export_run(run, "safetensors", tmp_path / "out").folder / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("- things")] == [
        "- things (during training): top_1 0.567"
    ]


def test_onnx_computes_the_same_for_any_number_of_samples(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    run = imported("vivit", tmp_path)
    path = export_run(run, "onnx", tmp_path / "out").folder / "model.onnx"
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = open_finished(run).model(torch.device("cpu"))
    for samples in (1, 3):
        pixels = torch.randint(256, (samples, 3, 4, 32, 32), dtype=torch.uint8)
        found = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, model({"things": pixels})["things"], rtol=1e-4, atol=1e-4)


def test_a_picture_is_classified_as_the_model_does(tmp_path: Path) -> None:
    run = imported("vit", tmp_path)
    path = picture(tmp_path / "thing.png")
    found = Predictor(run)(path, top=7)
    frame = np.array(Image.open(path))[None]
    top, left, height, width = view_boxes(40, 60, 1)[0]
    view = resize(frame[:, top : top + height, left : left + width], 32)
    with torch.no_grad():
        model = open_finished(run).model(torch.device("cpu"))
        logits = model({"things": torch.from_numpy(view).permute(3, 0, 1, 2)[None]})["things"][0]
    assert [answer.label for answer in found.answers] == [
        str(n) for n in logits.argsort(descending=True).tolist()
    ]
    assert sum(answer.probability for answer in found.answers) == pytest.approx(1)
    assert found.best == found.answers[0].label


def test_a_video_has_all_its_views_and_its_classes_have_names(tmp_path: Path) -> None:
    run = imported("vivit", tmp_path)
    names = [f"thing {letter}" for letter in "abcdefg"]
    (run / "data.json").write_text(json.dumps({"things": {"classes": names}}))
    found = Predictor(run)(clip(tmp_path / "clip.mp4"))
    assert found.views == 6
    assert len(found.answers) == 5
    assert {answer.label for answer in found.answers} < set(names)
    assert Predictor(run, views=(1, 1))(tmp_path / "clip.mp4").views == 1


def test_an_import_takes_the_names_of_the_classes_from_the_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_finished(imported("vit", tmp_path)).classes("things")[:2] == ["0", "1"]
    assert "predictions will be numbers" in caplog.text
    names = [f"thing {letter}" for letter in "abcdefg"]
    for name in names:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture(tmp_path / "pictures" / name / "one.png")
    made = ["data", "shard", "folder", "--input", str(tmp_path / "pictures"), "--name", "things"]
    assert (
        CliRunner().invoke(app, [*made, "--out", str(tmp_path / "shards"), "--workers", "1"]).exit_code == 0
    )
    override = f"data.sources.things.path={tmp_path / 'shards'}"
    run = import_weights(tmp_path / "file", str(tmp_path / "vit.yaml"), (override,), tmp_path / "named").run
    assert open_finished(run).classes("things") == names


def test_files_that_cannot_be_classified_say_why(tmp_path: Path) -> None:
    run = imported("vivit", tmp_path)
    predictor = Predictor(run)
    (tmp_path / "page.mp4").write_text("<html>")
    with pytest.raises(DataError, match="neither a video nor an image"):
        predictor(tmp_path / "page.mp4")
    with pytest.raises(DataError, match="cannot be read"):
        predictor(tmp_path / "none.mp4")
    for no_file in (tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match="is no file"):
            predictor(no_file)
    with (tmp_path / "large.mp4").open("wb") as large:
        large.truncate(MAX_FILE_BYTES + 1)  # takes no room on the disk
    with pytest.raises(DataError, match="at most 4, as a file is read whole"):
        predictor(tmp_path / "large.mp4")
    with pytest.raises(ModelError, match="read images: none"):
        predictor(picture(tmp_path / "thing.png"))
    with pytest.raises(ModelError, match="no source other"):
        Predictor(run, source="other")
    for device in ("nothing", "cuda:99"):
        with pytest.raises(ModelError, match=f"--device {device}: cannot be used here"):
            Predictor(run, device=device)


def test_media_that_cannot_be_decoded_say_what_is_wrong(tmp_path: Path) -> None:
    predictor = Predictor(imported("vivit", tmp_path))
    unknown = clip(tmp_path / "clip.mp4").read_bytes().replace(b"avc1", b"zzzz")
    (tmp_path / "clip.mp4").write_bytes(unknown)
    with pytest.raises(DataError, match=r"clip\.mp4: .*codec is not known"):
        predictor(tmp_path / "clip.mp4")
    for name, side in (("large.png", int(MAX_IMAGE_PIXELS**0.5) + 1), ("huge.png", 20_000)):
        Image.new("1", (side, side)).save(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: is an image that cannot be decoded .*pixels"):
            predictor(tmp_path / name)
    whole = picture(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: is an image that cannot be decoded .*truncated"):
        predictor(tmp_path / "cut.jpg")


def test_a_picture_needs_no_ffcv_file_of_the_source(tmp_path: Path) -> None:
    gone = tmp_path / "gone.beton"
    run = changed(f"data.sources.things.beton={gone}", tmp_path, "vit")
    assert open_finished(run).recipe.data.sources["things"].beton == str(gone)
    path = picture(tmp_path / "thing.png")
    assert Predictor(run)(path).answers == Predictor(tmp_path / "run")(path).answers


def test_predict_takes_the_folder_of_an_export_as_its_card_says(tmp_path: Path) -> None:
    run = imported("vit", tmp_path)
    names = [f"thing {letter}" for letter in "abcdefg"]
    (run / "data.json").write_text(json.dumps({"things": {"classes": names}}))
    folder = export_run(run, "safetensors", tmp_path / "export").folder
    [words] = re.findall(r"`tubeworks (predict FOLDER FILE\.\.\.)`", (folder / "README.md").read_text())
    path = str(picture(tmp_path / "thing.png"))
    (tmp_path / "run").rename(tmp_path / "elsewhere")

    def answers(place: Path) -> Any:
        arguments = words.replace("FOLDER", str(place)).replace("FILE...", path).split()
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    assert answers(folder) == answers(tmp_path / "elsewhere")
    assert answers(folder)[0]["answers"][0]["label"] in names
    with pytest.raises(ModelError, match=r"--weights raw: .* holds one kind"):
        Predictor(folder, weights="raw")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        Predictor(folder)


def test_predict_takes_no_export_for_another_library(tmp_path: Path) -> None:
    folder = export_run(imported("vit", tmp_path), "timm", tmp_path / "export").folder
    assert "tubeworks predict" not in (folder / "README.md").read_text()
    with pytest.raises(ModelError, match="becomes a run with `tubeworks import`"):
        Predictor(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        Predictor(folder)


def test_the_command_counts_views(tmp_path: Path) -> None:
    run, film = imported("vivit", tmp_path), clip(tmp_path / "clip.mp4")
    for views, words in (("1x1", "things, 1 view, "), ("2x3", "things, 6 views, ")):
        done = CliRunner().invoke(app, ["predict", str(run), str(film), "--views", views])
        assert words in done.output, done.output


def test_a_truncated_video_is_classified_by_what_is_there(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    whole = clip(tmp_path / "whole.mkv").read_bytes()
    buffer.write(whole[: len(whole) * 3 // 4])
    (tmp_path / "cut.mkv").write_bytes(buffer.getvalue())
    assert Predictor(imported("vivit", tmp_path))(tmp_path / "cut.mkv").views == 6


def test_the_command_line(tmp_path: Path) -> None:
    run = imported("vit", tmp_path)
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(run), "--to", "timm", "--json"])
    assert done.exit_code == 0, done.output
    folder = Path(json.loads(done.output)["folder"])
    arguments = [
        "import",
        str(folder / "model.safetensors"),
        str(tmp_path / "vit.yaml"),
        "--run",
        str(tmp_path / "new"),
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "blocks.*.attn.qkv.weight x 2" in done.output
    files = [str(picture(tmp_path / f"{n}.png", n)) for n in range(2)]
    done = runner.invoke(app, ["predict", str(tmp_path / "new"), *files, "--json", "--top", "2"])
    assert done.exit_code == 0, done.output
    answers: list[dict[str, Any]] = json.loads(done.output)
    assert [one["file"] for one in answers] == files
    assert all(len(one["answers"]) == 2 for one in answers)
    done = runner.invoke(app, ["predict", str(run), files[0], str(tmp_path / "none.png")])
    assert done.exit_code == DataError.exit_code
    assert "none.png: cannot be read" in done.output


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = imported("vit", tmp_path)
    with pytest.raises(RecipeError, match="is a run already"):
        import_weights(tmp_path / "file", str(tmp_path / "vit.yaml"), (), run)
    (tmp_path / "vivit.yaml").write_text(RECIPES["vivit"])
    with pytest.raises(RecipeError, match="becomes a model of the family vit or tubevit"):
        import_weights(tmp_path / "file", str(tmp_path / "vivit.yaml"), (), tmp_path / "other")
    with pytest.raises(ModelError, match="no place for"):
        import_weights(
            tmp_path / "file", str(tmp_path / "vit.yaml"), ("model.pool=mean",), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TubeworksError, match="is not empty"):
        export_run(run, "timm", tmp_path / "full")
    with pytest.raises(ModelError, match="keeps the classifiers of all sources"):
        export_run(run, "safetensors", tmp_path / "out", source="things")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        export_run(run, "timm", tmp_path / "out", weights="ema")


def test_the_account_has_one_line_for_all_blocks(tmp_path: Path) -> None:
    imported("vit", tmp_path)
    done = import_weights(
        tmp_path / "file", str(tmp_path / "vit.yaml"), ("data.sources.things.size=48",), tmp_path / "larger"
    )
    table = account_table(done.account)
    assert "interpolated  places.weight" in table
    assert "blocks.*.norm1.weight x 2" in table
    assert json.loads((tmp_path / "larger" / "import.json").read_text())["new"] == []
