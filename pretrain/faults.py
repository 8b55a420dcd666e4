"""What can go wrong within a run, and how it is noticed: a notice to stop, a loss that is not finite or jumps.

Each worker only raises flags; what to do follows from their sum over all workers, so all do the same at the same step.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cluster import storage
from cluster.errors import StorageError

STOP = "stop"  # a file of this name in the run directory asks its workers to save and leave
LOOKS_EVERY_SECONDS = 1.0
ASKS_EVERY_SECONDS = 5.0
WINDOW = 128  # losses against which a spike is measured
SIGMAS = 6.0
FEWEST = 32  # losses before which nothing is called a spike
BAD_IN_A_ROW = 3  # steps that cannot be applied, until the run goes back to its last good checkpoint


class Notice:
    """Whether this process was told to stop, by SIGTERM or by the file `stop` in the run directory.

    `listening` watches; the file is looked for by the worker that is asked to, in a thread: storage may be slow.
    """

    def __init__(self, run: str, look: bool, warned: Callable[[], bool] | None = None):
        self.stop = False
        self._run, self._look, self._warned = run, look, warned
        self._over = threading.Event()
        self._asked = time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Notice]:
        """Watches for notices within the block."""
        main = threading.current_thread() is threading.main_thread()  # Ray trains in another, without signals
        before = signal.signal(signal.SIGTERM, self._told) if main else None
        watcher = threading.Thread(target=self._watch, daemon=True)
        if self._look:
            self._see()
            watcher.start()
        try:
            yield self
        finally:
            self._over.set()
            if self._look:
                watcher.join()
            if main:
                signal.signal(signal.SIGTERM, before)

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _watch(self) -> None:
        while not self._over.wait(LOOKS_EVERY_SECONDS):
            self._see()

    def _see(self) -> None:
        with contextlib.suppress(StorageError):  # a save will tell
            self.stop = self.stop or storage.exists(storage.join(self._run, STOP))

    def due(self) -> bool:
        """Whether it is time for all workers to ask their cluster (`warned`)."""
        return self._warned is not None and time.monotonic() - self._asked > ASKS_EVERY_SECONDS

    def warned(self) -> bool:
        """Whether the cluster says, for the first time, that it takes a machine away. A collective."""
        self._asked = time.monotonic()
        if self._warned is None or not self._warned():
            return False
        self._warned = None  # saved once; then the run goes on until it is over
        return True


def ask_to_stop(run: str) -> None:
    """Asks the workers of a run, wherever they are, to save and leave."""
    storage.write_bytes(storage.join(run, STOP), b"")


def forget_stop(run: str) -> None:
    """Takes an earlier wish back: the run is started again."""
    storage.remove(storage.join(run, STOP))


def sigmas_above(loss: float, recent: tuple[float, ...]) -> float:
    """By how many standard deviations `loss` lies above the mean of recent ones (OLMo's measure of a spike); 0 while
    there are too few of them.
    """
    if len(recent) < FEWEST:
        return 0.0
    above, spread = loss - statistics.fmean(recent), statistics.pstdev(recent)
    if spread == 0:
        return math.inf if above > 0 else 0.0
    return above / spread
