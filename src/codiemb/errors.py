"""The exception tree. A mistake of the user, or a failure around us, is one of these: one line on the terminal, exit 2.

CodiembError
├── ConfigError       a setting, a command-line override, a suite file
├── DataError         a training or evaluation file
├── CheckpointError   a model folder or a checkpoint
├── EvaluationError   an evaluation that cannot be run
└── DistributedError  ranks that do not do the same, died or do not answer
"""

from __future__ import annotations

from typing import Any

_MISSING: Any = object()


class Stopped(BaseException):
    """A signal ended the work in good order. As with KeyboardInterrupt, no `except Exception` holds it up."""

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(signal, message)
        self.signal, self.message = signal, message


def short(value: Any) -> str:
    """`repr(value)`, cut to 60 characters."""
    return _cut(repr(value), 60)


class CodiembError(Exception):
    """A mistake the user can mend: what and where, what was found, what was expected, what to do."""

    def __init__(self, what: str, *, got: Any = _MISSING, expected: str = "", fix: str = "") -> None:
        details = [
            f"got {_cut(str(got), 300)}" if got is not _MISSING else "",
            f"expected {expected}" if expected else "",
            fix,
        ]
        details = [detail for detail in details if detail]
        # The message is one line whatever the data holds.
        super().__init__(" ".join((f"{what}: {', '.join(details)}" if details else what).split()))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class ConfigError(CodiembError):
    pass


class DataError(CodiembError):
    pass


class CheckpointError(CodiembError):
    pass


class EvaluationError(CodiembError):
    pass


class DistributedError(CodiembError):
    pass
