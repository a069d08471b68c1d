"""Tasks of lm-evaluation-harness give the numbers that our own log-probabilities give."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import bonbon.evaluation.lm_eval
from bonbon.config.evaluation import LMEvalConfig
from bonbon.evaluation.lm_eval import TaskResult, run_tasks, task_changes
from bonbon.models.loading import load_policy
from bonbon.models.logprobs import completion_log_probs
from bonbon.models.padding import pad_rows
from bonbon.system.errors import BonbonError
from support.models import BOS, PAD

Question = dict[str, Any]


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness, whose data sets are cached in a folder of the test."""
    harness = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return harness


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Any:
    return load_policy(str(tiny_model), device="cpu")


def random_word(generator: random.Random) -> str:
    return "".join(generator.choices("abcdefgh", k=generator.randint(2, 8)))


def make_questions(number: int, seed: int = 0) -> list[Question]:
    """Questions of two short words with two to four different answers, one of them right."""
    generator = random.Random(seed)
    questions = []
    for _ in range(number):
        choices = sorted({random_word(generator) for _ in range(generator.randint(2, 4))})
        prompt = f"{random_word(generator)} {random_word(generator)}"
        answer = generator.randrange(len(choices))
        pieces = [choice[:2] for choice in choices]
        question = {"prompt": prompt, "choices": choices, "pieces": pieces, "answer": answer}
        questions.append(question)
    return questions


QUESTIONS = make_questions(30)
SHOT = make_questions(1, seed=1)

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": " {{pieces[answer]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity"}],
}


def write_task(folder: Path, name: str, task: dict[str, Any]) -> None:
    """A task over QUESTIONS, with SHOT for its example."""
    files = {}
    for split, rows in (("test", QUESTIONS), ("train", SHOT)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | task))


def tasks_config(folder: Path, *tasks: str, **options: Any) -> LMEvalConfig:
    return LMEvalConfig(tasks=list(tasks), include_path=folder, **options)


def log_prob(policy: Any, context: str, text: str) -> float:
    """ln p(text | context) by our own code, one row at a time."""
    model, tokenizer = policy
    prompt = tokenizer(context)["input_ids"]
    completion = tokenizer(context + text)["input_ids"][len(prompt) :]
    with torch.inference_mode():
        return float(completion_log_probs(model, pad_rows([prompt], [completion], PAD)))


def answer_log_prob(policy: Any, question: Question, shots: str = "") -> float:
    """ln p of what LIKELIHOOD asks for."""
    answer = question["pieces"][question["answer"]]
    return log_prob(policy, shots + question["prompt"], f" {answer}")


def picked(policy: Any, question: Question, by_length: bool = False) -> int:
    """The answer of the highest log-probability, or of the highest one a character."""
    scores = [
        log_prob(policy, question["prompt"], f" {choice}") / (len(choice) if by_length else 1)
        for choice in question["choices"]
    ]
    return int(np.argmax(scores))


def accuracy(answers: Sequence[int]) -> float:
    right = [question["answer"] for question in QUESTIONS[: len(answers)]]
    return float(np.mean(np.array(answers) == np.array(right)))


def by_metric(results: Sequence[TaskResult]) -> dict[tuple[str, str], TaskResult]:
    return {(result.task, result.metric): result for result in results}


# --- numbers --------------------------------------------------------------------------------------


def test_accuracy_is_that_of_our_own_log_probs(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "words", CHOICES)
    found = by_metric(run_tasks(tasks_config(tmp_path, "words", batch_size=7), *policy))
    plain = accuracy([picked(policy, question) for question in QUESTIONS])
    normed = accuracy([picked(policy, question, by_length=True) for question in QUESTIONS])
    assert 0.1 < plain < 0.9  # or any answer would do
    assert plain != normed
    n = len(QUESTIONS)
    for metric, value in (("acc", plain), ("acc_norm", normed)):
        error = math.sqrt(value * (1 - value) / (n - 1))
        result = found["words", metric]
        assert result.value == pytest.approx(value, abs=1e-12)
        assert result.standard_error == pytest.approx(error, rel=1e-9)
        assert (result.higher_is_better, result.n) == (True, n)
    assert len(found) == 2


def test_a_pretrained_model(lm_eval: Any, stories260k: Path, tmp_path: Path) -> None:
    """With a tokenizer of merges, whose pieces differ at the seam of question and answer."""
    write_task(tmp_path, "words", CHOICES)
    policy = load_policy(str(stories260k), device="cpu")
    found = by_metric(run_tasks(tasks_config(tmp_path, "words"), *policy))
    answers = [picked(policy, question) for question in QUESTIONS]
    assert found["words", "acc"].value == pytest.approx(accuracy(answers), abs=1e-12)


def test_sixteen_bits_do_not_tie(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    """A nearly uniform model in bfloat16, whose log-probabilities would often be equal there."""
    write_task(tmp_path, "words", CHOICES | {"doc_to_choice": "{{pieces}}"})
    write_task(tmp_path, "answers", LIKELIHOOD)
    model, tokenizer = load_policy(policy[0].name_or_path, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.03)
    config = tasks_config(tmp_path, "words", "answers", batch_size=1)
    found = by_metric(run_tasks(config, model, tokenizer))
    shortened = [{**question, "choices": question["pieces"]} for question in QUESTIONS]
    answers = [picked((model, tokenizer), question) for question in shortened]
    log_probs = [answer_log_prob((model, tokenizer), question) for question in QUESTIONS]
    assert found["words", "acc"].value == pytest.approx(accuracy(answers), abs=1e-12)
    perplexity = found["answers", "perplexity"].value
    assert math.log(perplexity) == pytest.approx(-np.mean(log_probs), rel=1e-5)


def test_limit_and_examples_in_the_prompt(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "asked", LIKELIHOOD)
    write_task(tmp_path, "never", LIKELIHOOD | {"num_fewshot": 0})
    shot = f"{SHOT[0]['prompt']} {SHOT[0]['pieces'][SHOT[0]['answer']]}\n\n"
    config = tasks_config(tmp_path, "asked", "never", num_fewshot=1, limit=20)
    found = by_metric(run_tasks(config, *policy))
    for task, shots in (("asked", shot), ("never", "")):
        log_probs = [answer_log_prob(policy, question, shots) for question in QUESTIONS[:20]]
        result = found[task, "perplexity"]
        assert math.log(result.value) == pytest.approx(-np.mean(log_probs), rel=1e-5)
        assert result.n == 20


def test_perplexity_has_no_standard_error(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    """The harness puts a begin token before every text, a second one for this tokenizer."""
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    write_task(tmp_path, "text", rolling)
    [result] = run_tasks(tasks_config(tmp_path, "text"), *policy)
    texts = [question["prompt"] for question in QUESTIONS]
    rows = pad_rows([[BOS]] * len(texts), policy[1](texts)["input_ids"], PAD)
    with torch.inference_mode():
        nats = -float(completion_log_probs(policy[0], rows).sum())
    words = sum(len(text.split()) for text in texts)
    assert math.log(result.value) == pytest.approx(nats / words, rel=1e-5)
    assert result.standard_error is None
    assert result.higher_is_better is False


def test_bootstrapped_standard_error(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    """exp(mean) has the standard error exp(mean) · sd / √n to first order, so where sd is small."""
    write_task(tmp_path, "answers", LIKELIHOOD)
    model, tokenizer = load_policy(policy[0].name_or_path, device="cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    [result] = run_tasks(tasks_config(tmp_path, "answers"), model, tokenizer)
    nats = np.array([-answer_log_prob((model, tokenizer), question) for question in QUESTIONS])
    assert result.value == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert result.standard_error == pytest.approx(
        result.value * nats.std() / math.sqrt(len(nats)), rel=0.08
    )


def test_greedy_completions(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    """The right answer is what the model writes for every other question."""
    model, tokenizer = policy
    greedy = []
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer(question["prompt"])["input_ids"]])
        drawn = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        greedy.append(tokenizer.decode(drawn[0, ids.shape[1] :], skip_special_tokens=True))
    rows = [
        {"prompt": question["prompt"], "text": text if index % 2 else "no"}
        for index, (question, text) in enumerate(zip(QUESTIONS, greedy, strict=True))
    ]
    assert "no" not in greedy
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["</s>"]},
        "filter_list": [{"name": "whole", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "written.jsonl")}},
        "fewshot_split": None,
    }
    (tmp_path / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path, "writing", task)
    [result] = run_tasks(tasks_config(tmp_path, "writing"), *policy)
    assert result.metric == "exact_match,whole"
    assert result.value == 0.5


def test_group_counts_the_examples_of_its_metric(
    lm_eval: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only(monkeypatch)
    write_task(tmp_path, "words", CHOICES)
    write_task(tmp_path, "shots", CHOICES | {"num_fewshot": 1})
    write_task(tmp_path, "answers", LIKELIHOOD)
    group = {
        "group": "all",
        "task": ["words", "shots", "answers"],  # the last has no accuracy
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(group))
    found = by_metric(run_tasks(tasks_config(tmp_path, "all"), *policy))
    parts = [found["words", "acc"], found["shots", "acc"]]
    assert found["all", "acc"].value == pytest.approx(np.mean([part.value for part in parts]))
    assert found["all", "acc"].n == 2 * len(QUESTIONS)
    assert found["all", "acc"].higher_is_better is True
    assert found["all", "acc"].standard_error == pytest.approx(
        np.mean([part.standard_error for part in parts]) / math.sqrt(2), rel=0.05
    )


def test_same_numbers_as_the_harness_itself(
    lm_eval: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples for the prompt are drawn from the test split: the seeds must be the harness's."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # it takes seconds
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    write_task(tmp_path, "answers", LIKELIHOOD | {"fewshot_split": "test"})
    [ours] = run_tasks(tasks_config(tmp_path, "answers", num_fewshot=1), *policy)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=policy[0], tokenizer=policy[1], batch_size=8),
        tasks=["answers"],
        num_fewshot=1,
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
    )
    theirs = found["results"]["answers"]
    assert ours.value == theirs["perplexity,none"]
    assert ours.standard_error == theirs["perplexity_stderr,none"]


# --- what a run leaves behind ---------------------------------------------------------------------


def global_state(tokenizer: Any, model: Any) -> dict[str, Any]:
    names = ("lm_eval", "datasets", "transformers")
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "levels": [logging.getLogger(name).level for name in names],
        "handlers": [list(logging.getLogger(name).handlers) for name in (None, *names)],
        "pad": (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)),
        "training": model.training,
        "bars": vars(sys.modules["tqdm.std"].tqdm)["__init__"],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed_or_printed(
    lm_eval: Any,
    policy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    fails: bool,
) -> None:
    # The harness tries a task on its first question when it loads it.
    broken = f"{{{{prompt if prompt == '{QUESTIONS[0]['prompt']}' else prompt.no.such}}}}"
    write_task(tmp_path, "answers", LIKELIHOOD)
    write_task(tmp_path, "broken", LIKELIHOOD | {"doc_to_text": broken})
    model, tokenizer = load_policy(policy[0].name_or_path, device="cpu")
    tokenizer.pad_token = None
    model.train()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    before = global_state(tokenizer, model)
    capfd.readouterr()
    if fails:
        with pytest.raises(BonbonError, match="the lm_eval task 'broken' failed: UndefinedError"):
            run_tasks(tasks_config(tmp_path, "broken"), model, tokenizer)
    else:
        run_tasks(tasks_config(tmp_path, "answers"), model, tokenizer)
    assert global_state(tokenizer, model) == before
    printed = capfd.readouterr()
    assert printed.out == ""
    assert [line for line in printed.err.splitlines() if "lm_eval tasks" not in line] == []
    assert caplog.records == []


# --- errors ---------------------------------------------------------------------------------------


def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the harness's own 14,000 tasks out, which take ten seconds to read."""
    from lm_eval import tasks

    manager = tasks.TaskManager

    @functools.wraps(manager)
    def without_defaults(**options: Any) -> Any:
        return manager(**(options | {"include_defaults": False}))

    monkeypatch.setattr(tasks, "TaskManager", without_defaults)
    monkeypatch.setattr(bonbon.evaluation.lm_eval, "_built_in_tasks", without_defaults)  # uncached


def test_without_the_harness(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BonbonError) as caught:
        run_tasks(tasks_config(tmp_path, "words"), *policy)
    assert str(caught.value) == (
        "lm_eval tasks need lm-evaluation-harness: pip install 'bonbon-align[lm-eval]'"
    )


def test_unknown_task(
    lm_eval: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only(monkeypatch)
    write_task(tmp_path, "words", CHOICES)
    (tmp_path / "torn.yaml").write_text("task: [torn")
    for name in ("wrods", "torn"):
        with pytest.raises(BonbonError, match=rf"no task '{name}'.*include_path") as caught:
            run_tasks(tasks_config(tmp_path, "words", name), *policy)
        assert str(tmp_path) in str(caught.value)


def test_unknown_task_without_a_folder(
    lm_eval: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only(monkeypatch)
    with pytest.raises(BonbonError, match=r"no task 'wrods'.*set include_path to the folder"):
        run_tasks(LMEvalConfig(tasks=["wrods"]), *policy)


def test_no_folder(lm_eval: Any, policy: Any, tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"include_path .*nowhere: there is no such folder"):
        run_tasks(tasks_config(tmp_path / "nowhere", "words"), *policy)


@pytest.mark.parametrize(
    "data",
    [
        {"dataset_path": "nobody/such-data-set", "dataset_kwargs": None},
        {"dataset_kwargs": {"data_files": "/nowhere/test.jsonl"}},
        {"test_split": "validation"},
    ],
)
def test_data_that_cannot_be_loaded(
    lm_eval: Any, policy: Any, tmp_path: Path, data: dict[str, Any]
) -> None:
    write_task(tmp_path, "words", CHOICES | data)
    with pytest.raises(BonbonError, match="the lm_eval task 'words' cannot be loaded: ") as caught:
        run_tasks(tasks_config(tmp_path, "words"), *policy)
    assert "\n" not in str(caught.value)


def test_a_task_in_two_groups(
    lm_eval: Any, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only(monkeypatch)
    write_task(tmp_path, "words", CHOICES)
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"group": "all", "task": ["words"]}))
    with pytest.raises(BonbonError, match="'words' is in both 'all' and 'words'; name one"):
        run_tasks(tasks_config(tmp_path, "all", "words"), *policy)


# --- results and changes --------------------------------------------------------------------------


def result_of(value: float, error: float | None = 0.1, **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "task": "words",
        "metric": "acc",
        "value": value,
        "standard_error": error,
        "higher_is_better": True,
        "n": 30,
    }
    return TaskResult(**(values | changes))


results = st.builds(
    TaskResult,
    task=st.text(),
    metric=st.text(),
    value=st.floats(allow_nan=False),
    standard_error=st.none() | st.floats(0, 1e300),
    higher_is_better=st.none() | st.booleans(),
    n=st.none() | st.integers(0),
)


@given(results)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_json_round_trip(result: TaskResult) -> None:
    text = json.dumps(result.to_json(), allow_nan=False)
    assert TaskResult.from_json(json.loads(text)) == result


def test_nan_survives_json() -> None:
    text = json.dumps(result_of(math.nan).to_json(), allow_nan=False)
    assert math.isnan(TaskResult.from_json(json.loads(text)).value)


def test_change_adds_both_variances() -> None:
    [change] = task_changes([result_of(0.5, 0.03)], [result_of(0.6, 0.04)])
    assert (change.before, change.after) == (0.5, 0.6)
    assert change.change == pytest.approx(0.1)
    assert change.low == pytest.approx(0.1 - 1.959964 * 0.05)
    assert change.high == pytest.approx(0.1 + 1.959964 * 0.05)
    assert change.higher_is_better is True


def test_interval_holds_the_truth_of_independent_models() -> None:
    """Of 95% intervals, 95% hold a change of 0 when the models answer independently."""
    generator = np.random.default_rng(0)
    rates = generator.binomial(400, 0.6, size=(2, 4000)) / 400
    held = 0
    for before, after in rates.T:
        errors = [math.sqrt(rate * (1 - rate) / 399) for rate in (before, after)]
        [change] = task_changes([result_of(before, errors[0])], [result_of(after, errors[1])])
        assert change.low is not None
        assert change.high is not None
        held += change.low <= 0 <= change.high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("errors", [(None, 0.1), (0.1, None)])
def test_no_interval_without_both_standard_errors(errors: tuple[float | None, ...]) -> None:
    [change] = task_changes([result_of(0.5, errors[0])], [result_of(0.4, errors[1])])
    assert (change.low, change.high) == (None, None)
    assert change.change == pytest.approx(-0.1)


def test_changes_pair_by_name_in_the_later_order() -> None:
    before = [result_of(0.1), result_of(0.2, metric="acc_norm"), result_of(3.0, task="text")]
    after = [result_of(5.0, task="text"), result_of(0.4), result_of(0.3, metric="acc_norm")]
    changes = task_changes(before, after)
    assert [(c.task, c.metric) for c in changes] == [(r.task, r.metric) for r in after]
    assert [c.change for c in changes] == pytest.approx([2.0, 0.3, 0.1])


@pytest.mark.parametrize(
    "after",
    [
        [],
        [result_of(0.5, metric="acc_norm")],
        [result_of(0.5, n=29)],
        [result_of(0.5), result_of(0.5)],
        [result_of(0.5), result_of(0.5, task="text")],
    ],
)
def test_results_of_other_tasks_or_examples_are_refused(after: list[TaskResult]) -> None:
    with pytest.raises(ValueError, match="not of the same tasks and examples"):
        task_changes([result_of(0.5)], after)
