"""SIGTERM and SIGINT (Ctrl-C) end a run after the step in hand, with a checkpoint.

Schedulers send SIGTERM some time before they kill. All ranks agree on the step after which they stop, whichever of them
got the signal; an evaluation between two steps ends after the data set in hand. A second Ctrl-C stops at once; so does
any signal before and after training, when nothing can be lost.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from codiemb.distributed import most
from codiemb.errors import Stopped

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Inside `with`, signals are taken; while the Trainer trains, they end it after the step in hand.

    Args:
        run: the run folder, to say how to go on.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.newest: Path | None = None  # whole checkpoint
        self.model: Path | None = None  # once it is trained and written
        self.training = False
        self.asked = self.agreed = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self.before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.training or (self.asked and number == signal.SIGINT):
            raise Stopped(number, self._how_to_go_on())
        if not self.asked:
            logger.info("\nfinishing what is in hand, then a checkpoint; Ctrl-C ends at once")
        self.asked = self.asked or number

    def raise_if_asked(self) -> None:
        """Ends the run if its training was ended by a signal.

        Raises:
            Stopped: on every rank.
        """
        self.agreed = self.agreed or most(self.asked)  # also in the last checkpoint, after the last step
        if self.agreed:
            raise Stopped(self.agreed, self._how_to_go_on())

    def asked_of_any(self) -> bool:
        """Whether a rank got a signal; called by all of them."""
        return most(self.asked) > 0

    def _how_to_go_on(self) -> str:
        if self.model is not None:
            found = f"the model is whole, {self.model}"
        elif self.newest is not None:
            found = f"the newest checkpoint is {self.newest}"
        else:
            return "no checkpoint was written"
        return found if self.newest is None else f"{found}; go on with --resume"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = most(self.asked)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.newest = self.run / f"checkpoint-{state.global_step}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False
