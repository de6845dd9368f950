"""Small tensors on their way from the host to the device and back, while the device computes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Readback", "sent"]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device; a copy from memory that is not pinned would wait for it."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


class Readback:
    """A copy of a small tensor for the host: begun now, waited for when it is read.

    What is queued in between keeps the device busy while the host waits; `.item()` would first let the device
    run dry.
    """

    def __init__(self, values: Tensor) -> None:
        on_gpu = values.device.type == "cuda"
        self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=on_gpu)
        self._host.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
