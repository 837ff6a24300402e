"""A process beside this one that works for it, and that can be stopped at any time."""

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

from serpent_ir.errors import SerpentError
from serpent_ir.system.forks import Lock


class Worker:
    """Runs functions one after the other in a process that stays alive, and that is killed if one takes too long."""

    def __init__(self):
        self._lock = Lock()
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """Return function(*args), all picklable. Raises SerpentError for its SerpentErrors, and if time is up."""
        with self._lock:
            if self._process is None or not self._process.is_alive():
                context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
                self._connection, theirs = context.Pipe()
                self._process = context.Process(target=_work, args=(theirs,), daemon=True)
                self._process.start()
                theirs.close()
                self._connection.recv()  # the process is ready; from here on time counts
            try:
                self._connection.send((function, args))
                if not self._connection.poll(seconds):
                    self.stop()
                    raise SerpentError(f"took longer than {seconds:g} s and was stopped; try a smaller image")
                result, failure = self._connection.recv()
            except (EOFError, BrokenPipeError):
                self.stop()
                raise SerpentError("the image did not fit in memory; try a smaller one") from None
            if failure is not None:
                raise SerpentError(failure)
            return result

    def stop(self) -> None:
        """End the process. The next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _work(connection: Any) -> None:
    """The body of the process: answer calls until its parent has gone."""
    connection.send(None)
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((function(*args), None))
        except SerpentError as error:
            connection.send((None, str(error).replace(f"{args[0]}: ", f"{args[0].name}: ")))  # hides the server's paths
        except Exception:
            traceback.print_exc()  # for whoever runs the server
            connection.send((None, "failed for a reason of its own; the server's terminal says more"))
