"""`python -m serpent_ir.compat` runs another project's script with the public names of the scan resolved to ours."""

import runpy
import sys
from pathlib import Path

USAGE = "usage: python -m serpent_ir.compat script.py args..."


def main() -> None:
    """Run the script that the command line names, as `python script.py args...` would. Exit status 2 without one."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or arguments[0].startswith("-"):
        _refuse(USAGE)
    script = Path(arguments[0])
    if not script.is_file():
        _refuse(f"{script}: no such script; {USAGE}")
    from serpent_ir.models.public_names import install

    install()
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)
