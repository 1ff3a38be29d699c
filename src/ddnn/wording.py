"""Numbers and words for people, each written one way. Only the standard library is imported."""

import shlex
from collections.abc import Sequence


def three(number: float) -> str:
    """Three digits, or all before the point, and never an exponent for what is large."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def amount(number: float, space: str = " ") -> str:
    """A number of parameters or MACs in three digits and a unit, from 1000 on; `space` comes before the unit."""
    if number < 999.5:
        return f"{number:.0f}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if (share := number / size) < 999.5:
            return f"{share:#.3g}".rstrip(".") + space + unit
    return f"{share:.0f}{space}{unit}"


def listed(words: Sequence[str]) -> str:
    """Such as 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, what: str) -> str:
    """Such as '1 thread' and '2 threads'."""
    return f"{number} {what}{'s' if number > 1 else ''}"


def command(*words: object) -> str:
    """A command line that can be pasted as it is: words with spaces and the like are quoted."""
    return shlex.join(map(str, words))


def resuming(run: object) -> str:
    """The command that goes on with the run in a folder."""
    return command("ddnn", "train", "--resume", run)


def threads_and_weights(threads: int, shared: bool) -> str:
    """How a bundle is loaded, such as '2 threads, shared weights'."""
    return f"{counted(threads, 'thread')}{', shared weights' if shared else ''}"
