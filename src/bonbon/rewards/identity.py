"""The identity of a reward, and the note of it in the groups that it scored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bonbon.config.reward import RewardConfig
from bonbon.config.settings import flatten, without_neutral
from bonbon.system.digests import weights_digest
from bonbon.system.user_functions import function_digest

# Beside a reward's settings; None where it is unknown. What each is of, and how that is named.
_DIGESTS = {
    "code": ("function", "the code of reward function {} changed since this run began"),
    "weights": ("model", "the weights of reward model {} changed since this run began"),
}


def reward_provenance(reward: RewardConfig) -> dict[str, Any]:
    """Return what groups note of the reward that scored them: its settings, defaults left out."""
    return reward.model_dump(mode="json", exclude_defaults=True)


def reward_identity(reward: RewardConfig, *, defaults: bool = False) -> dict[str, Any]:
    """Return what tells one reward from another, as plain values.

    These are its settings (with or without those at their `defaults`), a digest of the file that
    its function is written in as `code`, and one of its model's tensors as `weights`: of a folder,
    or of what the cache holds of a hub id. A digest is None where it is unknown, and what the
    function's file imports is not looked at. A server's model without a name is known by its
    address. Nothing of the user's is imported, and no model is loaded.
    """
    identity = reward.model_dump(mode="json", exclude_defaults=not defaults)
    if reward.sum:
        identity["sum"] = [reward_identity(part, defaults=defaults) for part in reward.sum]
    elif reward.function:
        identity["code"] = function_digest(reward.function)
    elif reward.server:
        identity["server"]["model"] = reward.server.model or reward.server.base_url
    elif reward.model:
        identity["weights"] = weights_digest(_model_folder(reward.model, reward.revision))
    return without_neutral(identity, RewardConfig)


def _model_folder(name: str, revision: str | None) -> Path:
    """A model's folder: the one that is named, or the cache's of a hub id, where it has one."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a hub id either; loading it says so
        return folder
    return Path(cached).parent if isinstance(cached, str) else folder


def same_reward(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two identities are of one reward; a missing digest is not compared."""
    first, second = flatten({"reward": one}), flatten({"reward": other})
    return all(
        same_value(key, first.get(key), second.get(key)) for key in first.keys() | second.keys()
    )


def is_digest(key: str) -> bool:
    """Return whether a flattened key of a stage's settings is that of a digest of its `reward`."""
    return re.fullmatch(rf"reward\.(sum\.\d+\.)*({'|'.join(_DIGESTS)})", key) is not None


def same_value(key: str, one: Any, other: Any) -> bool:
    """Return whether a flattened setting is the same; unknown digests are taken to be."""
    return one == other or (is_digest(key) and None in (one, other))


def without_digests(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings, flattened, without the digests of its reward."""
    return {key: value for key, value in flatten(settings).items() if not is_digest(key)}


def changed_digest(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The sentence for a digest that differs; None where another function or model was named.

    `was` and `now` are flattened settings.
    """
    prefix, _, last = key.rpartition(".")
    what, sentence = _DIGESTS[last]
    name = f"{prefix}.{what}"
    return sentence.format(now.get(name)) if was.get(name) == now.get(name) else None
