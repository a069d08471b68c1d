"""Win rates by a judge: a model behind an OpenAI-compatible endpoint compares two completions.

Every comparison is asked in both orders, so that a judge's liking for the first (or the second)
answer cancels. A judgement is kept as soon as it is there: a run that was stopped, or whose server
went away, goes on where it was, and what is known is never asked again. The judgements lie in a
Parquet file; its metadata's key `bonbon` names the judge.

| column | type | meaning |
|---|---|---|
| `key` | string | SHA-256 of the request: model, wording, texts in order, `max_tokens`, `extra` |
| `prompt_id` | string | of the comparison that asked first, where several have the same texts |
| `draw` | int32 | likewise |
| `swapped` | bool | whether `theirs` was shown first; likewise |
| `verdict` | string, or null | `first`, `second` or `tie`; null where none could be read |
| `reply` | string | what the judge said |

While a run goes on, each judgement is a line of the journal beside that file
(`NAME.journal.jsonl`), which is folded into it at the end. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bonbon.config.evaluation import JudgeConfig
from bonbon.evaluation.judge.client import ask_all
from bonbon.evaluation.judge.endpoint import NoReplyError, connected, url_of
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
from bonbon.system.errors import BonbonError

__all__ = ["Comparison", "Judgement", "judge_comparisons", "parse_verdict", "read_judgements"]


def judge_comparisons(
    config: JudgeConfig,
    comparisons: Sequence[Comparison],
    path: Path,
    progress: Callable[[int], Any] | None = None,
) -> list[float]:
    """The judge's preference for `ours` in each comparison, in {0, 1/4, 1/2, 3/4, 1}.

    It is the mean over both orders of 1 for a win and 1/2 for a tie, and NaN where the judge gave
    no readable verdict in one of them; such a judgement is kept too and not asked again. Two equal
    texts tie without being asked or kept. Texts that occur twice are asked once.

    Judgements belong to the judge's name and what it is sent, not to its address: a server may
    move. `path` is the Parquet file of judgements; those of earlier runs are used. One process at a
    time may work on it. `progress` is called with the number of orders settled since its last call,
    2 · len(comparisons) in all.

    A request that fails in passing (no connection, timeout, status 408, 409, 425, 429 or 5xx, an
    answer without a reply in it) is tried again up to `config.retries` times, with pauses that
    double up to a minute or are as long as the server asks for. A reply without a verdict is asked
    for again as often, with short pauses, since the server is well. A request that is refused for
    itself (status 400, 413 or 422: too long, or filtered) is kept as one without a verdict, unless
    the judge refuses all it is asked.

    The key goes only to an https address or to this machine itself. Redirects are not followed,
    and requests to this machine pass by any proxy.

    Raises BonbonError when the endpoint refuses or does not answer, when its address or the key
    cannot be used, or when `path` cannot be written or holds another judge's judgements. On any
    error and on KeyboardInterrupt, what was judged so far is kept.
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
                    lambda found: keep_judgement(found, path, known),
                    report,
                    has_replied,
                )
    except NoReplyError as error:
        raise BonbonError(
            f"the judge at {url_of(config)} does not answer ({error}); "
            f"{len(questions.keys() & known.keys())} of {len(questions)} judgements are kept in "
            f"{path}; the same command goes on"
        ) from error
    finally:
        fold_journal(path, config.model, known)
    return [preference_of(config, comparison, known) for comparison in comparisons]
