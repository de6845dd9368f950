"""What the benchmark measures, section by section; each gives plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.step.attention import KERNELS, attention_operations, attention_step
from benchmarks.step.joint import one_pass, padded, two_passes
from benchmarks.step.product import TOKENS, Case, Product, Setting, operations
from benchmarks.step.rivals import RIVALS, Shape, build_rival
from benchmarks.step.timing import Budget, Workbench
from benchmarks.step.tokenizers import WAYS, weight_gradients
from framework.forecast.footprint import Memory
from framework.models.registry import build_model, inputs_of, size_of

__all__ = [
    "Bench",
    "attention",
    "ceiling",
    "frozen",
    "joint",
    "largest",
    "profile",
    "rivals",
    "steps",
    "tokenizers",
]

TOKENS_A_STEP = 65_536
"""At most so many tokens in a micro-batch: more rows make a matrix product no faster."""
FAILURES = (RuntimeError, ImportError)
"""What a part may end with: no memory, a compiler that is missing, a kernel that is not there."""

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    setting: Setting
    workbench: Workbench
    budget: Budget

    @property
    def tiny(self) -> bool:
        """Whether this is the small version for tests."""
        return self.setting.tiny

    @property
    def many_tokens(self) -> int:
        """Those of the paper's clips of 64 frames."""
        return 539 if self.tiny else 1176

    def batch(self, case: Case) -> int:
        """The batch that a case is measured with."""
        return 2 if self.tiny else self.setting.fitting_batch(case, self.workbench.memory, TOKENS_A_STEP)


def ceiling(bench: Bench) -> dict[str, Any]:
    """The rate of one large bf16 matrix product, on random numbers."""
    size = 256 if bench.tiny else 8192
    first, second = (
        torch.randn(size, size, device=bench.setting.device, dtype=torch.bfloat16) for _ in range(2)
    )
    times = bench.workbench.time(lambda: first @ second, repeats=100)
    return {"size": size, "flops_per_s": 2 * size**3 / times.median_s, **asdict(times)}


def steps(bench: Bench, rate: float) -> Rows:
    """Forward pass and full step of every size and token count, and variants of some."""
    for case in _tiny_cases() if bench.tiny else _step_cases():
        if bench.budget.allows(f"step: {case.name}", 45 if case.compile else 12):
            yield from _measured(bench, replace(case, batch=bench.batch(case)), rate)


def _step_cases() -> Iterator[Case]:
    """The most telling first, in case the time does not suffice for all."""
    for compiled in (False, True):
        for size in ("h", "b", "l"):
            for tokens in (539, 1176):
                yield Case(size, tokens, 0, compile=compiled)
    yield Case("h", 539, 0, joint=True, compile=True)
    yield Case("h", 539, 0, checkpointing=True)
    for size in ("h", "b", "l"):
        yield Case(size, 735, 0, compile=True)
    yield Case("b", 1176, 0, joint=True, compile=True)
    yield Case("h", 1176, 0, checkpointing=True, compile=True)
    for size in ("h", "b", "l"):
        yield Case(size, 735, 0)


def _tiny_cases() -> Iterator[Case]:
    """Every kind of case but the compiled ones, which take a minute on a CPU."""
    yield Case("b", 539, 0)
    yield Case("b", 539, 0, checkpointing=True)
    yield Case("b", 539, 0, joint=True)


def _measured(bench: Bench, case: Case, rate: float) -> Rows:
    with _product(bench, case) as product:
        if isinstance(product, str):
            yield _facts(bench, case) | {"kind": "step", "failed": product}
            return
        for kind, work in (("forward", product.forward), ("step", product.step)):
            try:
                times = bench.workbench.time(work)
                peak = bench.workbench.peak_of(work)
            except FAILURES as error:
                yield _facts(bench, case) | {"kind": kind, "failed": _first_line(error)}
                continue
            done = operations(product.recipe, training=kind == "step") / times.median_s
            yield (
                _facts(bench, case)
                | {"kind": kind, **asdict(times), "flops_per_s": done, "share": done / rate}
                | {"peak_bytes": peak, "predicted_bytes": Memory(product.recipe).footprint(1).total}
                | {"clips_per_s": case.batch / times.median_s}
            )


def _facts(bench: Bench, case: Case) -> dict[str, Any]:
    size = size_of(bench.setting.recipe(replace(case, batch=max(1, case.batch))).model)
    return {**asdict(case), "name": case.name, "width": size.width, "depth": size.depth}


@contextmanager
def _product(bench: Bench, case: Case) -> Iterator[Product | str]:
    """An engine for a case, or why there is none; its memory is free again afterwards."""
    product: Product | None = None
    try:
        product = Product(bench.setting, case)
        yield product
    except FAILURES as error:
        if product is not None:
            raise
        yield _first_line(error)
    finally:
        if product is not None:
            product.close()
        del product
        bench.workbench.clear()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def rivals(bench: Bench, done: list[dict[str, Any]], rate: float) -> Rows:
    """Others' training steps at the width, depth, tokens and batch of this framework's."""
    for own in [row for row in done if row["kind"] == "step" and _compared(row)]:
        shape = Shape(own["width"], own["depth"], _heads(bench, own), own["tokens"], own["batch"])
        for name in RIVALS:
            for compiled in (False,) if bench.tiny else (False, True):
                label = f"rival: {name}, {own['name']}{', compile' if compiled else ''}"
                if bench.budget.allows(label, 50 if compiled else 12):
                    row = _rival(bench, name, shape, own, compiled) | {"size": own["size"]}
                    share = {"share": row["operations"] / row["median_s"] / rate} if "median_s" in row else {}
                    yield row | share


def _compared(row: dict[str, Any]) -> bool:
    plain = not (row["joint"] or row["compile"] or row["checkpointing"] or row.get("failed"))
    return plain and (row["size"], row["tokens"]) in {("h", 539), ("h", 1176), ("b", 539)}


def _heads(bench: Bench, row: dict[str, Any]) -> int:
    return size_of(bench.setting.recipe(Case(row["size"], row["tokens"], 1)).model).heads


def _rival(bench: Bench, name: str, shape: Shape, own: dict[str, Any], compiled: bool) -> dict[str, Any]:
    facts = {"rival": name, "tokens": shape.tokens, "batch": shape.batch, "compile": compiled}
    facts["operations"] = own["flops_per_s"] * own["median_s"]
    try:
        rival = build_rival(name, shape, bench.setting.device)
        if compiled:
            rival.model.compile()
        times = bench.workbench.time(rival.step)
    except ImportError as error:
        return facts | {"failed": f"not installed here ({error})"}
    except Exception as error:  # noqa: BLE001 - what another library cannot do here is a result
        return facts | {"failed": _first_line(error)}
    finally:
        rival = None
        bench.workbench.clear()
    return facts | asdict(times) | {"ours_is_faster_by": times.median_s / own["median_s"]}


def tokenizers(bench: Bench, done: list[dict[str, Any]]) -> Rows:
    """Forward and backward of the tokenizer in three ways, and its share of the step."""
    for tokens in TOKENS:
        own = next((r for r in done if r["kind"] == "step" and r["tokens"] == tokens and "share" in r), None)
        if own is None or not bench.budget.allows(f"tokenizer: {tokens} tokens", 15):
            continue
        recipe = bench.setting.recipe(Case(own["size"], tokens, own["batch"]))
        with bench.setting.device:
            model = build_model(recipe.model, inputs_of(recipe))
        tokenizer: Any = model.tokenizer.to(torch.float32 if bench.tiny else torch.bfloat16)
        spec = inputs_of(recipe)["k400"]
        shape = (own["batch"], 3, spec.frames, spec.size, spec.size)
        clip = torch.randint(256, shape, dtype=torch.uint8, device=bench.setting.device)
        for name in WAYS:
            yield {"tokens": tokens, "step": own["name"]} | _way(
                bench, name, tokenizer, clip, own["median_s"]
            )
        del model, tokenizer, clip
        bench.workbench.clear()


def _way(bench: Bench, name: str, tokenizer: Any, clip: torch.Tensor, step_s: float) -> dict[str, Any]:
    try:
        make = WAYS[name](tokenizer, clip)
        times = bench.workbench.time(lambda: weight_gradients(tokenizer, make))
    except FAILURES as error:
        return {"way": name, "failed": _first_line(error)}
    return {"way": name, **asdict(times), "share_of_step": times.median_s / step_s}


def attention(bench: Bench) -> Rows:
    """The kernels of attention: heads of 64 channels (B and L) and of 80 (H), clips and images."""
    for heads, head_width in ((12, 64), (16, 80)):
        for tokens in (20,) if bench.tiny else (196, 539, 1176):
            samples = 2 if bench.tiny else max(1, TOKENS_A_STEP // tokens)
            if not bench.budget.allows(f"attention: {heads} heads of {head_width}, {tokens} tokens", 5):
                continue
            dtype = torch.float32 if bench.tiny else torch.bfloat16
            shape = (samples, tokens, 3 * heads * head_width)
            qkv = torch.randn(shape, device=bench.setting.device, dtype=dtype)
            work = attention_operations(samples, tokens, heads * head_width)
            facts = {"tokens": tokens, "head_width": head_width, "batch": samples}
            for name, kernel in KERNELS.items():
                try:
                    times = bench.workbench.time(attention_step(qkv, heads, kernel))
                except FAILURES as error:
                    yield facts | {"kernel": name, "failed": _first_line(error)}
                else:
                    rates = {"flops_per_s": work / times.median_s}
                    yield facts | {"kernel": name, **asdict(times), **rates}
            del qkv
            bench.workbench.clear()


def joint(bench: Bench) -> Rows:
    """One pass, two passes and padding, forward and backward: the paper's batch on eight GPUs, and on 32."""
    ways: dict[str, Callable[..., Callable[[], None]]] = {
        "one pass": one_pass,
        "two passes": two_passes,
        "padded with a mask": padded,
    }
    for size in ("b",) if bench.tiny else ("b", "h"):
        for batch in (2,) if bench.tiny else (32, 8):
            if not bench.budget.allows(f"joint: {size.upper()} {batch} + {batch}", 15):
                continue
            case = Case(size, bench.many_tokens, batch, joint=True)
            recipe = bench.setting.recipe(case)
            with bench.setting.device:
                model: Any = build_model(recipe.model, inputs_of(recipe))
            model = model if bench.tiny else model.bfloat16()
            pixels = {
                name: torch.randint(
                    256,
                    (batch, 3, spec.frames, spec.size, spec.size),
                    dtype=torch.uint8,
                    device=bench.setting.device,
                )
                for name, spec in inputs_of(recipe).items()
            }
            for name, way in ways.items():
                facts = {"way": name, "size": size, "clips": batch, "images": batch}
                try:
                    yield facts | asdict(bench.workbench.time(way(model, pixels)))
                except FAILURES as error:
                    yield facts | {"failed": _first_line(error)}
                model.zero_grad(set_to_none=True)
            del model, pixels
            bench.workbench.clear()


def frozen(bench: Bench) -> Rows:
    """The scale-up stage's step with a frozen prefix, against training everything, which comes first."""
    full: dict[str, Any] | None = None
    case = Case("h", bench.many_tokens, 0, scale_up=0)
    batch = bench.batch(case)
    for count in (0, 1) if bench.tiny else (0, 24, 26):
        case = replace(case, scale_up=count, batch=batch)
        if not bench.budget.allows(f"frozen: {count} layers", 12):
            continue
        row = _frozen_row(bench, case)
        if "median_s" in row:
            full = row if count == 0 else full
            if full is not None:
                row["time_of_full"] = row["median_s"] / full["median_s"]
                row["operations_of_full"] = row["operations"] / full["operations"]
        yield row


def _frozen_row(bench: Bench, case: Case) -> dict[str, Any]:
    facts: dict[str, Any] = {"frozen_layers": case.scale_up, "batch": case.batch}
    with _product(bench, case) as product:
        if isinstance(product, str):
            return facts | {"failed": product}
        try:
            times = bench.workbench.time(product.step)
        except FAILURES as error:
            return facts | {"failed": _first_line(error)}
        return facts | asdict(times) | {"operations": operations(product.recipe, training=True)}


def largest(bench: Bench) -> Rows:
    """The largest micro-batch of H that really trains, beside the one that is predicted."""
    for checkpointing in (False, True):
        for offload in (False,) if bench.tiny else (False, True):
            case = Case("h", bench.many_tokens, 1, checkpointing=checkpointing, offload=offload)
            if bench.budget.allows(f"largest: {case.name}", 40):
                recipe = bench.setting.recipe(case)
                room = Memory(recipe).largest_micro_batch(
                    1, bench.workbench.memory, checkpointing=checkpointing
                )
                predicted = min(room, 2) if bench.tiny else room
                found = _largest_that_runs(bench, case, predicted)
                yield {
                    "checkpointing": checkpointing,
                    "offload": offload,
                    "predicted": predicted,
                    "found": found,
                }


def _largest_that_runs(bench: Bench, case: Case, predicted: int) -> int:
    """Try around the prediction: upwards by a tenth while it runs, downwards while it does not.

    At most four tries, and none that the time does not suffice for; 0: none of them ran.
    """
    tenth = max(1, predicted // 10)
    best, trial, direction = 0, max(1, predicted), 0
    for _ in range(4):
        if not bench.budget.allows(f"largest: {replace(case, batch=trial).name}", 10):
            break
        if _runs(bench, replace(case, batch=trial)):
            best = max(best, trial)
            if direction < 0:
                break
            direction = 1
        else:
            if direction > 0:
                break
            direction = -1
        trial += direction * tenth
        if trial < 1:
            break
    return best


def _runs(bench: Bench, case: Case) -> bool:
    with _product(bench, case) as product:
        if isinstance(product, str):
            return False
        try:
            product.step()
            product.step()
            bench.workbench.wait()
        except FAILURES:  # above all, out of memory
            return False
        return True


def profile(bench: Bench) -> str:
    """The table of kernels of one step of the largest model."""
    case = Case("h", 539, 0, compile=not bench.tiny)
    if not bench.budget.allows("profile", 60):
        return ""
    with _product(bench, replace(case, batch=bench.batch(case))) as product:
        if isinstance(product, str):
            return product
        bench.workbench.time(product.step, repeats=1)  # compiles
        on_gpu = bench.setting.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as recorded:
            product.step()
            bench.workbench.wait()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        return f"{product.case.name}\n" + recorded.key_averages().table(sort_by=order, row_limit=30)
