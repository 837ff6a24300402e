"""The command `serpent`. Each command is a plain function that Python may call as well; torch is imported inside them.

From Python they raise SerpentError. In the shell an error is one line on stderr and an exit status: 1 where the work
failed, 2 where the call was wrong, 130 where it was interrupted. Results go to stdout, progress and errors to stderr.

One module a command; importing it here registers it, and `serpent --help` lists them in this order.
"""

import os
import sys

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

# How people say how OpenMP waits. By default its threads spin, milliseconds after every operation, and on a busy
# machine take the cores from those that work: serpent_b at 256 px took 0.5 to 1.5 s by two threads, 0.12 to 0.15 by
# two that sleep, and 0.17 to 0.38 by one (two cores at a load of 7 to 9; benchmarks/busy.py).
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def main() -> None:
    """What the console script runs, once `serpent_ir.__main__` has imported this."""
    interrupts.install()
    if not _WAITING & os.environ.keys():  # read when PyTorch is loaded, which is later
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if "" in sys.argv[1:]:  # an unset "$PHOTO" would be taken for the current folder, and all in it
        say("serpent: error: an argument is empty; is a variable unset?")
        sys.exit(2)
    try:
        app(prog_name="serpent")
    except Exception as error:  # of what Typer imports, while it reads the arguments
        if not is_out_of_memory(error):
            raise
        say(f"serpent: error: {memory_line(error)}")
        sys.exit(1)
