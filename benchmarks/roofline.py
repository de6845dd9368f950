"""What a training step must cost at least on a GPU, by operator, from the operators of the real model.

    python -m benchmarks.roofline [--rate 790e12] [--bandwidth 4.3e12] [--attention 350e12] [--json]

A prediction, not a measurement: it needs no GPU. Forward and backward pass run on tensors without memory.
Each operator is charged for its operations at the rate of a large matrix product, or for the bytes that it
reads and writes at the bandwidth of a large copy, whichever takes longer, and attention at a rate of its own.
For compiled blocks, all that stands between two products counts as one kernel: only what it takes from
outside and what is used afterwards is read and written. The optimizer moves a fixed number of bytes for each
parameter. Launches, communication and idle time are left out, so a real step is slower. `share` is the
operations that count (2 per multiply-add, three forward passes) over time and rate, as
`benchmarks.train_step` measures it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step.product import TOKENS, Case, Setting, operations
from benchmarks.step.sections import TOKENS_A_STEP
from framework.forecast.footprint import fake_model
from framework.models.registry import inputs_of
from framework.recipe.schema import Recipe

__all__ = ["Gpu", "Operator", "Prediction", "predict", "trace"]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
MOVE_NOTHING = ("detach", "_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided")
UPDATE_BYTES = {"own": 44, "DeepSpeed's": 88}
"""A parameter, on one GPU, in a step of one micro-batch (see `framework.training.zero1`)."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU is assumed to reach: by default an H200 with large products and large copies."""

    rate: float = 790e12
    bandwidth: float = 4.3e12
    attention: float = 350e12


@dataclass(frozen=True)
class Operator:
    """One operator that moves memory: its operations, and the storages with the bytes of each."""

    name: str
    operations: float
    read: dict[int, int]
    written: dict[int, int]

    @property
    def kind(self) -> str:
        """`product`, `attention` or `other`."""
        if self.name in PRODUCTS:
            return "product"
        return "attention" if "scaled_dot_product" in self.name else "other"

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(self.read.values()) + sum(self.written.values())


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step, by what takes them, and the shares of the matrix rate that follow."""

    name: str
    products_s: float
    attention_s: float
    other_s: float
    other_compiled_s: float
    update_s: float
    kernels: int
    kernels_compiled: int
    share: float
    share_compiled: float


class _Tracer(TorchDispatchMode):
    """Writes down the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        # so that none gets the identity of an earlier one
        self._held: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        self._held += [tensor.untyped_storage() for tensor in made]
        moves = not (func.is_view or name in MOVE_NOTHING)
        if moves and made:
            work = _operations(name, given, made)
            self.operators.append(Operator(name, work, _sizes(given), _sizes(made)))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _sizes(tensors: list[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}


def _operations(name: str, given: list[Tensor], made: list[Tensor]) -> float:
    if name in PRODUCTS:
        return 2.0 * made[0].numel() * given[-2].shape[-1]
    if "scaled_dot_product" in name:
        query, key = given[0 if "backward" not in name else 1], given[1 if "backward" not in name else 2]
        forward = 4.0 * query.numel() * key.shape[-2]
        return forward if "backward" not in name else 2 * forward
    return 0.0


def trace(recipe: Recipe) -> list[Operator]:
    """The operators of one forward and backward pass on the recipe's mixture, on one rank."""
    model = fake_model(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        inputs = {name: inputs_of(recipe)[name] for name in recipe.data.mixture}
        counts = recipe.data.mixture
        pixels = {
            name: torch.zeros(counts[name], 3, spec.frames, spec.size, spec.size, dtype=torch.uint8)
            for name, spec in inputs.items()
        }
        seeds = {name: torch.zeros(counts[name], dtype=torch.int64) for name in inputs}
        model(pixels, seeds)  # what is made once and remembered
        with _Tracer() as tracer:
            logits = model(pixels, seeds)
            torch.stack([values.square().mean() for values in logits.values()]).sum().backward()
    return tracer.operators


def fused(operators: list[Operator]) -> Iterator[tuple[str, int]]:
    """Kind and bytes of the kernels that are left when all between two products is one kernel."""
    last_read: dict[int, int] = {}
    for number, operator in enumerate(operators):
        last_read |= dict.fromkeys(operator.read, number)
    number = 0
    while number < len(operators):
        end = number + 1
        if operators[number].kind == "other":
            while end < len(operators) and operators[end].kind == "other":
                end += 1
        run = operators[number:end]
        written = {place: size for operator in run for place, size in operator.written.items()}
        read = {
            place: size for operator in run for place, size in operator.read.items() if place not in written
        }
        left = {place: size for place, size in written.items() if last_read.get(place, end) >= end}
        yield run[0].kind, sum(read.values()) + sum(left.values())
        number = end


def predict(case: Case, gpu: Gpu, update: str = "own") -> Prediction:
    """Predict the step of a case on one GPU."""
    recipe = Setting(torch.device("cpu")).recipe(case)
    operators = trace(recipe)
    seconds = {"product": 0.0, "attention": 0.0, "other": 0.0}
    rates = {"product": gpu.rate, "attention": gpu.attention, "other": math.inf}
    for operator in operators:
        by_work, by_bytes = operator.operations / rates[operator.kind], operator.bytes / gpu.bandwidth
        seconds[operator.kind] += max(by_work, by_bytes)
    kernels = list(fused(operators))
    compiled = sum(size for kind, size in kernels if kind == "other") / gpu.bandwidth
    trained = sum(p.numel() for p in fake_model(recipe).parameters() if p.requires_grad)
    updating = trained * UPDATE_BYTES[update] / gpu.bandwidth
    common = seconds["product"] + seconds["attention"] + updating
    work = operations(recipe, training=True) / gpu.rate
    return Prediction(
        name=case.name,
        products_s=seconds["product"],
        attention_s=seconds["attention"],
        other_s=seconds["other"],
        other_compiled_s=compiled,
        update_s=updating,
        kernels=len(operators),
        kernels_compiled=len(kernels),
        share=work / (common + seconds["other"]),
        share_compiled=work / (common + compiled),
    )


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    assumed = Gpu()
    parser.add_argument("--rate", type=float, default=assumed.rate, help="operations a second of a product")
    parser.add_argument("--bandwidth", type=float, default=assumed.bandwidth, help="bytes a second of a copy")
    parser.add_argument("--attention", type=float, default=assumed.attention, help="operations a second")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    gpu = Gpu(options.rate, options.bandwidth, options.attention)
    rows = [
        predict(Case(size, tokens, TOKENS_A_STEP // tokens // 8 * 8), gpu)
        for size in ("b", "l", "h")
        for tokens in TOKENS
    ]
    if options.json:
        print(json.dumps({"predicted": [asdict(row) for row in rows], "assumed": asdict(gpu)}, indent=1))
        return
    print("predicted, not measured; milliseconds of a step")
    print("| step | products | attention | the rest | compiled | update | kernels | share | compiled |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        times = (row.products_s, row.attention_s, row.other_s, row.other_compiled_s, row.update_s)
        cells = [row.name, *(f"{1e3 * value:.1f}" for value in times)]
        cells += [f"{row.kernels} / {row.kernels_compiled}", f"{row.share:.2f}", f"{row.share_compiled:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
