"""The one exception for everything a user can put right."""

from __future__ import annotations


class BonbonError(Exception):
    """Bad input, configuration or state, in one sentence that names the place and the way out.

    The command line prints the sentence and exits with 2; a library caller catches this class.
    Whatever a library's or a user's own message brings along, the sentence is one line.
    """

    def __init__(self, message: str) -> None:
        self.sentence = " ".join(message.split())
        super().__init__(self.sentence)

    def __str__(self) -> str:
        return self.sentence  # to `args` Ray adds words of its own


class UnavailableError(BonbonError):
    """What every prompt needs cannot be used now, such as a server: no prompt's fault."""


class DivergedError(BonbonError):
    """A training whose loss is no longer finite."""


class UserCodeError(BonbonError):
    """A function of the user's own failed; the message may hold all that the function knows."""


def first_line(error: BaseException) -> str:
    """What an error of a library's says, in a line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
