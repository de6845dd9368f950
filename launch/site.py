"""What is the same for every run of a site: one YAML file, checked like a recipe."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from framework.errors import RecipeError

__all__ = ["Container", "Site", "default_site", "load_site", "minutes"]

SECRET = re.compile(r"(?i)(password|passwd|secret|token|api_?key|credential)")


def default_site() -> Path:
    """Where the file is looked for."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "tubeworks" / "site.yaml"


def minutes(text: str) -> int:
    """Minutes of Slurm's time limits: `90`, `1:30:00`, `2-12`, `2-12:30`; seconds are rounded up.

    Errors:
        ValueError: it is no such limit.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"`{text}` is no time limit: write minutes, H:MM:SS, or D-HH:MM")
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found.group(1) is not None:  # days-hours[:minutes[:seconds]]
        total = days * 1440 + first * 60 + second + -(-third // 60)
    elif found.group(4) is not None:  # hours:minutes:seconds
        total = first * 60 + second + -(-third // 60)
    else:  # minutes[:seconds]
        total = first + -(-second // 60)
    if total < 1:
        raise ValueError(f"`{text}` is less than a minute")
    return total


def _time_limit(text: str) -> str:
    minutes(text)
    return text


def _no_secrets(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if SECRET.search(name):
            raise ValueError(
                f"{name} looks like a secret and would be written into scripts; export it in the shell that "
                "submits, and jobs will have it"
            )
    return values


class Section(BaseModel):
    """Closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Container(Section):
    """A container for the ranks, started by srun (pyxis); the batch script itself runs outside of it."""

    image: str
    mounts: list[str] = Field(default_factory=list)
    """`SOURCE:TARGET[:FLAGS]`; the shards must be seen inside under the same paths. The folder in which the
    run folder lies is always mounted: MLflow's default store is there, and the code of a sweep."""
    python: str = "python3"
    """The Python inside, which has everything installed that tubeworks needs."""


class Preflight(Section):
    """What every node has to show before ranks start on it; a node that does not is avoided."""

    enabled: bool = True
    scratch: str | None = None
    """Folder on the node's own disk; by default TMPDIR, or /tmp."""
    scratch_gb: Annotated[float, Field(ge=0)] = 1.0
    run_gb: Annotated[float, Field(ge=0)] = 1.0
    """Free where the run folder is."""
    read_mb: Annotated[float, Field(ge=0)] = 0.0
    """Megabytes a second at least, from a shard."""
    reduce_mb: Annotated[float, Field(ge=0)] = 0.0
    """Megabytes a second at least, through an all-reduce of all nodes."""
    clock_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How far clocks may be apart."""
    seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long each check may take."""
    checks: list[str] = Field(default_factory=list)
    """Commands for bash; a node on which one fails is a bad node."""
    valid_minutes: Annotated[float, Field(ge=0)] = 60.0
    """A node that has passed is not checked again for so long, unless the run crashed on it."""
    exclude_hours: Annotated[float, Field(gt=0)] = 24.0
    """How long a bad node stays in RUN/bad_nodes.json."""


class Site(Section):
    """Defaults of `tubeworks launch`; options of the command line come before them."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodes: Annotated[int, Field(gt=0)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    ranks_per_node: Annotated[int, Field(gt=0)] | None = None
    """By default one per GPU."""
    cpus_per_rank: Annotated[int, Field(gt=0)] | None = None
    memory_per_node: str | None = None
    """As `sbatch --mem` takes it; by default the partition's."""
    time: Annotated[str, AfterValidator(_time_limit)] = "24:00:00"
    signal_seconds: Annotated[int, Field(ge=10, le=3600)] = 120
    """How long before the time limit the ranks are told to save; Slurm may be a minute early."""
    max_requeues: Annotated[int, Field(ge=0)] = 50
    """How often a job goes back into the queue by itself; preemptions do not count."""
    max_crashes: Annotated[int, Field(gt=0)] = 3
    """So many attempts in a row without a newer checkpoint end the run."""
    runs: str = "runs"
    """Folder of run folders, on a file system that all nodes see."""
    container: Container | None = None
    preflight: Preflight = Field(default_factory=Preflight)
    environment: Annotated[dict[str, str], AfterValidator(_no_secrets)] = Field(default_factory=dict)
    """Variables for the ranks, such as NCCL_SOCKET_IFNAME; no secrets."""
    setup: list[str] = Field(default_factory=list)
    """Lines for the batch script, such as `module load cuda`."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """More options of sbatch: `{reservation: maintenance}`."""
    srun: list[str] = Field(default_factory=list)
    """More options of srun: `["--mpi=none"]`."""


def load_site(path: Path | None) -> Site:
    """Read a site file; without a path the user's, and defaults where there is none.

    Errors:
        RecipeError: it cannot be read, or says something that no site can say.
    """
    if path is None:
        path = default_site()
        if not path.is_file():
            return Site()
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = YAML(typ="safe", pure=True).load(text) or {}
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise RecipeError(f"cannot read the site file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"the site file {path} must hold keys and values, such as `partition: gpu`")
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n  ".join([f"{path} is not a site file:", *_explained(error, text)])) from error


def _explained(error: ValidationError, text: str) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            sections = {"container": Container, "preflight": Preflight}
            known = sections.get(str(problem["loc"][0]), Site).model_fields
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            guess = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
            message = f"there is no such key; {guess}"
        number = next(
            (
                n
                for n, line in enumerate(text.splitlines(), 1)
                if line.strip().startswith(f"{problem['loc'][-1]}:")
            ),
            None,
        )
        lines.append(f"line {number}: {key}: {message}" if number else f"{key}: {message}")
    return lines
