"""Win rates by a judge: a model behind an OpenAI-compatible endpoint compares two completions.

Every comparison is asked in both orders, so that a judge's preference for the first (or the second)
answer cancels. Each judgement is kept at once: a run that was stopped, or lost its server, resumes,
and known judgements are never asked for again. They are kept in a Parquet file; its metadata's key
`bonbon` names the judge.

| column | type | meaning |
|---|---|---|
| `key` | string | SHA-256 of the request: model, wording, texts in order, `max_tokens`, `extra` |
| `prompt_id` | string | of the first comparison, where several have the same texts |
| `draw` | int32 | likewise |
| `swapped` | bool | whether `theirs` was shown first; likewise |
| `verdict` | string, or null | `first`, `second` or `tie`; null where none could be read |
| `reply` | string | the judge's reply |

During a run, each judgement is a line of a journal beside that file (`NAME.journal.jsonl`), which
is merged into it at the end. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bonbon.config.evaluation import JudgeConfig
from bonbon.evaluation.judge.client import ask_all, connected, url_of
from bonbon.evaluation.judge.questions import (
    Comparison,
    key_of,
    orders,
    parse_verdict,
    preference_of,
)
from bonbon.evaluation.judge.store import (
    Judgement,
    fold_journal,
    keep_judgement,
    open_judgements,
    read_judgements,
)
from bonbon.remote.client import FaultError
from bonbon.system.errors import BonbonError

__all__ = ["Comparison", "Judgement", "judge_comparisons", "parse_verdict", "read_judgements"]


def judge_comparisons(
    config: JudgeConfig,
    comparisons: Sequence[Comparison],
    path: Path,
    progress: Callable[[int], Any] | None = None,
) -> list[float]:
    """Ask the judge for its preference for `ours` in each comparison, in {0, 1/4, 1/2, 3/4, 1}.

    The preference is the mean over both orders of 1 for a win and 1/2 for a tie. It is NaN if
    either order has no readable verdict; such a judgement is kept too and not asked for again. Two
    equal texts tie without a request. Texts that occur twice are asked for once.

    A judgement is identified by the judge's name and the request, not by the address: a server may
    move. `path` is the Parquet file of judgements; those of earlier runs are used. Only one process
    at a time may use it. `progress` is called with the number of orders settled since its last
    call, 2 · len(comparisons) in all.

    A request with a temporary failure (no connection, timeout, status 408, 409, 425, 429 or 5xx, an
    answer without a reply in it) is retried up to `config.client.retries` times, with pauses that
    double up to a minute or are as long as the server asks for. A reply without a verdict is asked
    for again as often, with short pauses; each time the server has its retries. A request that the
    judge refuses for its content (status 400, 413 or 422: too long, or filtered) is kept as one
    without a verdict, unless the judge refuses all requests.

    The key is sent only to an https address or to this machine itself. Redirects are not followed,
    and requests to this machine bypass any proxy.

    Raises BonbonError when the endpoint refuses or does not answer, when its address or the key
    cannot be used, or when `path` cannot be written or holds another judge's judgements. On any
    error and on KeyboardInterrupt, the judgements so far are kept.
    """
    known = open_judgements(path, config.model)
    questions = {key_of(config, q): q for c in comparisons for q in orders(c)}
    missing = {key: question for key, question in questions.items() if key not in known}
    report = progress or (lambda _: None)
    report(2 * len(comparisons) - len(missing))
    try:
        if missing:
            with connected(config) as judge:
                has_replied = any(it.verdict for it in known.values())
                ask_all(
                    judge,
                    missing,
                    lambda judgement: keep_judgement(judgement, path, known),
                    report,
                    has_replied,
                )
    except FaultError as error:
        raise BonbonError(
            f"the judge at {url_of(config)} does not answer ({error}); "
            f"{len(questions.keys() & known.keys())} of {len(questions)} judgements are kept in "
            f"{path}; the same command resumes"
        ) from error
    finally:
        fold_journal(path, config.model, known)
    return [preference_of(config, comparison, known) for comparison in comparisons]
