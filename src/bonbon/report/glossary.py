"""Definitions of the report's figures."""

from __future__ import annotations

from collections.abc import Mapping

from bonbon.report.data import Run


def glossary(run: Run) -> Mapping[str, str]:
    """Return the definition of each figure, in a sentence or two."""
    kl_of = ""
    if run.evaluation.get("kl_of") == "models at the temperature":
        kl_of = " Here both models are taken at the sampling temperature, without top-k and top-p."
    return {
        "win rate": "how often, by the reward trained on, a completion of the model beats one of "
        f"the base model for the same prompt, over all {run.k}×{run.k} pairs; a tie counts half. "
        "50% is even.",
        "95% interval": "from a bootstrap over prompts (fewer than ten prompts: Student’s t; equal "
        "length: the delta method; tasks: normal). It covers the sampling of prompts and draws, "
        "not that training with another seed may differ.",
        f"best-of-{run.n}": f"the base model with {run.n} draws an answer, of which the best by "
        "reward is kept.",
        "KL": "KL(model ‖ base) in nats a completion: how far the model has moved." + kl_of,
        "recovered": f"(win rate − ½) / (win rate of best-of-{run.n} − ½).",
        "KL efficiency": "the least KL at which any policy based on the rewards’ ranks can win as "
        "often, divided by the measured KL. 1 is the limit.",
        "length change": "mean tokens of a completion, minus the base model’s.",
        "off-target drift": "the mean of a metric not trained for, minus the base model’s.",
        "forgetting": "the change of the loss on human text, in nats a token.",
        "over-optimisation": "a gain by the reward trained on that other rewards do not confirm.",
        "reward change": "in the list of completions: the mean reward of the model’s draws for a "
        "prompt, minus that of the base model’s.",
    }
