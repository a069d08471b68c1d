"""What is said of each setting, in one place: `bonbon config` and docs/configuration.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bonbon.cli.config import all_settings, as_yaml, explanation_of
from bonbon.config.describe import find, leaves
from bonbon.config.run import parse_config
from bonbon.config.settings import read_yaml
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.system.errors import BonbonError
from bonbon.tilt.catalogue import TILTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_setting_is_explained() -> None:
    for setting in leaves(all_settings()):
        assert setting.explanation.endswith((".", ")")), setting.key


def test_all_settings_are_printed_at_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(as_yaml(all_settings()))
    values = read_yaml(path)
    required = {"model": {"name": "m"}, "prompts": {"path": "p"}, "reward": {"model": "r"}}
    for section, own in required.items():
        values[section] |= own
    assert parse_config(values) == parse_config(required)


def test_a_setting_is_explained_with_its_range_and_its_names() -> None:
    settings = all_settings()
    budget = explanation_of(find("train.kl_budget", settings))
    assert all(part in budget for part in ("number, or null", "default: null", "range: above 0"))
    assert ", ".join(OBJECTIVES) in explanation_of(find("train.objective", settings))
    assert ", ".join(TILTS) in explanation_of(find("baselines.dpo.tilt", settings))
    assert find("evaluation.rewards.gold.device", settings).key == "reward.device"
    assert find("reward.sum.0.weight", settings).key == "reward.weight"
    assert find("sampler.name", settings).choices == ("transformers", "vllm", "openai")


def test_an_unknown_key_gets_close_matches() -> None:
    with pytest.raises(BonbonError, match=r"unknown key train\.kl_buget; .* train\.kl_budget"):
        find("train.kl_buget", all_settings())
    with pytest.raises(BonbonError, match=r"train\.arguments\.adam_beta2"):
        find("train.adam_beta2", all_settings())


def test_the_command_loads_no_torch() -> None:
    script = (
        "import sys; from bonbon.cli.main import app; "
        "app(['config', 'train.objective'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "rank_regression" in shown.stdout


def test_the_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "write_configuration.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
