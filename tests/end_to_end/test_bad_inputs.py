"""Bad inputs through the command line: one sentence that names the place, and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.config.run import load_config
from bonbon.groups.shards import read_groups
from bonbon.runs.run_folder import RunFolder
from support.models import CONTEXT, EOS, build_tiny_model, build_tiny_reward_model

PROMPTS = ["Once", "Hi", "A cat", "The sun", "Tell me", "Why"]
USER_CODE = """
def length(prompts, completions):
    return [float(len(text)) for text in completions]

def by_place(prompts, completions):
    return [float(i % 3) for i in range(len(completions))]

def not_a_number(prompts, completions):
    return [float("nan") if i == 4 else 0.0 for i in range(len(completions))]

def failing(prompts, completions):
    raise LookupError("the word list\\nis gone")

def too_few(prompts, completions):
    return [1.0]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bad_input_rewards.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "bad_input_rewards", raising=False)
    yield
    sys.modules.pop("bad_input_rewards", None)


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path) -> WriteConfig:
    """Write a small, good configuration with some sections changed; gives its path."""

    def write(**sections: Any) -> Path:
        rows = [{"prompt_id": f"id-{i}", "prompt": text} for i, text in enumerate(PROMPTS)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "prompts.jsonl").write_text(lines)
        (tmp_path / "held.jsonl").write_text(lines)
        values: dict[str, Any] = {
            "model": {"name": str(tiny_model), "device": "cpu"},
            "prompts": {"path": "prompts.jsonl"},
            "sampling": {"n": 2, "max_new_tokens": 4},
            "reward": {"function": "bad_input_rewards:length"},
            "train": {"batch_size": 4, "learning_rate": 1e-3},
            "evaluation": {"prompts": {"path": "held.jsonl"}, "k": 2, "bootstrap": 100},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | sections))
        return tmp_path / "run.yaml"

    return write


def bonbon(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object, after_work: bool = False) -> str:
    """What `bonbon ARGUMENTS` says when it refuses: one line, alone unless work was begun."""
    result = bonbon(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("bonbon: ")] == lines[-1:]
    assert after_work or len(lines) == 1, lines
    assert "Traceback" not in result.output
    return lines[-1]


def succeed(*arguments: object) -> Result:
    result = bonbon(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "prompts.jsonl: no prompts in the file"),
        (b'{"text": "a"}\n', "prompts.jsonl, row 1: no column 'prompt' (columns: text)"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "prompts.jsonl is not UTF-8 (line 2"),
        (b'{"prompt": "a"}\n{"prompt": \n', "prompts.jsonl, row 2: not JSON"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "prompts.jsonl, row 2: the prompt is empty"),
        (b'{"prompt": "a\\ud800"}\n', "prompts.jsonl, row 1: the prompt has a lone surrogate"),
        (b'{"prompt_id": 1, "prompt": "a"}\n' * 2, "row 2: id '1' was used by row 1"),
        (
            b'{"prompt_id": "chat", "prompt": [{"role": "user", "content": "a"}]}\n',
            "prompt chat is a list of messages, but the model's tokenizer has no chat template",
        ),
    ],
    ids=["empty", "column", "utf8", "json", "prompt", "surrogate", "twice", "chat"],
)
def test_bad_prompts(write_config: WriteConfig, content: bytes, said: str) -> None:
    config = write_config()
    Path("prompts.jsonl").write_bytes(content)
    assert said in refusal("sample", config, "--out", "out")


def test_missing_prompts(write_config: WriteConfig) -> None:
    config = write_config(prompts={"path": "nowhere.csv"})
    assert "nowhere.csv: No such file" in refusal("sample", config, "--out", "out")


def test_a_column_is_named_by_an_option(write_config: WriteConfig) -> None:
    config = write_config()
    said = refusal("sample", config, "--out", "out", "--prompt-column", "1e3")
    assert "row 1: no column '1e3' (columns: prompt_id, prompt); name it with --prompt-co" in said
    Path("prompts.jsonl").write_text('{"1e3": "a"}\n')
    succeed("sample", config, "--out", "out", "--prompt-column", "1e3")


def test_too_few_prompts_to_hold_out(write_config: WriteConfig) -> None:
    config = write_config(evaluation={})
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    said = refusal("sample", config, "--out", "out")
    assert "prompts.jsonl: 1 prompts are too few to hold out 20%" in said


# --- prompts longer than the context --------------------------------------------------------------

ROOM = CONTEXT - 4  # of a prompt, its beginning token included


@pytest.fixture
def long_prompts(write_config: WriteConfig) -> Path:
    """A configuration whose prompts `long` and `longer` leave no room; `fits` just does."""
    config = write_config()
    lengths = {"short": 3, "fits": ROOM - 1, "long": ROOM, "longer": 200}
    rows = [{"prompt_id": name, "prompt": "x" * size} for name, size in lengths.items()]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def test_long_prompts_are_listed(long_prompts: Path) -> None:
    said = refusal("sample", long_prompts, "--out", "out")
    assert f"2 prompts have more than the {ROOM} tokens" in said
    assert "long (61 tokens), longer (201 tokens); " in said
    assert "--on-long-prompt skip|truncate" in said


@pytest.mark.parametrize("choice", ["skip", "truncate"])
def test_long_prompts_are_skipped_or_cut(long_prompts: Path, choice: str) -> None:
    succeed("sample", long_prompts, "--out", "out", "--on-long-prompt", choice)
    lengths = {g.prompt_id: len(g.prompt_token_ids) for g in read_groups("out/samples")}
    cut = {"long": ROOM, "longer": ROOM} if choice == "truncate" else {}
    assert lengths == {"short": 4, "fits": ROOM, **cut}


def test_another_choice_is_refused(long_prompts: Path) -> None:
    said = refusal("sample", long_prompts, "--out", "out", "--on-long-prompt", "cut")
    assert "sampling.on_long_prompt = 'cut': Input should be 'error', 'skip' or 'truncate'" in said


def test_only_long_prompts_cannot_all_be_skipped(write_config: WriteConfig) -> None:
    config = write_config()
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "x" * 99}) + "\n")
    said = refusal("sample", config, "--out", "out", "--on-long-prompt", "skip")
    assert f"every prompt is longer than {ROOM} tokens" in said


def test_no_room_for_any_prompt(write_config: WriteConfig) -> None:
    said = refusal("sample", write_config(), "--out", "out", "--set", "sampling.max_new_tokens=64")
    assert "max_new_tokens leaves no room" in said


# --- configuration and options --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.n=1", "sampling.n: best-of-n against worst needs n >= 2"),
        ("sampling.n=0", "sampling.n = 0: "),
        ("sampling.foo=1", "unknown key sampling.foo (known here: n, max_new_tokens"),
        ("train.learning_rate=fast", "train.learning_rate = 'fast': "),
        ("train.objective=ppo", "train.objective = 'ppo': "),
        ("reward.model=x", "a reward is exactly one of `model`, `function`, `server` and `sum`"),
        ("sampling.n", "--set 'sampling.n': write it as key=value"),
    ],
)
def test_bad_settings(write_config: WriteConfig, override: str, said: str) -> None:
    found = refusal("run", write_config(), "--out", "out", "--set", override)
    assert said in found
    assert not Path("out").exists()


def test_bad_configurations(write_config: WriteConfig) -> None:
    assert "configuration nowhere.yaml: No such file" in refusal(
        "run", "nowhere.yaml", "--out", "o"
    )
    config = write_config(modle={"name": "x"})
    assert "run.yaml: unknown key modle (known here: model" in refusal("run", config, "--out", "o")
    config.write_text("")
    assert "run.yaml: expected keys such as model" in refusal("run", config, "--out", "o")
    assert not Path("o").exists()


@pytest.mark.parametrize("stage", ["run", "sample", "score", "train", "evaluate"])
def test_an_unknown_option_is_named(write_config: WriteConfig, stage: str) -> None:
    result = bonbon(stage, write_config(), "--out", "out", "--temprature", "1")
    assert result.exit_code == 2
    assert "--temprature" in result.stderr
    assert "Traceback" not in result.output


def test_the_folder_must_be_given(write_config: WriteConfig) -> None:
    result = bonbon("run", write_config())
    assert result.exit_code == 2
    assert "--out" in result.stderr


@pytest.mark.parametrize("n", ["0", "0.5", "-1", "nan", "inf", "many", "2,", ""])
def test_a_frontier_of_no_n_is_refused(n: str) -> None:
    assert f"--n {n!r}: " in refusal("frontier", f"--n={n}")


def test_a_plot_below_a_file_is_refused() -> None:
    Path("file").write_text("in the way")
    said = refusal("frontier", "--n", "2", "--plot", "file/plot.png")
    assert "cannot write file/plot.png: " in said


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all"])
def test_a_missing_model_folder(write_config: WriteConfig, name: str) -> None:
    config = write_config(model={"name": name})
    assert f"model {name}: there is no such folder" in refusal("sample", config, "--out", "out")


def test_a_folder_without_a_model(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    config = write_config(model={"name": "./hollow"})
    assert "model ./hollow cannot be loaded: " in refusal("sample", config, "--out", "out")


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("not_a_number", "prompt id-2, completion 1 of 2"),
        ("failing", "'bad_input_rewards:failing' failed: LookupError: the word list is gone"),
        ("too_few", "shape (1,) for 12 completions (prompts id-0 to id-5)"),
        ("missing", "'bad_input_rewards:missing' cannot be imported: AttributeError"),
    ],
)
def test_bad_rewards(write_config: WriteConfig, function: str, said: str) -> None:
    config = write_config(reward={"function": f"bad_input_rewards:{function}"})
    succeed("sample", config, "--out", "out")
    assert said in refusal("score", config, "--out", "out", after_work=True)
    assert not list(Path("out").glob("groups/*"))


def test_a_reward_model_of_two_outputs(write_config: WriteConfig, tmp_path: Path) -> None:
    build_tiny_reward_model(tmp_path / "two", num_labels=2)
    config = write_config(reward={"model": "./two", "device": "cpu"})
    succeed("sample", config, "--out", "out")
    assert "the reward model has 2 outputs" in refusal("score", config, "--out", "out")


def test_a_reward_that_tells_nothing_apart(write_config: WriteConfig) -> None:
    config = write_config(reward={"function": "bad_input_rewards:constant"})
    with Path("bad_input_rewards.py").open("a") as code:
        code.write("\n\ndef constant(prompts, completions):\n    return [1.0] * len(completions)\n")
    said = refusal("run", config, "--out", "out", after_work=True)
    assert "in all 6 groups the best and the worst reward tie" in said


# --- empty completions ----------------------------------------------------------------------------


@pytest.fixture
def silent_model(tmp_path: Path) -> Path:
    """A model that draws the end token at once, nearly always."""
    import torch
    from transformers import LlamaForCausalLM

    folder = build_tiny_model(tmp_path / "silent")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        # Every token has the same embedding and no layer adds to it, so each step's last state is
        # the vector of ones.
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[EOS] = 2.0
    model.save_pretrained(folder)
    return folder


def test_empty_completions_go_through_all_stages(
    write_config: WriteConfig, silent_model: Path, tiny_reward_model: Path
) -> None:
    config = write_config(
        model={"name": str(silent_model), "device": "cpu"},
        reward={
            "sum": [
                {"function": "bad_input_rewards:by_place"},
                {"model": str(tiny_reward_model), "device": "cpu", "weight": 0.1},
            ]
        },
    )
    succeed("run", config, "--out", "out")
    groups = read_groups("out/groups")
    assert {text for group in groups for text in group.completions} == {""}
    assert {ids for group in groups for ids in group.token_ids} == {(EOS,)}
    assert {reason for group in groups for reason in group.finish_reasons} == {"stop"}
    models = json.loads(Path("out/evaluation/evaluation.json").read_text())["models"]
    assert models["rank_regression"]["length"]["value"] >= 1.0  # the end token counts


# --- the run's folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/bonbon/run"])
def test_a_folder_that_cannot_be_written(write_config: WriteConfig, out: str) -> None:
    Path("file").write_text("in the way")
    said = refusal("run", write_config(), "--out", out)
    assert f"cannot write the output folder {out}: " in said
    assert "choose another --out" in said


def test_a_stranger_s_folder(write_config: WriteConfig) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("mine")
    said = refusal("run", write_config(), "--out", "thesis")
    assert "thesis is not empty and holds no run (chapter.tex is in it)" in said
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.tex"]


def test_two_runs_at_once(write_config: WriteConfig) -> None:
    config = write_config()
    with RunFolder(Path("out"), load_config(config)).locked():
        said = refusal("run", config, "--out", "out")
    assert "another bonbon process is working in out" in said


def test_other_settings_in_the_same_folder(write_config: WriteConfig) -> None:
    config = write_config()
    succeed("sample", config, "--out", "out")
    before = Path("out/samples/shard-00000.parquet").read_bytes()
    for stage in ("sample", "score", "run"):
        changes = ("--set", "sampling.seed=7", "--set", "sampling.temperature=0.5")
        said = refusal(stage, config, "--out", "out", *changes)
        assert "sampling.seed was 0 and is now 7" in said
        assert "sampling.temperature was 1.0 and is now 0.5" in said
    with Path("prompts.jsonl").open("a") as prompts:
        prompts.write('{"prompt": "one more"}\n')
    assert "prompts.content was '" in refusal("sample", config, "--out", "out")
    assert Path("out/samples/shard-00000.parquet").read_bytes() == before


def test_neutral_settings_in_the_same_folder(write_config: WriteConfig) -> None:
    config = write_config()
    succeed("sample", config, "--out", "out")
    succeed("sample", config, "--out", "out", "--set", "sampling.max_batch_tokens=99")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("score", "out/samples is not complete; run `bonbon sample`"),
        ("train", "out/groups is not complete; run `bonbon score`"),
        ("evaluate", "out/model does not exist; run `bonbon train` first"),
    ],
)
def test_a_stage_before_its_time(write_config: WriteConfig, stage: str, said: str) -> None:
    assert said in refusal(stage, write_config(), "--out", "out")


def test_a_torn_shard_is_named(write_config: WriteConfig) -> None:
    config = write_config()
    succeed("sample", config, "--out", "out")
    Path("out/samples/shard-00000.parquet").write_bytes(b"PAR1")
    said = refusal("score", config, "--out", "out", after_work=True)
    assert "cannot read out/samples/shard-00000.parquet as Parquet" in said


# --- through a process of its own -----------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bonbon", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def test_a_process_refuses_in_one_line() -> None:
    found = process("run", "nowhere.yaml", "--out", "out")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == (
        "bonbon: cannot read the configuration nowhere.yaml: No such file or directory\n"
    )


def test_a_process_says_nothing_else_after_loading_a_model(write_config: WriteConfig) -> None:
    config = write_config()
    Path("prompts.jsonl").write_text(json.dumps({"prompt_id": "huge", "prompt": "x" * 99}) + "\n")
    found = process("sample", config, "--out", "out")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("bonbon: 1 prompts have more than the 60 tokens")
    assert "huge (100 tokens)" in found.stderr
    assert found.stderr.count("\n") == 1
