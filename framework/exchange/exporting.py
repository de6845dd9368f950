"""`tubeworks export`: a run's weights for other libraries, with a card that says where they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import ModelError, TubeworksError
from framework.exchange.card import write_card
from framework.exchange.hugging_face import config_of, preprocessor_of
from framework.exchange.run import EXPORTED, FinishedRun, Weights, check_classifies, open_finished
from framework.files import replace_text
from framework.models.registry import size_of
from framework.models.weights.convert import Target, to_format
from framework.models.weights.formats import FORMATS, Format
from framework.recipe import dump_yaml
from framework.recipe.model_sections import family_of, reconstructs
from framework.recipe.schema import Recipe, ViViT
from framework.training.checkpoint import load_weights
from framework.training.consolidate import consolidate
from framework.training.data_facts import DATA_NAME

__all__ = ["Export", "Kind", "export_run"]

Kind = Literal["safetensors", "hf", "timm", "npz", "torchvision", "onnx"]


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    step: int
    weights: Weights
    source: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "folder": str(self.folder), "files": list(self.files)}


def export_run(
    run: Path, kind: Kind, out: Path, *, weights: Weights | None = None, source: str | None = None
) -> Export:
    """Write the newest checkpoint's weights to a new folder in another form, with recipe and model card.

    `safetensors` keeps all weights under their own names, and `open_trained` reads them. The others are for
    one source, whose classifier goes along: `hf` (a folder that `from_pretrained` loads), `timm`, `npz` and
    `torchvision` (the formats of those ViTs), `onnx` (the whole model, from bytes to logits).

    Errors:
        TubeworksError: no run, no checkpoint, a folder that is not empty, a model that the form cannot hold.
    """
    finished = open_finished(run, weights)
    if out.exists() and any(out.iterdir()):
        raise TubeworksError(f"{out} is not empty; choose another --out folder")
    writers: dict[Kind, Callable[[FinishedRun, str, Path], None]] = {
        "onnx": _write_onnx,
        "hf": _write_hugging_face,
        "timm": _write_timm,
        "npz": _write_npz,
        "torchvision": _write_torchvision,
    }
    name = None
    if kind == "safetensors" and source is not None:
        raise ModelError(
            f"--source {source}: `--to safetensors` keeps the classifiers of all sources; leave it out"
        )
    if kind != "safetensors":
        check_classifies(run, finished.recipe)
        name, _ = finished.source(source)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        if name is None:
            consolidate(finished.checkpoint, unfinished / EXPORTED, finished.averaged)
        else:
            writers[kind](finished, name, unfinished)
        replace_text(unfinished / "recipe.yaml", dump_yaml(finished.recipe))
        if (run / DATA_NAME).is_file():
            shutil.copyfile(run / DATA_NAME, unfinished / DATA_NAME)  # which has the names of the classes
        write_card(finished, kind, name, unfinished)
        unfinished.replace(out)  # an empty folder there gives way
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = tuple(sorted(path.name for path in out.iterdir()))
    return Export(out, kind, files, finished.step, "ema" if finished.averaged else "raw", name)


def _write_hugging_face(run: FinishedRun, source: str, out: Path) -> None:
    known, tensors = _converted(run, "hf", source)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = config_of(run.recipe, known, source, run.classes(source))
    replace_text(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    preprocessor = preprocessor_of(run.recipe, known, source)
    replace_text(out / "preprocessor_config.json", json.dumps(preprocessor, indent=2) + "\n")


def _write_timm(run: FinishedRun, source: str, out: Path) -> None:
    known, tensors = _converted(run, "timm", source)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    spec, size = run.recipe.data.sources[source], size_of(run.recipe.model)
    has_class = "cls_token" in tensors
    arguments = {
        "img_size": spec.size,
        "patch_size": int(tensors["patch_embed.proj.weight"].shape[-1]),
        "num_classes": spec.targets.outputs,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": size.mlp_width / size.width,
        "act_layer": "gelu" if _has_exact_gelu(run.recipe) else "gelu_tanh",
        "class_token": has_class,
        "global_pool": "token" if has_class else "avg",
        "fc_norm": False,
    }
    config = {"architecture": "VisionTransformer", "model_args": arguments}
    config["pretrained_cfg"] = {
        "mean": list(known.mean),
        "std": list(known.std),
        "input_size": [3, spec.size, spec.size],
        "label_names": run.classes(source),
    }
    replace_text(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write_npz(run: FinishedRun, source: str, out: Path) -> None:
    _, tensors = _converted(run, "npz", source)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(out / "model.npz", **arrays)


def _write_torchvision(run: FinishedRun, source: str, out: Path) -> None:
    _, tensors = _converted(run, "torchvision", source)
    if not _has_exact_gelu(run.recipe):
        raise ModelError(
            "torchvision's ViT has the exact GELU, and this model was trained with `model.gelu: tanh`; "
            "`--to timm` and `--to hf` can say so"
        )
    torch.save(tensors, out / "model.pth")


def _write_onnx(run: FinishedRun, source: str, out: Path) -> None:
    from framework.exchange.onnx import write_onnx

    write_onnx(run, source, out / "model.onnx")


def _converted(run: FinishedRun, name: str, source: str) -> tuple[Format, dict[str, Tensor]]:
    """The weights in a format, without the classifiers of other sources."""
    model = run.recipe.model
    known = next((one for one in FORMATS if (one.name, one.family) == (name, family_of(model))), None)
    frames = isinstance(model, ViViT) and model.embedding == "frames"
    if known is None or frames or (isinstance(model, ViViT) and not model.name.endswith("_m1")):
        like = f"{model.name} with `embedding: frames`" if frames else model.name
        onnx = "" if reconstructs(model) else " and `--to onnx`"
        raise ModelError(f"{name} has no model like {like}; `--to safetensors`{onnx} can take it")
    others = tuple(f"heads.{other}." for other in run.recipe.data.sources if other != source)
    state = load_weights(run.checkpoint, ema=run.averaged)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(others)}
    return known, to_format(state, known, size_of(model).heads, Target(source))


def _has_exact_gelu(recipe: Recipe) -> bool:
    return getattr(recipe.model, "gelu", "exact") == "exact"
