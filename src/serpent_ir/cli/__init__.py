"""The command `serpent`. Each command is a plain function that Python may also call; torch is imported inside them.

Called from Python, the functions raise SerpentError. In the shell an error is one line on stderr and an exit status:
1 if the work failed, 2 if the call was wrong, 130 if it was interrupted. Results go to stdout; progress and errors go
to stderr.

There is one module per command. Importing it here registers it, and `serpent --help` lists commands in this order.
"""

import os
import sys

from serpent_ir.cli import streams
from serpent_ir.system import interrupts

# isort: off
from serpent_ir.cli.shell import app as app, say
from serpent_ir.cli.restore import restore as restore
from serpent_ir.cli.degrade import degrade as degrade
from serpent_ir.cli.evaluate import evaluate as evaluate
from serpent_ir.cli.train import train as train
from serpent_ir.cli.data import data as data
from serpent_ir.cli.models import models as models
from serpent_ir.cli.env import env as env
from serpent_ir.cli.export import export as export
from serpent_ir.cli.demo import demo as demo
from serpent_ir.cli.video import video as video
from serpent_ir.cli.profile import profile as profile
from serpent_ir.cli.report import report as report

# isort: on
from serpent_ir.errors import is_out_of_memory, memory_line

# The variables that set how OpenMP threads wait. By default they spin for milliseconds after every operation, and on a
# busy machine they take the cores from threads that have work. Threads that sleep at once lose time where the machine
# is idle, since each operation wakes them anew. A short spin is nearly the best of both (benchmarks/busy.py measures).
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
SPINS = "3000"
"""How often a waiting thread of GNU's OpenMP looks again before it sleeps: some microseconds."""


def main() -> None:
    """What the console script runs, once `serpent_ir.__main__` has imported this."""
    interrupts.install()
    streams.install()
    if not _WAITING & os.environ.keys():  # PyTorch reads this when it is loaded, which happens later
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if "" in sys.argv[1:]:  # an unset "$PHOTO" would be taken for the current folder and everything in it
        say("serpent: error: an argument is empty; is a variable unset?")
        sys.exit(2)
    try:
        app(prog_name="serpent")
    except SystemExit as ended:
        sys.exit(streams.end(ended.code) if isinstance(ended.code, int) else ended.code)
    except Exception as error:  # raised by Typer's own printing, or by an import while it parses the arguments
        if isinstance(error, OSError) and error.filename == streams.STDOUT:
            sys.exit(streams.end(0))
        if not is_out_of_memory(error):
            raise
        say(f"serpent: error: {memory_line(error)}")
        sys.exit(1)
