"""Corrupt samples of a training: out on all ranks at once, and out again whenever the steps are replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rank_processes import journalled, start_training, train_to_end
from typer.testing import CliRunner

from framework.data.manifest import Manifest
from framework.data.quarantine import quarantine_path, read_quarantine
from launch.cli import app


@pytest.fixture(scope="module")
def damaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training shards in which every third video has a flipped bit."""
    folder = Path(shutil.copytree(shards / "train", tmp_path_factory.mktemp("damaged") / "train"))
    manifest = Manifest.open(folder)
    for place in manifest.select("motion", "motion", "video")[::3].tolist():
        sample = manifest.sample(place)
        with (folder / sample.shard).open("r+b") as file:
            file.seek(sample.offset + sample.length // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))
    return folder


def over(folder: Path) -> list[str]:
    return [
        "data.on_corrupt=substitute",
        *(f"data.sources.{name}.path={folder}" for name in ("motion", "digits")),
    ]


@pytest.fixture(scope="module")
def whole_run(recipe_file: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps over damaged shards on two ranks, with workers that work ahead."""
    run = tmp_path_factory.mktemp("runs") / "run"
    return train_to_end(recipe_file, run, 2, *over(damaged), "data.workers=1")


def test_every_corrupt_sample_is_found_once_and_named(whole_run: Path, damaged: Path) -> None:
    manifest = Manifest.open(damaged)
    bad = [manifest.sample(place) for place in manifest.select("motion", "motion", "video")[::3].tolist()]
    entries = read_quarantine(whole_run).entries
    assert {entry.key for entry in entries} == {sample.key for sample in bad}
    assert len(entries) == len(bad), "6 steps of 8 are two epochs of 24: each is met twice and found once"
    places = {(sample.shard, sample.offset) for sample in bad}
    assert {(entry.shard, entry.offset) for entry in entries} == places
    listed = CliRunner().invoke(app, ["data", "quarantine", "list", str(whole_run), "--json"])
    assert {row["key"] for row in json.loads(listed.stdout)} == {sample.key for sample in bad}
    assert all("checksum" in row["reason"] for row in json.loads(listed.stdout))


def test_steps_that_are_replayed_feed_the_same_even_if_the_shards_have_healed(
    whole_run: Path, recipe_file: Path, shards: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train_to_end(recipe_file, run, 1, *over(shards / "train"))
    replayed, before = journalled(run), journalled(whole_run)
    for step in (4, 5, 6):
        for key in ("train/loss", "train/motion/loss", "train/digits/loss"):
            assert replayed[step][key] == pytest.approx(before[step][key], rel=1e-4)
    assert read_quarantine(run).entries == read_quarantine(whole_run).entries


def test_a_quarantine_that_contradicts_the_checkpoint_is_refused(
    whole_run: Path, recipe_file: Path, damaged: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole_run, tmp_path / "run"))
    lines = quarantine_path(run).read_text().splitlines(keepends=True)
    quarantine_path(run).write_text("".join(lines[1:]))
    job = start_training(recipe_file, run, 2, *over(damaged))
    assert job.wait() == [4, 4]
    assert "quarantine.jsonl is not what the checkpoint of step 6 was trained with" in job.said(1)


def test_the_limit_counts_the_corrupt_samples_of_all_ranks(
    recipe_file: Path, damaged: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *over(damaged), "data.max_corrupt=2")
    assert job.wait() == [3, 3]
    for rank in range(2):
        assert "corrupt samples on all ranks, more than data.max_corrupt=2; the last: checksum" in job.said(
            rank
        )
    entries = read_quarantine(run).entries
    assert 3 <= len(entries) <= 8
    named = f"{len(entries)} corrupt samples"
    assert named in job.said(), "what was found is written down, although the run stops"


def test_samples_are_taken_out_and_let_back_in_by_hand(
    trained: Path, recipe_file: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")

    def data(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["data", "quarantine", *arguments])
        return result.exit_code, result.output

    listing = CliRunner().invoke(app, ["data", "plan", str(recipe_file), "--step", "4", "--json"])
    rows = json.loads(listing.stdout)["micro_batches"][0]["motion"]
    out, back = rows[0]["key"], rows[1]["key"]
    assert data("add", str(run), out, back, "--source", "motion", "--reason", "blurred")[0] == 0
    assert data("remove", str(run), back, "--source", "motion")[0] == 0
    code, text = data("list", str(run))
    assert code == 0
    assert "1 sample in quarantine" in text
    assert all(part in text for part in (out, "from step 3", "blurred"))
    assert data("add", str(run), out, "--source", "motion", "--from-step", "2")[0] == 3
    assert data("add", str(run), "nobody", "--source", "motion")[0] == 3
    assert data("remove", str(run), back, "--source", "motion")[0] == 3
    assert data("list", str(tmp_path))[0] == 3
    train_to_end(recipe_file, run, 2)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    replaced = [event for event in events if event["kind"] == "replaced"]
    assert replaced
    assert {event["key"] for event in replaced} == {out}
    assert min(event["step"] for event in replaced) >= 3


def test_a_sample_that_hangs_its_decoder_is_replaced_on_all_ranks(
    recipe_file: Path, shards: Path, tmp_path: Path
) -> None:
    """The picture is whole and takes minutes: only the time limit of its worker ends that."""
    from data_tools.verify import verify

    folder = Path(shutil.copytree(shards / "train", tmp_path / "train"))
    key = put_in_an_endless_picture(folder)
    assert not verify(folder, decode=False, workers=1).problems
    run = tmp_path / "run"
    train_to_end(recipe_file, run, 2, *over(folder), "data.workers=1", "data.decode_seconds=2")
    (entry,) = read_quarantine(run).entries
    assert entry.key == key
    assert "costs data workers their lives: one hung for" in entry.reason
    audited = json.loads(CliRunner().invoke(app, ["data", "audit", str(run), "--json"]).stdout)
    assert audited["exactly_once"]
    replaced = [epoch["replaced"] for epoch in audited["sources"]["digits"]["epochs"]]
    assert [[sample["key"] for sample in samples] for samples in replaced] == [[key], [key]]


def put_in_an_endless_picture(folder: Path) -> str:
    """Write the folder's shard anew, with one picture that repeats its last scan; returns its key."""
    import io
    import tarfile
    import zlib

    import pyarrow
    from PIL import Image

    from framework.data.manifest import SAMPLES_NAME, SCHEMA, ShardInfo
    from framework.data.manifest_writer import write_manifest
    from framework.files import hash_file

    file = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(file, "JPEG", progressive=True)
    plain = file.getvalue()
    endless = plain[:-2] + plain[plain.rindex(b"\xff\xda") : -2] * 20_000 + plain[-2:]
    manifest = Manifest.open(folder)
    victim = manifest.sample(int(manifest.select("digits", "digits", "image")[5]))
    (shard,) = manifest.shards
    members = []
    with tarfile.open(folder / shard.name) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name.startswith(victim.key + ".") and member.offset_data == victim.offset:
                data = endless
            members.append((member.name, data))
    with tarfile.open(folder / shard.name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(folder / shard.name) as tar:
        offsets = {member.name: (member.offset_data, member.size) for member in tar}
    with pyarrow.memory_map(str(folder / SAMPLES_NAME)) as mapped:
        rows = pyarrow.ipc.open_file(mapped).get_batch(0).to_pylist()
    for row in rows:
        row["offset"], row["length"] = offsets[f"{row['key']}.{row['extension']}"]
        if row["key"] == victim.key:
            row.update(crc32=zlib.crc32(endless), width=4000, height=4000)
    size = (folder / shard.name).stat().st_size
    info = ShardInfo(shard.name, size, hash_file(folder / shard.name), shard.samples)
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    write_manifest(folder, columns, [info], manifest.datasets)
    return victim.key
