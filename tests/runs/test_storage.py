"""Samples and groups in a store, and what happens when it or the disk fails."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from bonbon.cluster.attempts import DeadLetter, DeadLetters, Ledger
from bonbon.config.run import parse_config
from bonbon.groups.group import Groups
from bonbon.groups.shards import read_groups, shard_indices, shard_path, write_shard
from bonbon.runs.run_folder import RunFolder
from bonbon.stages import engine
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.stages import score as score_stage
from bonbon.stages import train as train_stage
from bonbon.system import atomic_files as files
from bonbon.system.atomic_files import read_json, write_json, write_text
from bonbon.system.errors import BonbonError
from bonbon.system.storage import files_in, is_remote, is_there, remove_folder, storage_path
from support.groups import MakeGroup, assert_same_groups

QUICK = 20.0  # seconds, within which a store that is down must be found out

# --- a store of its own ---------------------------------------------------------------------------


class Store:
    """An S3 server on this machine, that can go down and come back with what it held."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.start()

    def start(self) -> None:
        from werkzeug.serving import make_server

        self.up = True
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.up = False
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        if not self.up:  # a connection that was open before
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return self._app(environ, start_response)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    pytest.importorskip("moto.server", reason="moto, the S3 server of these tests, is missing")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    boto3 = pytest.importorskip("boto3")
    found = Store()
    url = f"http://127.0.0.1:{found.port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_CONFIG_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    httpx.post(f"{url}/moto-api/reset")  # what it holds belongs to the process
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
    yield found
    if found.up:
        found.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def google_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Google Cloud Storage server on this machine."""
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed"
    )
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # or it looks for credentials of a machine there
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


PLACES = ["disk", "memory", "s3", "gs"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder on disk, in fsspec's memory, in S3 and in Google Cloud Storage."""
    if request.param == "disk":
        return storage_path(str(tmp_path / "data"))
    if request.param == "memory":
        pytest.importorskip("upath", reason="universal-pathlib is not installed")
        return storage_path(f"memory://{tmp_path.name}/data")
    request.getfixturevalue({"s3": "store", "gs": "google_store"}[request.param])
    return storage_path(f"{request.param}://bucket/data")


def test_what_is_remote(place: Path, tmp_path: Path) -> None:
    assert is_remote(place) == (not isinstance(place, type(tmp_path)))


def test_files_are_the_same_everywhere(place: Path, make_group: MakeGroup) -> None:
    assert files_in(place) == []
    assert not is_there(place / "a.json")
    assert shard_indices(place / "groups") == []
    write_json(place / "a.json", {"x": 1})
    write_text(place / "b.txt", "é")
    assert read_json(place / "a.json") == {"x": 1}
    assert [path.name for path in files_in(place)] == ["a.json", "b.txt"]
    assert is_there(place / "a.json")
    groups = [make_group(f"p{i}", rewards=(1.0, 2.0, 3.0)) for i in range(3)]
    write_shard(shard_path(place / "groups", 1), groups, {"model": "m"})
    assert shard_indices(place / "groups") == [1]
    found = read_groups(place / "groups")
    assert list(found) == groups
    assert found.provenance == {"model": "m"}
    remove_folder(place / "groups")
    remove_folder(place / "groups")
    assert shard_indices(place / "groups") == []
    with pytest.raises(BonbonError, match=r"cannot read .*gone\.json"):
        read_json(place / "gone.json")


def test_tries_and_dead_letters_are_the_same_everywhere(place: Path, make_group: MakeGroup) -> None:
    ledger = Ledger(place / "tries", "node", "actor", lambda _: True)
    assert ledger.tries(0) == []
    mark = ledger.begin(0, "p1")
    ledger.failed(mark, "why")
    ledger.ended(ledger.begin(0))
    ledger.keep(0, 1, Groups([make_group("p1")], {}))
    assert [attempt.reason for attempt in ledger.tries(0)] == ["why"]
    assert list(ledger.kept(0)) == [1]
    ledger.forget(0)
    assert ledger.tries(0) == []
    letters = DeadLetters(place)
    assert letters.gather() == []
    letter = DeadLetter("score", "p1", "hello", "why", 3, [])
    letters.add(letter)
    letters.add(letter)  # by a worker that died before it had written its shard
    assert letters.gather() == letters.gather() == [letter]


def test_a_listing_shows_what_others_wrote_since(store: Store, make_group: MakeGroup) -> None:
    import s3fs

    folder = storage_path("s3://bucket/data/groups")
    write_shard(shard_path(folder, 0), [make_group()], {})
    assert shard_indices(folder) == [0]
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.cp_file(
        "bucket/data/groups/shard-00000.parquet", "bucket/data/groups/shard-00001.parquet"
    )
    assert shard_indices(folder) == [0, 1]
    assert is_there(shard_path(folder, 1))


# --- a run in a store -----------------------------------------------------------------------------

MakeFolder = Callable[..., RunFolder]


@pytest.fixture
def folder_of(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> MakeFolder:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt_id": f"p{i}", "prompt": f"number {i}"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(name: str, storage: str | None, reward: Any = None) -> RunFolder:
        (tmp_path / "lengths.py").write_text(
            "hook = None\n"
            "def score(prompts, completions):\n"
            "    if hook is not None: hook()\n"
            "    return [len(text) for text in completions]\n"
        )
        return RunFolder(
            tmp_path / name,
            parse_config(
                {
                    "model": {"name": str(tiny_model), "device": "cpu"},
                    "prompts": {"path": "prompts.jsonl"},
                    "sampling": {"n": 3, "max_new_tokens": 6, "shard_size": 3},
                    "reward": {"function": "lengths:score"},
                    "train": {"learning_rate": 1e-3, "batch_size": 4},
                    "evaluation": {"k": 2, "holdout": 0.3, "bootstrap": 100},
                    "storage": storage,
                }
            ),
        )

    return make


def test_a_whole_run_with_its_groups_in_s3(store: Store, folder_of: MakeFolder) -> None:
    local = folder_of("local", None)
    run_stage.sample_and_score(local)
    train_stage.train(local)
    remote = folder_of("remote", "s3://bucket/runs/one")
    run_stage.run(remote)
    assert_same_groups(read_groups(remote.groups), read_groups(local.groups))
    assert not (remote.path / "groups").exists()
    weights = [load_file(f.path / "model" / "model.safetensors") for f in (local, remote)]
    for name, values in weights[0].items():
        np.testing.assert_allclose(weights[1][name], values, atol=1e-6)
    assert (remote.evaluation / "evaluation.json").is_file()
    before = {path: path.stat().st_mtime for path in files_in(remote.groups)}
    run_stage.sample_and_score(remote)
    assert {path: path.stat().st_mtime for path in files_in(remote.groups)} == before


def test_another_run_cannot_mix_its_shards_in(store: Store, folder_of: MakeFolder) -> None:
    sample_stage.sample(folder_of("one", "s3://bucket/runs/one"))
    other = with_seed(folder_of("two", "s3://bucket/runs/one"), 7)
    with pytest.raises(BonbonError, match=r"sampling\.seed was 0 and is now 7"):
        sample_stage.sample(other)


def with_seed(folder: RunFolder, seed: int) -> RunFolder:
    sampling = folder.config.sampling.model_copy(update={"seed": seed})
    return RunFolder(folder.path, folder.config.model_copy(update={"sampling": sampling}))


def test_one_command_at_a_time_works_in_a_storage_folder(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    one, two = (folder_of(name, str(tmp_path / "shared")) for name in ("one", "two"))
    with one.data_locked():
        for stage in (sample_stage.sample, score_stage.score):
            with pytest.raises(BonbonError, match=r"working in .*shared; .* another storage"):
                stage(two)
    run_stage.sample_and_score(one)
    run_stage.sample_and_score(two)  # all is there
    assert two.notes.is_finished("score", one.groups)


def test_a_store_that_another_command_changed_is_noticed(
    folder_of: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a command that was begun there before, and again with another seed: it begins anew."""
    pytest.importorskip("upath", reason="universal-pathlib is not installed")
    place = "memory://changed/runs"
    earlier = folder_of("earlier", place)
    assert sample_stage.begin_sampling(earlier)
    work_here = engine.work_here

    def disturbed(folder: RunFolder, stage: str) -> None:
        assert sample_stage.begin_sampling(with_seed(earlier, 7))
        work_here(folder, stage)

    monkeypatch.setattr(engine, "work_here", disturbed)
    with pytest.raises(BonbonError, match=r"another command has changed what is in memory://cha"):
        sample_stage.sample(folder_of("late", place))


def test_a_storage_that_is_left_out_does_not_begin_anew(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    shared = str(tmp_path / "shared")
    sample_stage.sample(folder_of("out", shared))
    for stage in (sample_stage.sample, score_stage.score):
        with pytest.raises(BonbonError, match=r"storage was '.*/shared' and is now None"):
            stage(folder_of("out", None))
        with pytest.raises(BonbonError, match=r"storage was '.*/shared' and is now '.*/other'"):
            stage(folder_of("out", str(tmp_path / "other")))
    score_stage.score(folder_of("out", "shared"))  # the same place, by another name
    assert not (tmp_path / "out" / "samples").exists()
    assert not list((tmp_path / "other").rglob("*.json"))


def test_a_storage_where_nothing_came_to_be_can_be_changed(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    """And what another run has in the new one stays."""
    run_stage.sample_and_score(folder_of("finished", str(tmp_path / "b")))
    assert sample_stage.begin_sampling(folder_of("out", str(tmp_path / "a")))
    out = folder_of("out", str(tmp_path / "b"))
    run_stage.sample_and_score(out)
    assert out.notes.is_finished("score", out.groups)
    run_stage.sample_and_score(folder_of("finished", str(tmp_path / "b")))


def test_shards_that_are_missing_at_the_end_are_noticed(
    folder_of: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("out", None)
    work_here = engine.work_here

    def disturbed(folder: RunFolder, stage: str) -> None:
        work_here(folder, stage)
        shard_path(folder.samples, 1).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(engine, "work_here", disturbed)
        with pytest.raises(BonbonError, match="another command has changed what is in"):
            sample_stage.sample(folder)
    sample_stage.sample(folder)
    assert len(read_groups(folder.samples)) == len(read_groups(folder.prompts))


def test_a_store_that_goes_down_loses_nothing(
    store: Store, folder_of: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = folder_of("local", None)
    run_stage.sample_and_score(local)
    remote = folder_of("remote", "s3://bucket/runs/one")
    sample_stage.sample(remote)
    import lengths  # type: ignore[import-not-found]

    calls: list[int] = []

    def hook() -> None:
        calls.append(1)
        if len(calls) == 2:
            store.stop()

    monkeypatch.setattr(lengths, "hook", hook)
    began = time.monotonic()
    with pytest.raises(BonbonError) as caught:
        score_stage.score(remote)
    assert time.monotonic() - began < QUICK
    assert str(caught.value).startswith(
        "cannot write s3://bucket/runs/one/groups/shard-00001.parquet: the store cannot be reached"
    )
    assert "run the same command to resume" in str(caught.value)
    with pytest.raises(BonbonError, match="the store cannot be reached"):
        is_there(shard_path(remote.groups, 0))  # which is not the same as no
    store.start()
    assert shard_indices(remote.groups) == [0]
    written = files_in(remote.groups)[0].stat().st_mtime
    monkeypatch.setattr(lengths, "hook", None)
    score_stage.score(remote)
    assert files_in(remote.groups)[0].stat().st_mtime == written
    assert_same_groups(read_groups(remote.groups), read_groups(local.groups))


def test_a_bucket_that_is_missing(store: Store, folder_of: MakeFolder) -> None:
    with pytest.raises(BonbonError, match=r"s3://no-bucket/.*: .*bucket does not exist"):
        sample_stage.sample(folder_of("out", "s3://no-bucket/runs"))


def test_no_credentials(
    store: Store, folder_of: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(BonbonError, match=r"no credentials were found; set them as .*AWS_PROFILE"):
        sample_stage.sample(folder_of("out", "s3://bucket/runs"))


def test_the_sentences_are_short(store: Store, folder_of: MakeFolder) -> None:
    store.stop()
    with pytest.raises(BonbonError) as caught:
        sample_stage.sample(folder_of("out", "s3://bucket/runs"))
    assert len(str(caught.value)) < 350


def test_the_users_own_settings_of_a_store_come_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"connect_timeout": 77}})
    path: Any = storage_path("s3://bucket/elsewhere")
    assert path.fs.config_kwargs == {"connect_timeout": 77}


@pytest.mark.parametrize("place", ["nonsense://a/b", "abfs://container/runs"])
def test_a_store_whose_library_is_missing(place: str) -> None:
    if place.startswith("abfs") and find_spec("adlfs") is not None:
        pytest.skip("adlfs is installed")
    with pytest.raises(BonbonError, match=rf"storage {place} cannot be used: .*pip install"):
        storage_path(place)


# --- this machine's disk --------------------------------------------------------------------------


def test_a_full_disk(
    tmp_path: Path, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [make_group(f"p{i}") for i in range(50)]
    write_shard(shard_path(tmp_path, 0), groups, {})
    full = tmp_path / ".full.tmp"
    full.symlink_to("/dev/full")  # ENOSPC for any byte
    monkeypatch.setattr(files, "beside", lambda _: full)
    with pytest.raises(
        BonbonError,
        match=r"cannot write .*shard-00001\.parquet: No space left on device; free some space",
    ):
        write_shard(shard_path(tmp_path, 1), groups, {})
    assert shard_indices(tmp_path) == [0]
    assert list(read_groups(tmp_path)) == groups
    write_shard(shard_path(tmp_path, 1), [make_group("q")], {})  # there is room again
    assert sorted(os.listdir(tmp_path)) == ["shard-00000.parquet", "shard-00001.parquet"]


def test_a_disk_that_fills_up_within_a_file(tmp_path: Path, make_group: MakeGroup) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    groups = [make_group(f"p{i}", prompt=os.urandom(500).hex()) for i in range(200)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(BonbonError, match=r"cannot write .*: File too large; free some space"):
            write_shard(shard_path(tmp_path, 0), groups, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(folder_of: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BonbonError, match=r"cannot write .*file/runs: .*; choose another storage"):
        sample_stage.sample(folder_of("out", str(tmp_path / "file" / "runs")))
