"""Working through shards: prompts, samples and groups, in the run's folder or in a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bonbon.config.run import RunConfig, parse_config
from bonbon.config.sampling import SamplingConfig
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow, is_held_out, read_prompts
from bonbon.groups.shards import read_groups, read_shard, shard_indices, shard_path, write_shard
from bonbon.runs import prompts as run_prompts
from bonbon.runs.fingerprints import score_settings
from bonbon.runs.prompts import RunPrompts
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import ShardWork, prompt_count, spent, work_through, write_prompts
from bonbon.runs.work import drawing, scoring
from bonbon.sampling.encoding import encode_prompts
from bonbon.stages import measure as measure_stage
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.system.errors import BonbonError
from bonbon.system.prefetch import AHEAD

PROMPTS = [f"Prompt number {index}" for index in range(11)]


class Echo:
    """Draws the prompt's own text, twice, and fails where it is told to."""

    def __init__(self, poison: str = "") -> None:
        self.config = SamplingConfig(n=2, shard_size=3)
        self.poison = poison
        self.asked: list[str] = []

    def sample(
        self, prompts: Sequence[EncodedPrompt], progress: Callable[[int], Any] | None = None
    ) -> list[Group]:
        self.asked += [prompt.prompt_id for prompt in prompts]
        if self.poison in self.asked:
            raise BonbonError("it failed")
        if progress is not None:
            progress(2 * len(prompts))
        twice = {"token_ids": ((7,), (8, 9)), "logprobs": (-1.0, -2.0)}
        return [
            Group(
                p.prompt_id, p.prompt, p.token_ids, (str(p.prompt),) * 2,
                finish_reasons=("stop",) * 2, **twice,
            )
            for p in prompts
        ]  # fmt: skip


def encoded(count: int = len(PROMPTS)) -> Iterator[EncodedPrompt]:
    for index, prompt in enumerate(PROMPTS[:count]):
        yield EncodedPrompt(f"p{index}", prompt, (1, index))


def work_of(tmp_path: Path, sampler: Any) -> ShardWork:
    noted = {"model": "m"}
    return ShardWork(tmp_path / "prompts", tmp_path / "samples", drawing(sampler), noted)


def length_reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_prompts_are_groups_that_have_no_completions_yet(tmp_path: Path) -> None:
    assert write_prompts(encoded(), tmp_path, 3) == 4
    assert shard_indices(tmp_path) == [0, 1, 2, 3]
    groups = read_groups(tmp_path)
    assert [EncodedPrompt.of(group) for group in groups] == list(encoded())
    assert {group.n for group in groups} == {0}
    assert len(read_shard(shard_path(tmp_path, 3))) == 2


def test_prompts_are_written_while_they_are_read(tmp_path: Path) -> None:
    """So that a million of them never stand in memory together."""
    ahead = []

    def watched() -> Iterator[EncodedPrompt]:
        prompts = [prompt for prompt in encoded() for _ in range(10)]
        for count, prompt in enumerate(prompts):
            ahead.append(count - 3 * len(shard_indices(tmp_path)))
            yield prompt

    write_prompts(watched(), tmp_path, 3)
    assert max(ahead) <= 3 * AHEAD < len(ahead) / 2


def test_each_shard_is_done_once_and_what_is_there_is_left_alone(tmp_path: Path) -> None:
    write_prompts(encoded(), tmp_path / "prompts", 3)
    failing = Echo(poison="p7")
    with pytest.raises(BonbonError, match="it failed"):
        work_through(work_of(tmp_path, failing), "test")
    assert shard_indices(tmp_path / "samples") == [0, 1]
    sampler = Echo()
    work = work_of(tmp_path, sampler)
    assert work.todo() == [2, 3]
    assert prompt_count(work.source, work.todo()) == 5
    work_through(work, "test")
    assert sampler.asked == ["p6", "p7", "p8", "p9", "p10"]
    groups = read_groups(tmp_path / "samples")
    assert [group.prompt_id for group in groups] == [f"p{index}" for index in range(11)]
    assert groups.provenance["model"] == "m"
    assert groups.provenance["tokens"] == 3 * 3
    work_through(work, "test")
    assert len(sampler.asked) == 5


def test_scoring_keeps_what_sampling_noted(tmp_path: Path) -> None:
    write_prompts(encoded(), tmp_path / "prompts", 4)
    work_through(work_of(tmp_path, Echo()), "test")
    transform = scoring(length_reward)
    noted = {"reward": "length"}
    work = ShardWork(tmp_path / "samples", tmp_path / "groups", transform, noted)
    work_through(work, "test")
    groups = read_groups(tmp_path / "groups")
    assert [group.rewards for group in groups] == [(float(len(p)),) * 2 for p in PROMPTS]
    assert (groups.provenance["model"], groups.provenance["reward"]) == ("m", "length")


def test_what_folders_took_is_known_where_every_shard_says(tmp_path: Path) -> None:
    def folder(name: str, *noted: dict[str, float]) -> Path:
        for index, note in enumerate(noted):
            write_shard(shard_path(tmp_path / name, index), [], note)
        return tmp_path / name

    both = folder("both", {"tokens": 3, "seconds": 0.5}, {"tokens": 4, "seconds": 1.5})
    other = folder("other", {"tokens": 5, "seconds": 1.0})
    silent = folder("silent", {"tokens": 1, "seconds": 1.0}, {"tokens": 1})
    assert spent([both]) == {"tokens": 7, "seconds": 2.0}
    assert spent([both, other]) == {"tokens": 12, "seconds": 3.0}
    assert spent([both, silent]) == {"tokens": 9, "seconds": None}
    assert spent([both, tmp_path / "empty"]) == {"tokens": None, "seconds": None}
    assert spent([]) == {"tokens": 0, "seconds": 0}


def test_a_shard_without_prompts_stays_one(tmp_path: Path) -> None:
    """Every prompt of a shard may have been set aside."""
    write_prompts(encoded(3), tmp_path / "prompts", 3)
    work = work_of(tmp_path, Echo())
    empty = work.make(work.read(0)[:0])
    work.write(0, empty)
    scored = ShardWork(tmp_path / "samples", tmp_path / "groups", scoring(length_reward), {})
    work_through(scored, "test")
    assert list(read_shard(shard_path(tmp_path / "groups", 0))) == []


def test_prompts_replace_those_that_were_there(tmp_path: Path) -> None:
    write_prompts(encoded(), tmp_path, 3)
    assert write_prompts(encoded(2), tmp_path, 3) == 1
    assert [group.prompt_id for group in read_groups(tmp_path)] == ["p0", "p1"]


# --- which prompts --------------------------------------------------------------------------------


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    values = {"model": {"name": "m"}, "prompts": {"path": str(path)}, "reward": {"model": "r"}}
    return parse_config(values | changes)


def test_prompts_to_train_on_are_those_that_are_not_held_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluation={"holdout": 0.4})
    rows = read_prompts(config.prompts.path)
    prompts = RunPrompts(config)
    training, held = list(prompts.training()), prompts.evaluation()
    assert held == [row for row in rows if is_held_out(row, 0.4)]
    assert sorted(training + held, key=rows.index) == rows
    assert len({row.prompt_id for row in training + held}) == len(rows)


def test_which_prompts_were_trained_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluation={"holdout": 0.4})
    prompts = RunPrompts(config)
    training, held = list(prompts.training()), prompts.evaluation()
    asked = [*(row.prompt for row in (*training[:2], *held)), "another one"]
    known = [prompt for prompt, seen in zip(asked, prompts.trained_on(asked), strict=True) if seen]
    assert known == [row.prompt for row in training[:2]]


@pytest.mark.parametrize("holdout", [1e-9, 1 - 1e-9])
def test_a_side_without_prompts_is_refused(tmp_path: Path, holdout: float) -> None:
    config = config_of(tmp_path, evaluation={"holdout": holdout})
    with pytest.raises(BonbonError, match="11 prompts are too few to hold out"):
        list(RunPrompts(config).training())
    with pytest.raises(BonbonError, match="11 prompts are too few to hold out"):
        RunPrompts(config).evaluation()


@pytest.mark.parametrize("own", [False, True], ids=["held out", "of a file of their own"])
def test_prompts_are_read_and_hashed_once_in_a_run(
    tmp_path: Path, run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """However many models are trained; and what was drawn from the base is read once at the end."""
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def counting(path: Path, *rest: Any) -> Any:
            calls.append(f"{name} {path.name}")
            return call(path, *rest)

        monkeypatch.setattr(module, name, counting)

    counted(run_prompts, "iter_prompts")
    counted(run_prompts, "file_digest")
    counted(measure_stage, "read_groups")
    (tmp_path / "others.txt").write_text("Other 1\nOther 2\nPrompt number 3")
    evaluation = {"prompts": {"path": str(tmp_path / "others.txt")}} if own else {"holdout": 0.4}
    values = run_config | {
        "train": {"learning_rate": 1e-3},
        "baselines": {name: {"objective": "sft_bon"} for name in ("one", "two")},
        "evaluation": evaluation | {"k": 2, "bootstrap": 100},
    }
    folder = RunFolder(tmp_path / "out", parse_config(values))
    run_stage.run(folder)
    files = ["prompts.txt", *(["others.txt"] if own else [])]
    expected = [f"{what} {name}" for what in ("iter_prompts", "file_digest") for name in files]
    read = [
        "base",
        *(f"{name}{end}" for name in folder.config.trainings for end in ("", "-forward")),
    ]
    assert sorted(calls) == sorted([*expected, *(f"read_groups {name}" for name in read)])
    results = json.loads((folder.evaluation / "evaluation.json").read_text())
    assert results["prompts_trained_on"] == (1 if own else 0)


def test_a_prompts_file_that_changed_is_read_and_hashed_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, evaluation={"holdout": 0.4})
    prompts = RunPrompts(config)
    digest, held = prompts.digest(config.prompts.path), prompts.evaluation()
    config.prompts.path.write_text("\n".join(f"Another {i}" for i in range(40)))
    assert prompts.digest(config.prompts.path) != digest
    again = prompts.evaluation()
    assert again == [row for row in read_prompts(config.prompts.path) if is_held_out(row, 0.4)]
    assert again != held


# --- a store --------------------------------------------------------------------------------------


@pytest.fixture
def run_config(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "prompts": {"path": str(prompts)},
        "sampling": {"n": 2, "max_new_tokens": 4, "shard_size": 3},
        "reward": {"function": f"{__name__}:length_reward"},
        "evaluation": {"prompts": {"path": str(prompts)}},
    }


def test_samples_and_groups_in_a_store_are_those_of_the_run_s_folder(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    here = RunFolder(tmp_path / "a", parse_config(run_config))
    there = RunFolder(tmp_path / "b", parse_config(run_config | {"storage": str(store)}))
    for folder in (here, there):
        run_stage.sample_and_score(folder)
    assert there.groups == store / "groups"
    assert not (tmp_path / "b" / "samples").exists()
    assert list(read_groups(here.groups)) == list(read_groups(there.groups))


def test_two_runs_cannot_mix_their_shards_in_a_store(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    values = run_config | {"storage": str(tmp_path / "store")}
    sample_stage.sample(RunFolder(tmp_path / "a", parse_config(values)))
    other = parse_config(values, ["sampling.seed=5"])
    with pytest.raises(BonbonError, match=r"sampling\.seed was 0 and is now 5"):
        sample_stage.sample(RunFolder(tmp_path / "b", other))
    # The same settings from another folder go on with what is there.
    again = RunFolder(tmp_path / "c", parse_config(values))
    before = [path.stat().st_mtime_ns for path in sorted(again.samples.iterdir())]
    run_stage.sample_and_score(again)
    assert [path.stat().st_mtime_ns for path in sorted(again.samples.iterdir())] == before
    assert len(read_groups(again.groups)) == len(PROMPTS)


def test_prompts_of_settings_that_nothing_came_of_are_forgotten(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    hopeless = run_config | {"sampler": {"name": "vllm", "engine": {"no": "such"}}}
    folder = RunFolder(tmp_path / "a", parse_config(hopeless))
    sample_stage.begin_sampling(folder)
    assert len(read_groups(folder.prompts)) == len(PROMPTS)
    other = tmp_path / "other.txt"
    other.write_text("new 1\nnew 2", encoding="utf-8")
    folder = RunFolder(tmp_path / "a", parse_config(run_config | {"prompts": {"path": str(other)}}))
    sample_stage.sample(folder)
    assert [group.prompt for group in read_groups(folder.samples)] == ["new 1", "new 2"]


def test_a_run_cannot_take_the_store_of_one_that_has_drawn_nothing_yet(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    values = run_config | {"storage": str(tmp_path / "store")}
    sample_stage.begin_sampling(RunFolder(tmp_path / "a", parse_config(values)))
    other = parse_config(values, ["sampling.seed=5"])
    with pytest.raises(BonbonError, match=r"sampling\.seed was 0 and is now 5"):
        sample_stage.sample(RunFolder(tmp_path / "b", other))
    # It was only tried: the same folder with the store's settings is welcome.
    sample_stage.sample(RunFolder(tmp_path / "b", parse_config(values)))
    # The one that began it may change its mind while nothing came of it.
    values = run_config | {"storage": str(tmp_path / "second")}
    sample_stage.begin_sampling(RunFolder(tmp_path / "c", parse_config(values)))
    sample_stage.sample(RunFolder(tmp_path / "c", parse_config(values, ["sampling.seed=5"])))


def test_a_store_is_no_folder_of_something_else(tmp_path: Path, run_config: dict[str, Any]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine")
    values = run_config | {"storage": str(tmp_path / "mine")}
    with pytest.raises(BonbonError, match="is not empty and holds no run"):
        sample_stage.sample(RunFolder(tmp_path / "a", parse_config(values)))
    assert (tmp_path / "mine" / "config.yaml").read_text() == "mine"


def test_a_longer_context_than_the_sampler_s_does_not_help(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    short = {"sampler": {"name": "vllm", "max_model_len": 12}}
    with pytest.raises(BonbonError, match=r"11 prompts have more than the 8 tokens"):
        sample_stage.begin_sampling(RunFolder(tmp_path / "a", parse_config(run_config | short)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampler": {"name": "openai", "model": "b"}}, "sampler.model was 'a'"),
        ({"sampler": {"name": "openai", "model": "a", "client": {"retries": 1}}}, None),
        ({"sampler": {"name": "openai", "model": "a", "base_url": "http://127.0.0.1:1/v1"}}, None),
        ({"sampler": "transformers"}, "sampler.name was 'openai'"),
        ({"reward": {"server": {"base_url": "http://127.0.0.1:2"}}}, "reward.server.model was"),
        ({"engine": "ray"}, None),
    ],
)
def test_what_draws_and_scores_binds_and_how_does_not(
    tmp_path: Path, run_config: dict[str, Any], change: dict[str, Any], named: str | None
) -> None:
    first = run_config | {
        "sampler": {"name": "openai", "model": "a"},
        "reward": {"server": {"base_url": "http://127.0.0.1:1"}},
    }
    before = RunFolder(tmp_path, parse_config(first))
    before.notes.begin("score", score_settings(before.config, before.rows))
    config = parse_config(first | change)
    folder = RunFolder(tmp_path, config)
    if named is None:
        folder.notes.begin("score", score_settings(config, folder.rows))
    else:
        with pytest.raises(BonbonError, match=named):
            folder.notes.begin("score", score_settings(config, folder.rows))


def test_long_prompts_are_all_counted_before_anything_is_drawn(
    tmp_path: Path, run_config: dict[str, Any], tiny_model: Path
) -> None:
    path = Path(run_config["prompts"]["path"])
    path.write_text("\n".join(["short", *("long " * 20 + str(i) for i in range(12))]))
    folder = RunFolder(tmp_path / "a", parse_config(run_config))
    with pytest.raises(BonbonError, match=r"12 prompts have more than the 60 .* and 2 more;"):
        sample_stage.sample(folder)
    assert shard_indices(folder.samples) == []
    skipping = parse_config(run_config, ["sampling.on_long_prompt=skip"])
    folder = RunFolder(tmp_path / "a", skipping)
    sample_stage.sample(folder)
    assert [group.prompt for group in read_groups(folder.samples)] == ["short"]


def test_encoding_reads_no_further_than_it_is_asked_to() -> None:
    from bonbon.sampling.encoding import iter_encoded
    from support.models import byte_tokenizer

    rows = (PromptRow(str(index), "a") for index in iter(int, 1))  # no end
    found = list(islice(iter_encoded(rows, byte_tokenizer(), max_tokens=None), 2))
    assert found == encode_prompts(
        [PromptRow("0", "a"), PromptRow("0", "a")], byte_tokenizer(), max_tokens=None
    )
