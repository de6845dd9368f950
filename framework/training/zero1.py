"""The update of ZeRO-1 in bf16: each rank reduces, measures and steps its share of the model.

DeepSpeed's own class holds the flat tensors and knows which parameter lies where; all that is left to it. Its
update, though, works on the gradients of the whole model on every rank, tensor by tensor, and lets the host
wait for the device twice before the optimizer is queued. What it moves through the memory of a rank that is
alone is 88 bytes a parameter in a step of one micro-batch, here it is 44.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from framework.training.host import Readback

__all__ = ["Zero1", "take_over"]


class Zero1(BF16_Optimizer):
    """DeepSpeed's optimizer for ZeRO-1 in bf16 with fp32 gradients, around torch's fused Adam or AdamW."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Give each rank the mean of its share of the gradients; what others own is left as it is."""
        self._clear_what_got_none()
        parts = zip(
            self.fp32_groups_gradients_flat,
            self.fp32_groups_gradient_flat_partition,
            self.real_dp_process_group,
            strict=True,
        )
        for whole, share, group in parts:
            if dist.get_world_size(group) > 1:
                dist.reduce_scatter_tensor(share, whole, op=dist.ReduceOp.AVG, group=group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip and update, unless a gradient is not finite: the host learns of it when all is queued."""
        norm = self._norm()
        finite = norm.isfinite()
        applied = Readback(finite)
        # The fused kernel divides gradients by the one and leaves weights and moments alone by the other.
        inner: Any = self.optimizer
        inner.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0) if self.clip_grad > 0 else None
        inner.found_inf = (~finite).float()
        shares = zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True)
        for weights, gradients in shares:
            weights.grad = gradients
        inner.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()
        self.clear_hp_grads()
        self._global_grad_norm = norm.where(finite, math.inf)
        self.overflow = not applied.read()

    def clear_hp_grads(self) -> None:
        """Let the next micro-batch write its gradients over what is there."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.clear_lp_grads(set_to_none)
        self.clear_hp_grads()

    @torch.no_grad()
    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        summed = self.fp32_groups_gradients[group_idx][param_idx]
        if self.fp32_groups_has_gradients[group_idx][param_idx]:
            summed.add_(lp.grad.view(-1))
        else:
            summed.copy_(lp.grad.view(-1))
        self.fp32_groups_has_gradients[group_idx][param_idx] = True

    def _clear_what_got_none(self) -> None:
        """Zeros where no micro-batch of the step wrote: a head whose source is not in the mixture."""
        groups = zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
        idle = [
            gradient
            for gradients, written in groups
            for gradient, there in zip(gradients, written, strict=True)
            if not there
        ]
        if idle:
            torch._foreach_zero_(idle)

    def _norm(self) -> Tensor:
        """The norm of the gradients of the whole model, the same on every rank."""
        norm = torch.nn.utils.get_total_norm(self.fp32_groups_gradient_flat_partition)
        if dist.get_world_size(self.dp_process_group) == 1:
            return norm
        squared = norm.square()
        dist.all_reduce(squared, group=self.dp_process_group)
        return squared.sqrt()


def take_over(optimizer: Any) -> None:
    """Make a DeepSpeed optimizer step as `Zero1`, if it is of the class that this is made for."""
    if type(optimizer) is not BF16_Optimizer:
        return
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.Adam) and inner.defaults["fused"]:
        optimizer.__class__ = Zero1
