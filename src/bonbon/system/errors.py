"""The exception for everything that a user can fix."""

from __future__ import annotations


class BonbonError(Exception):
    """An error of input, configuration or state; its sentence names the place and the fix.

    The command line prints the sentence and exits with 2; library callers catch this class. Line
    breaks, such as those in a library's message, become spaces.
    """

    def __init__(self, message: str) -> None:
        self.sentence = " ".join(message.split())
        super().__init__(self.sentence)

    def __str__(self) -> str:
        return self.sentence  # Ray adds its own words to `args`


class UnavailableError(BonbonError):
    """An error of a resource that every prompt needs, such as a server, and of no single prompt."""


class DivergedError(BonbonError):
    """An error of a training whose loss is no longer finite."""


class UserCodeError(BonbonError):
    """A failure of a user's function; the message may contain any data of the function."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
