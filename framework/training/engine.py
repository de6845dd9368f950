"""DeepSpeed: its configuration from the recipe's typed fields, and its start."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from framework.recipe.schema import Recipe
from framework.training.optim import build_optimizer
from framework.world import World

__all__ = ["compile_blocks", "deepspeed_config", "start_engine"]


def deepspeed_config(recipe: Recipe, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration; every key is set here, because it accepts unknown ones silently.

    Gradient clipping is always written: DeepSpeed's own default changed from off to 1.0.
    """
    engine = recipe.engine
    samples = sum(recipe.data.mixture.values()) // (world.size * recipe.train.accumulation)
    bucket = engine.bucket_mb * 2**20 // 4
    zero: dict[str, Any] = {
        "stage": engine.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Overlapped communication together with contiguous gradients has produced NaN under compilation.
        "overlap_comm": engine.zero == 3,
        "contiguous_gradients": True,
    }
    if engine.zero == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 4 * bucket,
            # The optimizer's step needs memory for one sub-group; DeepSpeed's default is the whole model.
            "sub_group_size": 2 * bucket,
        }
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": recipe.train.accumulation,
        "gradient_clipping": recipe.optimizer.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if engine.precision == "bf16":
        # Each gradient is added to the fp32 sum and freed as soon as it is there, not all of them at the end.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def unsharded_norm(engine: Any) -> torch.Tensor | None:
    """The norm of all gradients under ZeRO-0, where DeepSpeed keeps none; None under the other stages.

    To be asked between `backward` and `step`; right for the last micro-batch, whose gradients are the sum.
    """
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def compile_blocks(model: nn.Module) -> None:
    """Have every encoder block compiled at its first call, as one graph; blocks of one shape share it."""
    for name, lists in model.named_modules():
        if name.rpartition(".")[2].endswith("blocks"):
            for block in lists.children():
                block.compile(fullgraph=True, dynamic=False)


def import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    DeepSpeed asks in every step whether the optimizer is its Muon, which it is not; the first time, Muon's
    decorators would import torch's whole compiler, which costs every rank more than a second.
    """
    with contextlib.suppress(ImportError, AttributeError):  # of another version of DeepSpeed
        from deepspeed.runtime import compiler

        given = compiler.compile
        compiler.compile = lambda: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            compiler.compile = given


def start_engine(model: nn.Module, recipe: Recipe, world: World) -> Any:
    """Hand the model and its optimizer to DeepSpeed; returns its engine.

    The model comes with its weights already set: ZeRO-3 partitions what is there, and every stage takes its
    fp32 copy from it.
    """
    import deepspeed

    from framework.training.zero1 import take_over

    import_muon()
    if recipe.train.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, recipe.optimizer)
    # It prints how much memory is taken at each of its stages, and no setting of its own turns that off.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(recipe, world), dist_init_required=False
        )
    take_over(engine.optimizer)
    return engine
