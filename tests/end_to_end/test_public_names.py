"""Names that users import stay where they are, and importing them early costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

STABLE = {
    "bonbon": "BestOfN BoNBoNConfig BoNBoNTrainer BonbonError Evaluator ExponentialTilt "
    "FunctionReward Group Groups RewardModel RunConfig SamplingConfig TransformersSampler "
    "WeightedSum WorstOfN "
    "__version__ generate load_config open_groups read_groups",
    "bonbon.tilt": "TILTS BestOfN BestOfPoisson ExponentialTilt Identity Tilt WorstOfN "
    "best_of_n_bounds best_of_n_kl_estimate best_of_n_pmf best_of_n_rank_weights kl_pmf optimal_kl "
    "optimal_win_rate rank_targets rank_weights tilted_pmf win_rate_pmf",
    "bonbon.objectives": "OBJECTIVES PAPER_ALPHA bon_beta bon_target bonbon bonbon_dpo "
    "bonbon_ranks centred_targets dpo group_metrics ipo ipo_bon pairwise_regression "
    "rank_regression rank_regression_huber rank_regression_pointwise sft_bon weighted_sft",
    "bonbon.groups": "Group Groups Message Prompt StoredGroups as_text open_groups read_groups "
    "read_shard shard_path shard_paths write_shard",
    "bonbon.evaluation": "BestOfK CompletionKLs Draws Evaluation Evaluator Figure "
    "LengthControlled ModelEvaluation TextLosses WinRate best_of_k_curve best_of_k_means "
    "best_of_k_weights best_of_k_win_rates best_of_n_win_rate bits_per_byte bootstrap "
    "clustered_mean completion_kls drift_at_equal_win_rate drift_from_base forgetting "
    "human_text_losses kl_efficiency length_controlled_win_rate paired_difference perplexity "
    "win_rate win_rate_figure win_rate_over_prompts win_rate_variance",
    "bonbon.decoding": "AdaptiveN BestOfN BestOfPoisson Candidates Cost Generation LocalSource "
    "RBoNKL RBoNLength RBoNWD RewardWeightedVote SMC SRBoNKL SRBoNWD STRATEGIES SelfConsistency "
    "ShortestMajorityVote SoftBestOfN Source SpeculativeRejection Strategy TreeBoN WholeDraws "
    "fit_beta generate parse_strategy",
    "bonbon.config": "EvaluationConfig JudgeConfig ModelConfig PromptsConfig RewardConfig "
    "RunConfig SamplingConfig TrainConfig load_config parse_config",
    "bonbon.sampling": "Sampler TransformersSampler encode_prompts iter_encoded",
    "bonbon.decoding.answers": "last_number",
    "bonbon.demo.sentiment": "compound",
}


@pytest.mark.parametrize("package", STABLE)
def test_stable_names(package: str) -> None:
    module = import_module(package)
    names = STABLE[package].split()
    assert len(names) == len(set(names)) > 0
    missing = [name for name in names if not hasattr(module, name)]
    assert missing == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import_module("bonbon").nothing  # noqa: B018


def test_importing_warns_of_nothing_and_loads_no_torch() -> None:
    code = "import bonbon, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from bonbon.cli.main import app; "
        "shown = CliRunner().invoke(app, ['--help']); assert 'evaluate' in shown.output; "
        "sys.exit(shown.exit_code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
