"""One rank of an evaluation with a tiny model; run by `test_run.py` as a process. Prints JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from framework.data.sources import open_sources
from framework.evaluation.run import evaluate
from framework.recipe.schema import Recipe
from framework.world import World


def main() -> None:
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    world = World.from_env() or World()
    if world.size > 1:
        torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    sources = open_sources(recipe, "validation")
    torch.manual_seed(0)
    weights = {
        name: torch.randn(source.source.frames * 3 * 32 * 32, source.source.classes, dtype=torch.float64)
        for name, source in sources.items()
    }
    calls: list[tuple[str, int]] = []
    seen: dict[str, list[int]] = {name: [] for name in sources}

    def forward(pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        ((name, tensor),) = pixels.items()
        calls.append((name, len(tensor)))
        return {name: tensor.flatten(1).double() / 255 @ weights[name]}

    results = evaluate(
        forward,
        sources,
        world,
        torch.device("cpu"),
        recipe.evaluation,
        workers=int(sys.argv[2]),
        shuffle_frames=sys.argv[3] == "shuffled",
        observe=lambda name, batch, logits: seen[name].extend(batch.index[batch.valid].tolist()),
    )
    if world.size > 1:
        torch.distributed.destroy_process_group()
    answer = {name: asdict(result) for name, result in results.items()}
    sys.stdout.write(json.dumps({"results": answer, "calls": calls, "seen": seen}))


if __name__ == "__main__":
    main()
