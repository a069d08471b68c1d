"""How the report's figures are defined."""

from __future__ import annotations

from collections.abc import Mapping

from bonbon.report.data import Run


def glossary(run: Run) -> Mapping[str, str]:
    """How each figure is defined, in a sentence or two."""
    kl_of = ""
    if run.evaluation.get("kl_of") == "models at the temperature":
        kl_of = " Here it is of the models at the sampling temperature, before top-k and top-p cut."
    return {
        "win rate": "a completion of the model against one of the base model for the same prompt, "
        f"all {run.k}×{run.k} pairs, by the reward trained on; a tie counts half. 50% is even.",
        "95% interval": "from a bootstrap over prompts (fewer than ten: Student’s; at equal "
        "length: the delta method; tasks: normal): it holds the error of the prompts and of the "
        "draws, not that of training with another seed.",
        f"best-of-{run.n}": f"the base model with {run.n} draws an answer, of which the reward "
        "keeps the best.",
        "KL": "KL(model ‖ base) in nats a completion: how far the model has moved." + kl_of,
        "recovered": f"(win rate − ½) / (win rate of best-of-{run.n} − ½).",
        "KL efficiency": "the least KL with which any policy that goes by the rewards’ ranks wins "
        "as often, over the measured KL. 1 is the limit.",
        "length change": "mean tokens of a completion, minus the base model’s.",
        "off-target drift": "the mean of a metric that nobody aimed at, minus the base model’s.",
        "forgetting": "the change in nats a token of the loss on texts by people.",
        "over-optimisation": "a gain by the reward trained on that other rewards do not see.",
        "reward change": "in the list of completions: the mean reward of the model’s draws minus "
        "that of the base model’s, for one prompt.",
    }
