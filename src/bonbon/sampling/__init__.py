"""Drawing n completions a prompt from the base distribution.

The base model of every formula is the model *with its sampling settings*: at temperature 1, top-p 1
and no top-k it is the model itself; any other setting defines a different base model, so the
settings are stored with the groups and the log-probabilities are those of the drawn tokens under
them. How a draw is made reproducible: see `bonbon.rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bonbon.system.lazy_imports import lazy_names

if TYPE_CHECKING:
    from bonbon.sampling.encoding import OnLongPrompt as OnLongPrompt
    from bonbon.sampling.encoding import encode_prompts as encode_prompts
    from bonbon.sampling.encoding import iter_encoded as iter_encoded
    from bonbon.sampling.sampler import Sampler as Sampler
    from bonbon.sampling.transformers import TransformersSampler as TransformersSampler

_HOMES = {
    "OnLongPrompt": "encoding",
    "Sampler": "sampler",
    "TransformersSampler": "transformers",
    "encode_prompts": "encoding",
    "iter_encoded": "encoding",
}
__all__ = list(_HOMES)
__getattr__ = lazy_names(__name__, _HOMES)
