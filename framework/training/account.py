"""What became of every tensor when a model was filled with the weights of others."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Account"]

_BLOCK = re.compile(r"\bblocks\.\d+\.")


@dataclass
class Account:
    """What became of every tensor: where the model's come from, and what was not taken."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Name in the model: `role:name in the checkpoint`."""
    resized: dict[str, str] = field(default_factory=dict)
    """The same for tensors that were changed on the way, with how behind it in brackets."""
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """`role:name in the checkpoint`."""

    def table(self) -> str:
        """What happened, name, from where, and how many; a line stands for all blocks of the encoder."""
        lines = [("loaded", name, f"from {source.partition(':')[0]}") for name, source in self.loaded.items()]
        for name, source in self.resized.items():
            role, how = source.partition(":")[0], source.rpartition(" (")[2]
            lines.append(("resized", name, f"from {role} ({how}"))
        lines += [("new", name, "") for name in self.new]
        lines += [("unused", name, "") for name in self.unused]
        counts = Counter((what, _BLOCK.sub("blocks.*.", name), source) for what, name, source in lines)
        return "\n".join(
            f"  {what:<7} {name} {source}".rstrip() + (f" x {count}" if count > 1 else "")
            for (what, name, source), count in counts.items()
        )
