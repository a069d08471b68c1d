"""`bonbon serve` from the command line: what it refuses, and a server as a user starts it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import yaml
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.rewards.model import RewardModel
from bonbon.serve.command import parse_serve_settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m"], "strategy best_of_n chooses by a reward"),
        ([], "exactly one of a `model` and an `upstream`"),
        (["--reward", "a:b"], "exactly one of a `model` and an `upstream`"),
        (["--reward", "a:b", "--model", "m", "--upstream", "http://u/v1"], "exactly one of"),
        (["--reward", "a:b", "--model", "m", "--n", "500"], "more than max_best_of"),
        (["--reward", "a:b", "--model", "m", "--strategy", "best"], "unknown strategy 'best'"),
        (["--reward", "a:b", "--model", "m", "--host", "0.0.0.0"], "BONBON_API_KEY"),
        (["--reward", "a:b", "--model", "m", "--port", "99999"], "port = 99999"),
        (["--reward", "a.b:c", "--model", "m"], "reward function 'a.b:c' cannot be imported"),
        (["--reward", "a:b", "--upstream", "nothing", "--set", "deadlin=3"], "unknown key deadlin"),
        (
            ["--reward", "a:b", "--upstream", "http://u/v1", "--strategy", "tree_bon"],
            "strategy tree_bon drops or branches",
        ),
        (["nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_what_is_refused_is_said_in_a_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BONBON_API_KEY", raising=False)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("bonbon.serve.run")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("bonbon.serve.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve", "--model", "m", "--reward", "a:b"])
    assert result.exit_code == 2, result.output
    assert "the server needs uvicorn: pip install 'bonbon-align[serve]'" in result.stderr


def test_a_run_s_configuration_serves() -> None:
    values = {
        "model": {"name": "m"},
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"n": 3},
        "reward": {"function": "a:b"},
        "train": {"learning_rate": 1e-3},
        "deadline": 7.0,
    }
    settings = parse_serve_settings(values, ["concurrency=2"])
    assert (settings.sampling.n, settings.deadline, settings.concurrency) == (3, 7.0, 2)


@contextmanager
def served(*arguments: object) -> Iterator[openai.OpenAI]:
    """A client of `bonbon serve`, which ends well when it is told to."""
    command = [sys.executable, "-m", "bonbon", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[3].rstrip(";")
            yield openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_model_and_a_server_in_front_of_its_server(
    tiny_model: Path, tiny_reward_model: Path, tmp_path: Path
) -> None:
    config = {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "reward": {"model": str(tiny_reward_model), "device": "cpu"},
        "sampling": {"n": 5, "max_new_tokens": 8},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    reward = RewardModel.from_pretrained(str(tiny_reward_model), device="cpu")
    wish: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Once",
        "seed": 4,
        "extra_body": {"bonbon": {"return_candidates": True}},
    }
    with served(tmp_path / "serve.yaml") as client:
        (named,) = client.models.list()
        assert named.id == "tiny"
        reply = client.completions.create(**wish)
        _check(reply, reward, 5)
        assert client.completions.create(**wish).choices == reply.choices
        pieces = client.completions.create(model="tiny", prompt="Once", seed=4, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == reply.choices[0].text
        upstream = ["--upstream", client.base_url, "--reward", tiny_reward_model, "--n", 3]
        with served(*upstream, "--set", "sampling.max_new_tokens=8") as second:
            _check(second.completions.create(**wish), reward, 3)


def _check(reply: Any, reward: RewardModel, n: int) -> None:
    details = reply.model_extra["bonbon"]
    texts = [candidate["text"] for candidate in details["candidates"]]
    assert len(texts) == n
    rewards = reward(["Once"] * n, texts)
    assert reply.choices[0].text == texts[int(np.argmax(rewards))]
    assert details["rewards"] == pytest.approx([float(max(rewards))], abs=1e-5)
    assert reply.usage.completion_tokens == sum(one["tokens"] for one in details["candidates"])
