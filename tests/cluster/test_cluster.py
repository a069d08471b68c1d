"""`engine: ray`: the groups of a run on one process, whatever dies; and what is set aside."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.cluster import session, workers
from bonbon.cluster.attempts import DeadLetters, Ledger, Try
from bonbon.cluster.workers import MAX_LONE_FAILURES, ShardProcessor, WorkerSettings
from bonbon.config.engine import PoolConfig, RayEngineConfig
from bonbon.config.run import parse_config
from bonbon.groups.group import Group, Groups
from bonbon.groups.shards import read_groups, shard_path, write_shard
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import ShardWork
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.stages import score as score_stage
from bonbon.system.errors import BonbonError, UnavailableError
from support.groups import MakeGroup, assert_same_groups

DEADLINE = 300.0

# --- who is to blame (without Ray) ----------------------------------------------------------------


class Shop:
    """A workshop whose stage doubles rewards, for shard 0 of the prompts p0 … p5."""

    def __init__(self, tmp_path: Path, make_group: MakeGroup, **settings: Any) -> None:
        values = {"model": {"name": "m"}, "prompts": {"path": "p"}, "reward": {"function": "a:b"}}
        self.folder = RunFolder(tmp_path, parse_config(values))
        self.groups = [make_group(f"p{i}", rewards=(1.0, 2.0, 3.0)) for i in range(6)]
        write_shard(shard_path(self.folder.samples, 0), self.groups, {"model": "m"})
        self.worker_settings = WorkerSettings(
            path=tmp_path,
            config=self.folder.config,
            cwd=str(tmp_path),
            attempts="x",
            tries=settings.pop("tries", 3),
            max_dead_letters=settings.pop("max_dead_letters", 100),
            set_aside=frozenset(settings.pop("set_aside", ())),
        )
        self.alive = {"here"}
        self.ledger = Ledger(tmp_path / "tries", "here", "actor", self.alive.__contains__)
        self.calls: list[list[str]] = []
        self.fails: dict[str, Exception] = {}

    def transform(self, groups: Sequence[Group], _: Any) -> list[Group]:
        self.calls.append([group.prompt_id for group in groups])
        for group in groups:
            if group.prompt_id in self.fails:
                raise self.fails[group.prompt_id]
        return [g.with_rewards(2 * r for r in g.rewards or ()) for g in groups]

    def do(self) -> workers.Done:
        work = ShardWork(self.folder.samples, self.folder.groups, self.transform, {"reward": "r"})
        shop = ShardProcessor(
            self.worker_settings, "score", self.folder, self.ledger, ExitStack(), work
        )
        return shop.do(0)

    def died(self, prompt_id: str | None, node: str = "here") -> None:
        """As if a worker had died during a try."""
        ledger = Ledger(self.ledger.folder, node, "actor", self.alive.__contains__)
        ledger.begin(0, prompt_id)

    def made(self) -> list[str]:
        return [group.prompt_id for group in read_groups(self.folder.groups)]

    def letters(self) -> dict[str, tuple[str, int]]:
        found = DeadLetters(self.folder.data).read()
        return {letter.prompt_id: (letter.reason, letter.tries) for letter in found}


@pytest.fixture
def shop(tmp_path: Path, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch) -> Shop:
    def left(status: int) -> None:
        raise KeyboardInterrupt(f"the process would end with {status}")

    monkeypatch.setattr(os, "_exit", left)
    return Shop(tmp_path, make_group)


ALL = [f"p{i}" for i in range(6)]


def test_a_shard_that_works_is_made_at_once(shop: Shop) -> None:
    assert shop.do() == workers.Done(prompts=6, tokens=36, set_aside=0)
    assert shop.calls == [ALL]
    groups = read_groups(shop.folder.groups)
    assert [g.rewards for g in groups] == [(2.0, 4.0, 6.0)] * 6
    assert groups.provenance["model"] == "m"
    assert not list(shop.ledger.folder.rglob("*.json"))
    assert shop.do() == workers.Done(prompts=6)  # it is there
    assert shop.calls == [ALL]


def test_a_prompt_that_raises_is_set_aside_after_three_tries(shop: Shop) -> None:
    shop.fails["p2"] = BonbonError("the reward of p2 is nan")
    assert shop.do() == workers.Done(prompts=6, tokens=30, set_aside=1)
    assert shop.made() == ["p0", "p1", "p3", "p4", "p5"]
    assert shop.letters() == {"p2": ("the reward of p2 is nan", 3)}
    assert sum("p2" in call for call in shop.calls) == 3
    alone = [call for call in shop.calls if len(call) == 1]
    assert sorted(call[0] for call in alone) == ["p0", "p1", "p2", "p2", "p3", "p4", "p5"]
    provenance = read_groups(shop.folder.groups).provenance
    assert provenance["tokens"] == 30
    assert provenance["reward"] == "r"


def test_a_prompt_that_kills_is_found_among_its_shard(shop: Shop) -> None:
    shop.died(None)
    shop.died("p3")
    shop.died("p3")
    assert shop.do().set_aside == 1
    assert ["p3"] not in shop.calls
    assert shop.letters() == {"p3": ("its worker died each time", 3)}


def test_what_was_made_before_a_death_is_not_made_again(shop: Shop) -> None:
    shop.died(None)
    shop.fails["p4"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):  # as good as a death: nothing is noted
        shop.do()
    del shop.fails["p4"]
    shop.calls.clear()
    assert shop.do().set_aside == 0
    assert shop.calls == [["p5"], ["p4"]]  # those with the fewest failures first
    assert shop.made() == ALL


def test_a_death_in_company_condemns_nobody(shop: Shop) -> None:
    shop.died(None)
    shop.died(None)
    assert shop.do().set_aside == 0
    assert shop.made() == ALL


def test_deaths_with_their_node_are_forgiven_for_a_while(shop: Shop) -> None:
    shop.died(None, node="gone")
    for _ in range(3):
        shop.died("p1", node="gone")
    assert shop.do().set_aside == 0  # three: as chance may have it
    (shop.folder.groups / "shard-00000.parquet").unlink()
    for _ in range(5):
        shop.died("p1", node="gone")
    assert shop.do().set_aside == 1


def test_a_shard_lost_with_its_node_is_tried_as_a_whole_again(shop: Shop) -> None:
    shop.died(None, node="gone")
    assert shop.do().set_aside == 0
    assert shop.calls == [ALL]


def test_when_everything_fails_the_run_ends_and_nothing_is_set_aside(shop: Shop) -> None:
    shop.fails = dict.fromkeys(ALL, BonbonError("the server is down"))
    with pytest.raises(BonbonError, match=r"5 prompts of shard 0 .* the server is down; that is"):
        shop.do()
    assert len(shop.calls) == 1 + MAX_LONE_FAILURES
    assert not shop.letters()
    assert not shop.folder.groups.exists()


def test_a_server_that_is_down_ends_the_run_at_once(shop: Shop) -> None:
    shop.fails = dict.fromkeys(ALL, UnavailableError("the server is down"))
    with pytest.raises(UnavailableError, match="the server is down"):
        shop.do()
    assert len(shop.calls) == 1
    assert not shop.letters()


def test_a_small_shard_that_fails_wholly_ends_the_run_too(shop: Shop) -> None:
    write_shard(shard_path(shop.folder.samples, 0), shop.groups[:3], {})
    shop.fails = dict.fromkeys(ALL, BonbonError("the reward is broken"))
    with pytest.raises(BonbonError, match=r"3 prompts of shard 0 .* the reward is broken"):
        shop.do()
    assert not shop.letters()


def test_a_prompt_that_is_its_whole_shard_may_be_set_aside(shop: Shop) -> None:
    write_shard(shard_path(shop.folder.samples, 0), shop.groups[:1], {})
    shop.fails = {"p0": BonbonError("it is odd")}
    assert shop.do().set_aside == 1
    assert list(shop.letters()) == ["p0"]


def test_letters_of_shards_that_were_not_written_are_tried_again(shop: Shop) -> None:
    shop.fails["p4"] = BonbonError("it is odd")
    shop.do()
    letters = DeadLetters(shop.folder.data)
    letters.drop_unwritten()
    assert [letter.prompt_id for letter in letters.read()] == ["p4"]
    shard_path(shop.folder.groups, 0).unlink()
    letters.drop_unwritten()
    assert letters.read() == []


def test_a_prompt_of_any_text_is_read_back_from_its_letter(shop: Shop) -> None:
    prompt = "one\u2028two\u0085three\u2029four\r\nfive"
    odd = replace(shop.groups[0], prompt=prompt)
    write_shard(shard_path(shop.folder.samples, 0), [odd, *shop.groups[1:]], {})
    shop.fails["p0"] = BonbonError("it is odd")
    shop.do()
    letters = DeadLetters(shop.folder.data)
    letters.gather()
    assert [letter.prompt for letter in letters.read()] == [prompt]


def test_many_that_fail_are_set_aside_where_one_does_not(shop: Shop) -> None:
    shop.fails = dict.fromkeys(ALL[1:], BonbonError("they are odd"))
    assert shop.do().set_aside == MAX_LONE_FAILURES
    assert shop.made() == ["p0"]
    assert sorted(shop.letters()) == ALL[1:]


def test_more_than_the_limit_ends_the_run(tmp_path: Path, make_group: MakeGroup) -> None:
    shop = Shop(tmp_path, make_group, max_dead_letters=1)
    shop.fails = dict.fromkeys(["p0", "p4"], BonbonError("it is nan"))
    with pytest.raises(
        BonbonError, match=r"2 prompts .*max_dead_letters = 1, the last because: it is nan; see"
    ):
        shop.do()
    assert not shop.folder.groups.exists()


def test_with_one_try_the_culprit_is_still_found_alone(
    tmp_path: Path, make_group: MakeGroup
) -> None:
    shop = Shop(tmp_path, make_group, tries=1)
    shop.fails["p5"] = BonbonError("no")
    assert shop.do().set_aside == 1
    assert list(shop.letters()) == ["p5"]


def test_prompts_set_aside_before_are_not_tried(tmp_path: Path, make_group: MakeGroup) -> None:
    shop = Shop(tmp_path, make_group, set_aside=[("score", "p0"), ("sample", "p1")])
    assert shop.do() == workers.Done(prompts=6, tokens=30, set_aside=1)
    assert shop.calls == [ALL[1:]]


def test_deaths_while_a_shard_is_read_end_the_run(shop: Shop) -> None:
    for _ in range(4):
        shop.died(None)
    with pytest.raises(BonbonError, match="workers died 4 times at shard 0 while they read"):
        shop.do()


def test_deaths_while_the_model_loads_end_the_run(shop: Shop) -> None:
    other = Ledger(shop.ledger.folder, "here", "another-actor", shop.alive.__contains__)
    other.begin_loading()
    for _ in range(3):
        shop.ledger.begin_loading()
    with pytest.raises(BonbonError, match="died 3 times while it loaded its model to score"):
        ShardProcessor(shop.worker_settings, "score", shop.folder, shop.ledger, ExitStack()).do(0)


def test_the_storage_is_never_a_prompts_fault(shop: Shop) -> None:
    shop.folder.groups.write_text("not a folder")
    with pytest.raises(BonbonError, match="cannot write"):
        shop.do()
    assert not shop.letters()


class CudaError(Exception):
    __module__ = "torch.cuda"


@pytest.mark.parametrize(
    ("error", "breaks"),
    [
        (BonbonError("nan"), False),
        (ValueError("a bug"), True),
        (SystemExit(1), True),
        ((BonbonError("reward function failed"), KeyError("x")), False),
        ((BonbonError("vLLM failed"), CudaError("device-side assert")), True),
        ((BonbonError("outer"), BonbonError("inner")), False),
    ],
)
def test_which_failures_cost_the_process(error: Any, breaks: bool) -> None:
    if isinstance(error, tuple):
        error, error.__cause__ = error[0], error[1]
    assert workers._may_have_broken(error) is breaks


def test_dead_letters_are_gathered_once(tmp_path: Path, shop: Shop) -> None:
    shop.fails["p2"] = BonbonError("Zürich")
    shop.do()
    letters = DeadLetters(shop.folder.data)
    assert not letters.path.exists()
    assert letters.gather() == letters.gather()
    (row,) = [json.loads(line) for line in letters.path.read_text().splitlines()]
    assert row["prompt"] == "Once upon a time"
    assert row["reason"] == "Zürich"
    assert row["shards"] == ["groups/shard-00000.parquet"]
    assert not list((tmp_path / ".bonbon" / "dead-letters").glob("*"))
    letters.path.write_text("{}\n")
    with pytest.raises(
        BonbonError, match=r"dead_letters\.jsonl has a line that is not a dead letter"
    ):
        letters.read()


def test_tries_survive_on_disk(tmp_path: Path, shop: Shop) -> None:
    mark = shop.ledger.begin(7, "p1")
    assert shop.ledger.tries(7) == [Try("p1", "here")]
    shop.ledger.failed(mark, "why")
    assert shop.ledger.tries(7) == [Try("p1", "here", "why")]
    shop.ledger.keep(7, 1, Groups(shop.groups[1:2], {"tokens": 6, "seconds": 1.0}))
    assert list(shop.ledger.kept(7)[1]) == shop.groups[1:2]
    shop.ledger.forget(7)
    assert shop.ledger.tries(7) == []
    assert shop.ledger.kept(7) == {}


# --- how far samplers run ahead -------------------------------------------------------------------


@dataclass
class Stage:
    """What the policy asks of an operator of Ray Data, and of its pool of workers."""

    waiting: int = 0
    running: int = 0
    restarting: int = 0
    output_dependencies: Sequence[Stage] = ()

    def get_autoscaling_actor_pools(self) -> list[Stage]:
        return [self]

    def num_running_actors(self) -> int:
        return self.running

    def num_restarting_actors(self) -> int:
        return self.restarting

    def total_enqueued_input_blocks(self) -> int:
        return self.waiting


@pytest.mark.parametrize(
    ("scorers", "goes_on"),
    [
        (Stage(waiting=3, running=2), True),
        (Stage(waiting=4, running=2), False),
        (Stage(waiting=2, running=2, restarting=1), False),
        (Stage(waiting=9, running=1, restarting=1), True),  # or they could wait for each other
        (Stage(waiting=9), True),
    ],
)
def test_samplers_wait_for_scorers_that_are_there(scorers: Stage, goes_on: bool) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    from bonbon.cluster.backpressure import FewWait

    samplers = Stage(output_dependencies=[scorers])
    topology = {id(scorers): scorers}
    policy = FewWait(None, Topology(topology), None)  # type: ignore[arg-type]
    assert policy.can_add_input(samplers) is goes_on
    assert policy.can_add_input(scorers)


class Topology:
    """Ray Data's map from an operator to its state."""

    def __init__(self, states: dict[int, Stage]) -> None:
        self._states = states

    def __getitem__(self, stage: Stage) -> Stage:
        return self._states[id(stage)]


# --- on three nodes -------------------------------------------------------------------------------

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
REWARD = """
import os, pathlib, time

def note(name):
    (pathlib.Path(__file__).parent / "notes" / f"{name}-{os.getpid()}-{time.time_ns()}").touch()

def slow(prompts, completions):
    note("slow")
    time.sleep(0.2)
    return [len(text) for text in completions]

def choosy(prompts, completions):
    for prompt in prompts:
        if "kill" in prompt:
            note("kill")
            os._exit(1)
        if "raise" in prompt:
            note("raise")
            raise ValueError("I do not like it")
    return [len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head and a node, of two logical CPUs each; a test adds the third."""
    pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    # A node that is gone is found out within a second and not half a minute.
    quick = {"health_check_period_ms": 200, "health_check_failure_threshold": 5}
    quick |= {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
    head = NODE | {"include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are started in, with the user's own module."""
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MakeFolder = Callable[..., RunFolder]


@pytest.fixture
def folder_of(here: Path, tiny_model: Path) -> MakeFolder:
    def make(name: str, prompts: Sequence[str], reward: str, **more: Any) -> RunFolder:
        rows = [{"prompt_id": f"p{i}", "prompt": text} for i, text in enumerate(prompts)]
        (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "model": {"name": str(tiny_model), "device": "cpu"},
            "prompts": {"path": "prompts.jsonl"},
            "sampling": {"n": 3, "max_new_tokens": 8, "shard_size": 3},
            "reward": {"function": f"my_rewards:{reward}"},
            "evaluation": {"prompts": {"path": "prompts.jsonl"}},
        }
        return RunFolder(Path(name), parse_config(values | more))

    return make


def notes(here: Path, name: str) -> list[int]:
    """The process ids that left a note, one each time."""
    return [int(path.name.split("-")[1]) for path in (here / "notes").glob(f"{name}-*")]


def engine(nodes: Any, samplers: int = 1, scorers: int = 1, **more: Any) -> dict[str, Any]:
    pools = {"samplers": {"min": 1, "max": samplers}, "scorers": {"min": 1, "max": scorers}}
    return {"name": "ray", "address": nodes.address, **pools, **more}


def wait_for(what: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < DEADLINE
        time.sleep(0.02)


PROMPTS = [f"{'word ' * (i % 5)}number {i}" for i in range(30)]


def test_a_dead_node_and_a_dead_actor_lose_and_double_nothing(
    nodes: Any, folder_of: MakeFolder, here: Path
) -> None:
    local = folder_of("local", PROMPTS, "slow")
    run_stage.sample_and_score(local)
    for path in (here / "notes").iterdir():
        path.unlink()

    spare = nodes.add_node(**NODE)
    seed = random.randrange(10**6)
    print(f"seed: {seed}")  # shown when the test fails
    killed: list[int] = []

    def disturb() -> None:
        wait_for(lambda: len(notes(here, "slow")) >= 2)
        nodes.remove_node(spare, allow_graceful=False)
        pid = random.Random(seed).choice([pid for pid in set(notes(here, "slow")) if alive(pid)])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    spread = folder_of("spread", PROMPTS, "slow", engine=engine(nodes, 1, 2))
    run_stage.sample_and_score(spread)
    disturber.join()
    assert killed
    assert_same_groups(read_groups(spread.groups), read_groups(local.groups))
    assert not (spread.path / "dead_letters.jsonl").exists()
    assert not (spread.path / ".bonbon" / "attempts").exists()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_poison_is_set_aside_and_the_run_goes_on(
    nodes: Any, folder_of: MakeFolder, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"number {i}" for i in range(16)]
    clean = folder_of("clean", prompts, "choosy")
    run_stage.sample_and_score(clean)
    poisoned = [
        "please kill" if i == 6 else "raise it" if i == 9 else p for i, p in enumerate(prompts)
    ]
    folder = folder_of("poisoned", poisoned, "choosy", engine=engine(nodes))
    sample_stage.sample(folder_of("poisoned", poisoned, "choosy"))
    score_stage.score(folder)
    rows = [
        json.loads(line) for line in (folder.path / "dead_letters.jsonl").read_text().splitlines()
    ]
    by_id = {row["prompt_id"]: row for row in rows}
    assert by_id.keys() == {"p6", "p9"}
    assert by_id["p6"]["prompt"] == "please kill"
    assert by_id["p6"]["reason"] == "its worker died each time"
    assert "my_rewards:choosy' failed: ValueError: I do not like it" in by_id["p9"]["reason"]
    assert {row["tries"] for row in rows} == {3}
    assert {row["stage"] for row in rows} == {"score"}
    assert len(notes(here, "kill")) == len(notes(here, "raise")) == 3
    assert len(set(notes(here, "kill"))) == 3
    assert "2 prompts were set aside; see" in capsys.readouterr().err
    others = [g for g in read_groups(clean.groups) if g.prompt_id not in by_id]
    assert_same_groups(read_groups(folder.groups), Groups(others))
    assert len(read_groups(folder.samples)) == 16
    run_stage.sample_and_score(folder)  # all is done
    assert "2 prompts were set aside; see" in capsys.readouterr().err


def test_a_killed_command_goes_on(nodes: Any, folder_of: MakeFolder, here: Path) -> None:
    local = folder_of("local", PROMPTS, "slow")
    run_stage.sample_and_score(local)
    folder = folder_of("killed", PROMPTS, "slow", engine="ray")
    sample_stage.sample(folder_of("killed", PROMPTS, "slow"))
    (here / "run.yaml").write_text(json.dumps(folder.config.model_dump(mode="json")))
    arguments = ["score", "run.yaml", "--out", "killed"]
    with (here / "output").open("w") as output:
        command = [sys.executable, "-m", "bonbon", *arguments]
        process = subprocess.Popen(command, cwd=here, stdout=output, stderr=output)
        try:  # on a cluster of its own
            wait_for(lambda: any(folder.groups.glob("*.parquet")) or process.poll() is not None)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
            process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.groups.glob("*.parquet")}
    assert 0 < len(done) < 10
    assert "ray" not in (here / "output").read_text().lower()
    again = CliRunner().invoke(app, [*arguments, "--ray-address", nodes.address])
    assert again.exit_code == 0, again.output
    assert_same_groups(read_groups(folder.groups), read_groups(local.groups))
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())
    # Ray's processes end with the command's; its agents see to it once a minute only.
    workers_of = [it for it in family if it.is_running() and not it.name().endswith("Agent")]
    _, left = psutil.wait_procs(workers_of, timeout=30)
    assert not left


def test_what_a_worker_raises_is_one_sentence(nodes: Any, folder_of: MakeFolder) -> None:
    folder = folder_of("model", PROMPTS[:4], "slow", engine=engine(nodes))
    with folder.locked():
        assert sample_stage.begin_sampling(folder)
    broken = folder.config.model_copy(
        update={"model": folder.config.model.model_copy(update={"name": "no/such-model"})}
    )
    from bonbon.cluster.data_pipeline import work_on_cluster

    with pytest.raises(BonbonError, match="no/such-model") as caught:
        work_on_cluster(RunFolder(folder.path, broken), ["sample"], broken.engine)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "Ray" not in str(caught.value)
    assert "UDF" not in str(caught.value)


def test_a_cluster_that_is_too_small_is_refused(nodes: Any, folder_of: MakeFolder) -> None:
    from bonbon.cluster.session import check_room, cluster

    with cluster(nodes.address) as ray:
        wait_for(lambda: ray.cluster_resources().get("CPU") == 4)
        check_room(ray, {"samplers": PoolConfig(min=2, max=4), "scorers": PoolConfig(min=2, max=2)})
        pools = {"samplers": PoolConfig(min=3, max=5), "scorers": PoolConfig(min=2, max=2)}
        with pytest.raises(BonbonError, match=r"need 5 CPUs \(3 × 1 for samplers and 2 × 1 for"):
            check_room(ray, pools)
        with pytest.raises(BonbonError, match=r"need 1 GPUs .* has 0; lower num_gpus"):
            check_room(ray, {"samplers": PoolConfig(num_gpus=1)})
        with pytest.raises(
            BonbonError, match=r"engine\.samplers needs 3 CPUs and no node has more"
        ):
            check_room(ray, {"samplers": PoolConfig(num_cpus=3)})


# --- without a cluster ----------------------------------------------------------------------------


class FakeRay:
    """Of Ray what says where its head is."""

    def __init__(self, port: int) -> None:
        self.gcs_address = f"127.0.0.1:{port}"

    def get_runtime_context(self) -> FakeRay:
        return self


def test_a_head_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_CHECK_EVERY", 0.05)
    monkeypatch.setattr(session, "_LOST_AFTER", 0.5)
    head = socket.create_server(("127.0.0.1", 0))
    ray: Any = FakeRay(head.getsockname()[1])
    wait = threading.Event().wait
    with session.watched_head(ray):
        wait(1)  # it is there
    head.close()
    with (
        pytest.raises(BonbonError, match=r"head of the Ray cluster, at 127\.0\.0\.1:\d+, can"),
        session.watched_head(ray),
    ):
        wait(DEADLINE)
    with pytest.raises(KeyboardInterrupt), session.watched_head(ray):  # the user's own
        raise KeyboardInterrupt


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class AuthenticationError(Exception):
        pass

    class Refusing:
        @staticmethod
        def init(**options: Any) -> None:
            try:
                raise AuthenticationError("RAY_AUTH_MODE is disabled")
            except AuthenticationError as error:
                raise ConnectionError("Failed to connect") from error

    refusing: Any = Refusing
    with pytest.raises(
        BonbonError, match=r"at 10\.0\.0\.1:1 asks for a token; set RAY_AUTH_MODE=tok"
    ):
        session._connect(refusing, "10.0.0.1:1")


def test_what_ray_adds_to_a_sentence_is_left_out() -> None:
    error = pickle.loads(pickle.dumps(UnavailableError("the server is down")))
    error.args = (f"{error.args[0]}\nFailed to apply UDF transform after 1/1 attempts.",)
    for told in (error, pickle.loads(pickle.dumps(error))):
        assert str(told) == "the server is down"


@pytest.mark.parametrize("engine", [None, "local", "ray", {"name": "ray", "tries": 2}])
def test_an_address_on_the_command_line(
    engine: Any, folder_of: MakeFolder, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the engine Ray, whose other settings can then be set too."""
    values = folder_of("out", PROMPTS[:4], "slow").config.model_dump(mode="json")
    values |= {"engine": engine} if engine else {}
    (here / "run.yaml").write_text(json.dumps(values))
    asked: list[Any] = []
    monkeypatch.setattr(sample_stage, "sample", lambda folder: asked.append(folder.config.engine))
    more = ["--set", "engine.samplers.max=3", "--ray-address", "somewhere:1"]
    said = CliRunner().invoke(app, ["sample", "run.yaml", "--out", "out", *more])
    assert said.exit_code == 0, said.output
    (found,) = asked
    assert (found.name, found.address, found.samplers.max) == ("ray", "somewhere:1", 3)
    assert found.tries == (2 if isinstance(engine, dict) else 3)


def test_an_address_without_a_cluster_is_an_error_at_once(folder_of: MakeFolder) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = folder_of("out", PROMPTS[:4], "slow", engine={"name": "ray", "address": "127.0.0.1:1"})
    began = time.monotonic()
    with pytest.raises(BonbonError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
        sample_stage.sample(folder)
    assert time.monotonic() - began < 10


def test_without_ray_it_says_what_to_install(
    folder_of: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = folder_of("out", PROMPTS[:4], "slow", engine={"name": "ray"})
    with pytest.raises(BonbonError, match=r"pip install 'bonbon-align\[ray\]'"):
        sample_stage.sample(folder)


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path, shop: Shop) -> None:
    worker = workers.ShardWorker(shop.worker_settings, "score")
    with pytest.raises(BonbonError, match=r"does not see .*; put it on a file system that all"):
        worker({name: np.array([0]) for name in ("shard", "prompts", "tokens", "set_aside")})
    assert not shop.folder.groups.exists()


def test_settings_of_the_engine() -> None:
    settings = RayEngineConfig()
    assert settings.samplers.min == settings.samplers.max == 1
    assert settings.tries == 3
