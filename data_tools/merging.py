"""The end of sharding: finished shards get their final numbers, a manifest, and the name of their folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.items import DatasetPlan
from data_tools.report import REPORT_NAME, ShardReport, report_of
from data_tools.shard_plan import ShardPlan
from data_tools.shard_writer import ROW, ShardRecord, part_name, read_record
from data_tools.staging import FINAL, MERGING, remove_staging
from framework.data.manifest import MANIFEST_NAME, SAMPLES_NAME, TARGETS, DatasetInfo, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.errors import DataError
from framework.files import replace_text, sync_folder

__all__ = ["class_lists", "merge"]

_logger = logging.getLogger(__name__)


def merge(plan: ShardPlan, out: Path, overwrite: bool) -> ShardReport:
    """Number the shards without gaps, write manifest and report, and give the folder its name.

    Every step may be repeated: a merge that was killed is continued by the next.
    """
    staging, merging = plan.folder, plan.folder / MERGING
    records = [read_record(plan, n, merging=merging.exists()) for n in range(len(plan.shards))]
    if absent := [str(number) for number, record in enumerate(records) if record is None]:
        more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
        raise DataError(
            f"{staging}: {len(absent)} of {len(records)} shards are not made yet:"
            f" {', '.join(absent[:20])}{more}; make them: `tubeworks data shard run {out}`"
        )
    made = [record for record in records if record is not None]
    report = report_of(out, plan, made)
    if not report.written:
        remove_staging(staging)
        return report
    final = staging / FINAL
    final.mkdir(exist_ok=True)
    replace_text(merging, "")
    kept = [record for record in made if record.rows]
    for number, record in enumerate(kept):
        part = staging / part_name(record.number)
        if part.exists():
            part.rename(final / shard_name(number))
    _describe(final, plan, kept, report)
    _give_name(final, out, overwrite)
    remove_staging(staging)
    return report


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def _describe(final: Path, plan: ShardPlan, records: Sequence[ShardRecord], report: ShardReport) -> None:
    """Report, lists of classes and manifest, which comes last."""
    shards = [
        ShardInfo(shard_name(number), record.bytes, record.blake2b, len(record.rows))
        for number, record in enumerate(records)
    ]
    columns = _columns(records, plan.datasets)
    counts = [0] * len(plan.datasets)
    for dataset in columns["dataset"]:
        counts[dataset] += 1
    datasets = [
        DatasetInfo(d.name, d.split, d.kind, d.classes, count, d.target, d.heads)
        for d, count in zip(plan.datasets, counts, strict=True)
    ]
    for dataset in plan.datasets:
        for name, classes in class_lists(dataset):
            replace_text(final / name, "".join(f"{line}\n" for line in classes))
    replace_text(final / REPORT_NAME, report.to_json())
    write_manifest(final, columns, shards, datasets)


def class_lists(dataset: DatasetPlan) -> list[tuple[str, tuple[str, ...]]]:
    """The files that keep the classes of a data set for other programs: name, and a class for each line."""
    if dataset.heads:
        return [(f"{dataset.name}.{head.name}.classes.txt", head.classes) for head in dataset.heads]
    return [(f"{dataset.name}.classes.txt", dataset.classes)] if dataset.classes else []


def _give_name(final: Path, out: Path, overwrite: bool) -> None:
    old = out.with_name(out.name + ".old")
    if overwrite and out.exists():
        out.rename(old)
    final.rename(out)
    sync_folder(out.parent)
    if overwrite and old.exists():
        _remove(old)


def _columns(records: Sequence[ShardRecord], datasets: Sequence[DatasetPlan]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("shard", *ROW)}
    for number, record in enumerate(records):
        columns["shard"].extend([number] * len(record.rows))
        for name, values in zip(ROW, zip(*record.rows, strict=True), strict=True):
            columns[name].extend(values)
    if all(dataset.target == "single" for dataset in datasets):
        del columns[TARGETS.name]
    return columns


def _remove(old: Path) -> None:
    """Remove a replaced folder file by file: only what shards are made of."""
    ours = (*old.glob("shard-*.tar"), *old.glob("*.classes.txt"))
    for path in (*ours, old / SAMPLES_NAME, old / MANIFEST_NAME, old / REPORT_NAME):
        path.unlink(missing_ok=True)
    if any(old.iterdir()):
        _logger.warning("%s: kept, because it holds files that are no shards", old)
    else:
        old.rmdir()
