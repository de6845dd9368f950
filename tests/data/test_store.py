"""Promises of remote stores, against real servers: what passes is waited for, what does not is told."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.data import store as store_module
from framework.data.manifest import MANIFEST_NAME, Manifest
from framework.data.remote import TABLE_DAYS, RemoteFolder
from framework.data.shards import ShardReader
from framework.data.store import Patience, RemoteStore, reason_of
from framework.data.urls import parse_location, redacted
from framework.errors import CorruptSample, DataError
from framework.recipe.cache_section import Cache


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server; yields `host:port`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, shards: Path) -> Iterator[Callable[[str], None]]:
    """The shards at s3://shards/mixed; the function points clients to another server before it."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key-for-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-for-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{s3}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="shards")
    for file in shards.iterdir():
        client.upload_file(str(file), "shards", f"mixed/{file.name}")
    yield lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for found in client.list_objects_v2(Bucket="shards")["Contents"]:
        client.delete_object(Bucket="shards", Key=found["Key"])
    client.delete_bucket(Bucket="shards")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A small cache with little patience, and pieces so small that shards have several."""
    monkeypatch.setattr(store_module, "PIECE", 8192)
    monkeypatch.setattr(store_module, "_LONGEST_PAUSE", 0.05)
    return Cache(folder=str(tmp_path / "cache"), stall_seconds=0.5, patience_seconds=20)


def check_all(manifest: Manifest, shards: Path) -> None:
    """Every sample, read through the store, is the one on the disk."""
    near, far = Manifest.open(shards), ShardReader(manifest.folder, "x", remote=manifest.remote)
    here = ShardReader(shards, "x")
    assert (manifest.hash, len(manifest)) == (near.hash, len(near))
    manifest.check_table()
    for index in range(len(manifest)):
        sample = manifest.sample(index)
        assert far.verify(sample, far.read(sample)) == here.read(near.sample(index))


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files only"])
def test_shards_over_http_that_fails(ranges: bool, shards: Path, settings: Cache, flaky: Any) -> None:
    faults = flaky.Faults(fail=5, stall=11, cut=7, ranges=ranges)
    with flaky.file_server(shards.parent, faults) as url:
        check_all(Manifest.open(f"{url}/{shards.name}/", settings), shards)
    assert min(faults.seen[fate] for fate in ("fail", "stall", "cut")) > 0


def test_tables_that_nobody_opens_leave_the_cache(
    shards: Path, settings: Cache, flaky: Any, tmp_path: Path
) -> None:
    tables = Path(settings.folder or "") / "tables"

    def age(path: Path, days: float) -> None:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * 86_400))

    names = ("one", "two")
    for name in names:
        shutil.copytree(shards, tmp_path / name)
    with flaky.file_server(tmp_path, flaky.Faults()) as url:
        opened = [Manifest.open(f"{url}/{name}", settings) for name in names]
        for manifest in opened:
            age(manifest.table, TABLE_DAYS + 1)
        Manifest.open(f"{url}/one", settings)
        assert [manifest.table.exists() for manifest in opened] == [True, False]
        assert opened[1].sample(0) is not None, "what is mapped stays readable"
        age(opened[0].table, TABLE_DAYS - 1)
        assert Manifest.open(f"{url}/two", settings).table.exists()
        assert opened[0].table.exists()
    assert {path for path in tables.iterdir() if path.name != ".lock"} == {one.table for one in opened}


def test_a_manifest_that_was_changed_in_the_store(
    shards: Path, settings: Cache, flaky: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "changed"))
    manifest = folder / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"train"', b'"trein"'))
    with flaky.file_server(tmp_path, flaky.Faults()) as url:
        with pytest.raises(DataError, match=f"^{url}/changed/manifest.json: its checksum is not that"):
            Manifest.open(f"{url}/changed", settings)
        shutil.copy(shards / MANIFEST_NAME, manifest)
        assert Manifest.open(f"{url}/changed", settings).has_checksum


def test_shards_in_s3_that_fails(
    shards: Path, settings: Cache, flaky: Any, s3: str, bucket: Callable[[str], None]
) -> None:
    faults = flaky.Faults(fail=5, stall=11, cut=7)
    with flaky.front(s3, faults) as url:
        bucket(url)
        check_all(Manifest.open("s3://shards/mixed", settings), shards)
    assert min(faults.seen[fate] for fate in ("fail", "stall", "cut")) > 0


def test_an_s3_folder_with_a_missing_shard_is_told_at_the_start(
    settings: Cache, s3: str, bucket: Callable[[str], None]
) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.delete_object(Bucket="shards", Key="mixed/shard-000002.tar")
    client.put_object(Bucket="shards", Key="mixed/shard-000001.tar", Body=b"short")
    with pytest.raises(DataError, match=r"s3://shards/mixed: 1 of \d shards missing: shard-000002.tar"):
        Manifest.open("s3://shards/mixed", settings)
    client.put_object(Bucket="shards", Key="mixed/shard-000002.tar", Body=b"")
    with pytest.raises(DataError, match=r"of the wrong size: shard-000001.tar \(5 bytes instead of"):
        Manifest.open("s3://shards/mixed", settings)


@pytest.mark.parametrize("address", ["s3://shards/nothing", "s3://no-bucket/mixed"])
def test_a_wrong_s3_address_is_told_at_once(
    address: str, settings: Cache, bucket: Callable[[str], None]
) -> None:
    with pytest.raises(DataError, match=f"^{address}/manifest.json: the store has no such file"):
        Manifest.open(address, settings)


def test_s3_without_credentials(
    settings: Cache, bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"refuses to give this file .* check the credentials"):
        Manifest.open("s3://shards/mixed", settings)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the store refuses to give this file .HTTP 401.* credentials in the environment"),
        (403, "the store refuses to give this file .HTTP 403"),
        (404, "the store has no such file"),
        (410, "the store refuses to give this file .HTTP 410"),
    ],
)
def test_what_only_a_person_can_mend_is_told_at_once(
    status: int, words: str, shards: Path, settings: Cache, flaky: Any
) -> None:
    faults = flaky.Faults(status={"shard-000001.tar": status})
    with flaky.file_server(shards, faults) as url:
        manifest = Manifest.open(url, settings)
        with pytest.raises(DataError, match=f"{url}/shard-000001.tar: {words}") as told:
            manifest.shard_path("shard-000001.tar")
    assert "\n" not in str(told.value)


def test_a_store_that_stays_away_is_given_up(settings: Cache, shards: Path, flaky: Any) -> None:
    short = settings.model_copy(update={"patience_seconds": 0.3})
    with flaky.file_server(shards, flaky.Faults(status={"shard-000000.tar": 503})) as url:
        manifest = Manifest.open(url, short)
        with pytest.raises(DataError, match=r"the store failed \d+ times in \d+ s, the last: HTTP 503"):
            manifest.shard_path("shard-000000.tar")
    with pytest.raises(DataError, match=r"the store failed \d+ times .* Cannot connect to host"):
        Manifest.open(url, short)


def test_a_shard_that_was_replaced_is_told_and_never_served(
    shards: Path, settings: Cache, flaky: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    with flaky.file_server(folder, flaky.Faults()) as url:
        manifest = Manifest.open(url, settings)
        other = folder / "shard-000001.tar"
        data = bytearray(other.read_bytes())
        data[600] ^= 1
        other.write_bytes(data)
        with pytest.raises(
            DataError,
            match=r"shard-000001.tar: not the file that the manifest lists .*etag \d+; .* copy the folder",
        ):
            manifest.shard_path("shard-000001.tar")
        other.write_bytes(data[:-512])
        with pytest.raises(
            DataError, match=r"not the one that the manifest lists \(\d+ bytes instead of \d+\)"
        ):
            manifest.shard_path("shard-000001.tar")
        assert (
            manifest.shard_path("shard-000000.tar").read_bytes() == (folder / "shard-000000.tar").read_bytes()
        )


def test_a_changed_shard_of_the_same_name_is_not_taken_from_the_cache(
    shards: Path, settings: Cache, flaky: Any, tmp_path: Path, media: list, helpers: Any
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    with flaky.file_server(tmp_path, flaky.Faults()) as url:
        before = Manifest.open(f"{url}/copy", settings)
        check_all(before, folder)
        shutil.rmtree(folder)
        classes = {"moves": ["left", "right", "up"], "stills": ["a", "b", "c", "d"]}
        helpers.write_shards(folder, media[::-1], classes, per_shard=5)
        after = Manifest.open(f"{url}/copy", settings)
        check_all(after, folder)
        assert after.hash != before.hash
        assert [shard.name for shard in after.shards] == [shard.name for shard in before.shards]


def test_a_copy_that_was_damaged_on_this_machine_is_fetched_again(
    shards: Path, settings: Cache, flaky: Any
) -> None:
    with flaky.file_server(shards, flaky.Faults()) as url:
        manifest = Manifest.open(url, settings)
        sample = manifest.sample(3)
        path = manifest.shard_path(sample.shard)
        with path.open("r+b") as file:
            file.seek(sample.offset)
            file.write(b"damaged!")
        check_all(manifest, shards)
    # nobody there to ask, and damaged again: the sample is corrupt or the shard cannot be had, but not wrong
    with manifest.shard_path(sample.shard).open("r+b") as file:
        file.seek(sample.offset)
        file.write(b"damaged!")
    assert manifest.remote is not None
    manifest.remote.store._patience = Patience(0.2, 0.1)
    reader = ShardReader(manifest.folder, "x", remote=manifest.remote)
    with pytest.raises((DataError, CorruptSample), match=r"shard-000000\.tar"):
        reader.verify(sample, reader.read(sample))


def test_credentials_are_neither_taken_from_addresses_nor_told(caplog: pytest.LogCaptureFixture) -> None:
    for address in (
        "https://user:pass-word@host/shards",
        "https://host/shards?X-Amz-Signature=pass-word",
        "s3://key:pass-word@bucket/shards",
    ):
        with pytest.raises(DataError, match="credentials belong into the environment") as told:
            parse_location(address)
        assert "pass-word" not in str(told.value)
    assert redacted("GET https://u:p@h/x?sig=1 and s3://b/k") == "GET https://h/x?… and s3://b/k"
    error = OSError(
        "cannot get 'https://host/a?token=pass-word', redirected from http://me:pass-word@other/b"
    )
    assert "pass-word" not in reason_of(error)


@pytest.mark.parametrize(
    "address",
    [
        "ssh://host/x",
        "pipe:cat /etc/passwd://",
        "github://org:repo@/x",
        "simplecache::s3://bucket/x",
        "file::s3://x",
        "reference://",
        "local://x",
        "s3:///no-bucket",
        "s3:/bucket/one-slash",
        "http://[broken/x",
    ],
)
def test_other_kinds_of_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError):
        parse_location(address)


def test_addresses_and_paths_have_one_spelling(shards: Path) -> None:
    assert parse_location("S3://Bucket/a/b/") == "s3://Bucket/a/b"
    assert parse_location("gcs://bucket/a") == "gs://bucket/a"
    assert parse_location("shards/train") == "shards/train"
    assert Manifest.open(f"file://{shards}").hash == Manifest.open(shards).hash


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, settings: Cache) -> None:
    import fsspec

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with pytest.raises(
        DataError, match=r"gs://bucket/x: .* needs the package gcsfs: pip install 'tubeworks\[gs\]'"
    ):
        RemoteFolder("gs://bucket/x", settings).read("manifest.json")


def test_failures_now_and_then_are_not_told_and_many_are(
    shards: Path, settings: Cache, flaky: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        flaky.file_server(shards, flaky.Faults(fail=2)) as url,
        caplog.at_level(logging.WARNING),
    ):
        Manifest.open(url, settings)
        assert not caplog.records
    away = RemoteStore(url, Patience(0.5, 1.0))
    with caplog.at_level(logging.WARNING), pytest.raises(DataError):
        away.read("manifest.json")
    assert "trying again in" in caplog.text


def test_it_works_after_a_fork(shards: Path, settings: Cache, flaky: Any) -> None:
    with flaky.file_server(shards, flaky.Faults()) as url:
        manifest = Manifest.open(url, settings)  # this process has a connection and its thread now
        child = os.fork()
        if child == 0:
            try:
                check_all(manifest, shards)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent has to know
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
