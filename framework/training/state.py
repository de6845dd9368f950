"""The trainable state of a run, seen the same way under every ZeRO stage.

DeepSpeed keeps the fp32 weights and the optimizer's moments in flat tensors: one per parameter without
ZeRO, one per parameter group and rank in ZeRO-1 and 2, one per sub-group and rank in ZeRO-3. A `Fragment`
says which elements of which named parameter lie where in a flat tensor. Everything that must survive
(weights, moments, moving averages) is saved and restored by fragments, so a checkpoint does not depend on
the number of ranks or the stage that wrote it, and nothing is gathered to write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from framework.training.checkpoint_manifest import AVERAGE, WEIGHT

__all__ = ["Flat", "Fragment", "TrainState"]


@dataclass(frozen=True)
class Fragment:
    """`count` elements of parameter `name` from `start`, which lie at `offset` of a flat tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass
class Flat:
    """One flat fp32 tensor that the optimizer steps, and what it is made of."""

    tensor: Tensor
    fragments: list[Fragment] = field(default_factory=list)


class TrainState:
    """Weights, optimizer moments and moving average of the trainable parameters that this rank owns."""

    def __init__(self, engine: Any, ema_decay: float | None) -> None:
        self._optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.flats = _flats_of(engine)
        self.replicated: bool = engine.zero_optimization_stage() == 0
        """Without ZeRO every rank owns everything."""
        self._share = 1.0 - (ema_decay or 0.0)
        self._averages = [flat.tensor.detach().clone() for flat in self.flats] if ema_decay else []

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights after an applied step: a <- decay a + (1 - decay) w."""
        for flat, average in zip(self.flats, self._averages, strict=False):  # no averages without a decay
            average.lerp_(flat.tensor.detach(), self._share)

    @property
    def kinds(self) -> list[str]:
        """What is saved of each parameter: weight, average where one is kept, and the moments' names."""
        moments = sorted({name for flat in self.flats for name in self._moments(flat)})
        return [WEIGHT, *([AVERAGE] if self._averages else []), *moments]

    def tensors(self, kind: str) -> Iterator[tuple[Fragment, Tensor]]:
        """The fragments of a kind, each with a 1-D fp32 view of its values."""
        for index, flat in enumerate(self.flats):
            tensor = self._of_kind(kind, index)
            for fragment in flat.fragments:
                yield fragment, tensor.detach().view(-1)[fragment.offset : fragment.offset + fragment.count]

    def optimizer_steps(self) -> int:
        """How often the optimizer stepped; Adam's bias correction counts in it."""
        steps = [int(state["step"]) for state in self._optimizer.state.values() if "step" in state]
        return max(steps, default=0)

    @torch.no_grad()
    def restore(self, read: Callable[[str, Fragment], Tensor], kinds: set[str], optimizer_steps: int) -> None:
        """Fill the flat tensors from a checkpoint.

        Args:
            read: gives the 1-D fp32 values of a fragment for a kind.
            kinds: what the checkpoint holds (weight, average and the moments' names).
            optimizer_steps: from `optimizer_steps()` when it was saved.
        """
        for index, flat in enumerate(self.flats):
            targets = {WEIGHT: flat.tensor, **self._create_moments(flat, kinds, optimizer_steps)}
            if self._averages:
                targets[AVERAGE] = self._averages[index]
            for kind, tensor in targets.items():
                source = kind if kind in kinds else WEIGHT  # an average that was not kept starts there
                for fragment in flat.fragments:
                    view = tensor.detach().view(-1)[fragment.offset : fragment.offset + fragment.count]
                    view.copy_(read(source, fragment))

    def _of_kind(self, kind: str, index: int) -> Tensor:
        if kind == WEIGHT:
            return self.flats[index].tensor
        if kind == AVERAGE:
            return self._averages[index]
        tensor = self._moments(self.flats[index]).get(kind)
        # Without ZeRO the optimizer has nothing on a head whose source is not in the mixture.
        return torch.zeros_like(self.flats[index].tensor) if tensor is None else tensor

    def _moments(self, flat: Flat) -> dict[str, Tensor]:
        state = self._optimizer.state.get(flat.tensor, {})
        return {
            key: value
            for key, value in state.items()
            if key != "step" and isinstance(value, Tensor) and value.shape == flat.tensor.shape
        }

    def _create_moments(self, flat: Flat, kinds: set[str], steps: int) -> dict[str, Tensor]:
        """Make the entries that the optimizer would make lazily in its first step."""
        names = sorted(kinds - {WEIGHT, AVERAGE})
        moments: dict[str, Any] = {name: torch.zeros_like(flat.tensor) for name in names}
        if not moments:  # plain SGD, or no step was ever applied
            return moments
        if isinstance(self._optimizer, torch.optim.Adam):  # AdamW is an Adam
            fused = bool(self._optimizer.defaults.get("fused"))
            device = flat.tensor.device if fused else torch.device("cpu")
            self._optimizer.state[flat.tensor] = {
                "step": torch.tensor(float(steps), device=device),
                **moments,
            }
        else:
            self._optimizer.state[flat.tensor] = dict(moments)
        return moments


def _flats_of(engine: Any) -> list[Flat]:
    """Find the flat tensors behind DeepSpeed's optimizer (tested with 0.19)."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _flats_of_stage_3(engine.optimizer, named, engine.global_rank)
    if stage > 0:
        return _flats_of_stage_1_2(engine.optimizer, named)
    return [Flat(p, [Fragment(name, 0, p.numel(), 0)]) for name, p in named]


def _flats_of_stage_1_2(optimizer: Any, named: list[tuple[str, nn.Parameter]]) -> list[Flat]:
    # ZeRO-1 with bf16 weights and fp32 gradients is a class of its own, with another name for the same thing.
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    tensors = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    flats = [Flat(tensor) for tensor in tensors]
    for name, parameter in named:
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # no element of this parameter belongs to this rank
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        flats[mapping.param_group_index].fragments.append(Fragment(name, low.start, low.numel, high.start))
    return flats


def _flats_of_stage_3(optimizer: Any, named: list[tuple[str, nn.Parameter]], rank: int) -> list[Flat]:
    flats = [Flat(tensor) for tensor in optimizer.fp32_partitioned_groups_flat]
    for name, parameter in named:
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        total: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = rank * padded
        count = min(padded, total - start)
        if count > 0:
            flats[group].fragments.append(Fragment(name, start, count, int(offset)))
    return flats
