"""The model card of an export: recipe, data, results, in the form that model hubs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framework import __version__
from framework.errors import TubeworksError
from framework.exchange.run import FinishedRun
from framework.files import replace_text
from framework.recipe import recipe_hash
from framework.recipe.model_sections import reconstructs
from framework.tracking.journal import journal_path, read_journal
from framework.training.checkpoint import read_manifest
from framework.training.data_facts import read_data_facts

__all__ = ["write_card"]

LOADING = {
    "safetensors": "All weights under the framework's own names, in float32: `safetensors.torch.load_file`.",
    "hf": "`from_pretrained` of the class in `config.json` loads this folder.",
    "timm": "`timm.models.VisionTransformer(**model_args)` of `config.json`, then `load_state_dict`.",
    "npz": "Google's ViT format: arrays by parameter path.",
    "torchvision": "`torchvision.models.VisionTransformer(...)`, then `load_state_dict(torch.load(..., "
    "weights_only=True))`.",
    "onnx": "Input `pixels`: uint8 (batch, 3, frames, height, width). Output `logits`: float32 (batch,\n"
    "classes).",
}
PREDICTING = "`tubeworks predict FOLDER FILE...` classifies videos and images with this folder."


def write_card(run: FinishedRun, kind: str, source: str | None, out: Path) -> None:
    """Write `README.md`: what the weights are, what they were trained on, and how they did.

    Errors:
        TubeworksError: an evaluation of the run cannot be read.
    """
    manifest = read_manifest(run.checkpoint)
    recipe = run.recipe
    kinds = {spec.kind for spec in recipe.data.sources.values()}
    weights = "moving averages of the weights" if run.averaged else "weights"
    lines = [
        "---",
        "library_name: tubeworks",
        f"tags: [{', '.join(f'{one}-classification' for one in sorted(kinds))}]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        recipe.description or f"A model of the recipe {recipe.name}.",
        "",
        f"{recipe.model.name}, {weights} after step {run.step} of {recipe.train.steps}"
        + (f", classifier of {source}" if source else "")
        + f"; written by tubeworks {__version__}.",
        "",
        LOADING[kind],
        *([PREDICTING] if kind == "safetensors" and not reconstructs(recipe.model) else []),
        "",
        "| what | value |",
        "|---|---|",
        f"| recipe | `recipe.yaml`, hash {recipe_hash(recipe)} |",
        f"| plan of the data | {manifest.get('plan') or 'none (imported weights)'} |",
    ]
    if imported := manifest.get("imported"):
        lines.append(f"| imported from | {Path(imported['file']).name}, {imported['format']} |")
    for name, facts in read_data_facts(run.folder).items():
        words = f"{facts.get('dataset')}, {facts.get('samples')} samples, manifest {facts.get('manifest')}"
        lines.append(f"| shards of {name} | {words} |")
    for name, spec in recipe.data.sources.items():
        clip = f"{spec.frames} frames of " if spec.kind == "video" else ""
        lines.append(
            f"| input of {name} | {clip}{spec.size} x {spec.size} pixels, {spec.targets.outputs} outputs |"
        )
    lines += ["", "## Results", "", *_results(run)]
    if recipe.published:
        lines += ["", "Published figures of such a run (not of this one):", ""]
        lines += [f"- {key}: {value}" for key, value in recipe.published.items()]
    replace_text(out / "README.md", "\n".join(lines) + "\n")


def _results(run: FinishedRun) -> list[str]:
    """The evaluations of this checkpoint."""
    lines = []
    for path in sorted((run.folder / "evaluations").glob("*.json")):
        found = _read(path)
        if found.get("step") != run.step:
            continue
        how = [str(found.get("weights", "")), f"{'x'.join(map(str, found.get('views', ())))} views"]
        how += ["frames shuffled"] if found.get("shuffle_frames") else []
        for name, metrics in (found.get("sources") or {}).items():
            values = ", ".join(
                f"{key} {value if isinstance(value, int) else f'{value:.4g}'}"
                for key, value in metrics.items()
                if isinstance(value, (int, float))
            )
            lines.append(f"- {name} ({', '.join(how)}): {values}")
    lines += _results_of_training(run)
    return lines or ["None: this checkpoint was not evaluated (`tubeworks eval RUN`)."]


def _results_of_training(run: FinishedRun) -> list[str]:
    """What the training itself found on held-out samples at the step of this checkpoint."""
    if not journal_path(run.folder).is_file():
        return []
    found: dict[str, dict[str, float]] = {}
    for entry in read_journal(run.folder):
        for key, value in entry.metrics.items():
            kind, _, rest = key.partition("/")
            if kind == "eval" and entry.step == run.step and value is not None:
                name, _, metric = rest.rpartition("/")
                found.setdefault(name, {})[metric] = value
    return [
        f"- {name} (during training): {', '.join(f'{key} {value:.4g}' for key, value in metrics.items())}"
        for name, metrics in found.items()
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TubeworksError(f"{path} cannot be read ({error}); restore or remove it") from error
    return content if isinstance(content, dict) else {}
