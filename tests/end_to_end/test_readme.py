"""What the README shows works."""

from __future__ import annotations

import re

import pytest
import yaml

import bonbon
from bonbon.config.run import parse_config
from bonbon.tilt.frontier import frontier_rows
from support.paths import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_the_configuration_is_one() -> None:
    parts = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    whole, evaluation, scaling = (yaml.safe_load(part) for part in parts)
    config = parse_config(whole | evaluation | scaling)
    assert (config.sampler.name, config.engine.name) == ("vllm", "ray")
    assert config.evaluation.judge is not None
    assert config.train.objective == "rank_regression"


def test_the_imports_exist() -> None:
    imports = re.findall(r"^from bonbon import (.+)$", README, flags=re.MULTILINE)
    assert imports
    for names in imports:
        for name in names.split(", "):
            assert getattr(bonbon, name) is not None


def test_the_frontier_table_is_what_the_command_prints() -> None:
    cells = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.M
    )
    assert [int(row[0]) for row in cells] == [2, 4, 8, 32]
    for row, values in zip(cells, frontier_rows([2, 4, 8, 32]), strict=True):
        names = ["win_rate", "kl", "optimal_win_rate_at_kl", "ipo_target"]
        expected = [values[name] for name in names]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=5e-3)
        assert float(row[1]) == pytest.approx(values["win_rate"], abs=5e-5)
