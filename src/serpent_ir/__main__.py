"""The command `serpent`, also `python -m serpent_ir`. It sets up what must be in place before any heavy import."""

import atexit
import os
import sys
import threading

from serpent_ir.system import interrupts


def main() -> None:
    """Entry point of the console script."""
    interrupts.install()
    os.environ.setdefault("PILLOW_BLOCKS_MAX", "16")  # 256 MB at most, which Pillow would ask for again for each image
    try:
        from serpent_ir.system.memory import WORK, check_process

        check_process(WORK)
        from serpent_ir.cli import main
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        from serpent_ir.errors import is_out_of_memory, memory_line

        if not is_out_of_memory(error):
            raise
        sys.exit(f"serpent: error: {memory_line(error)}")
    try:
        main()
    except SystemExit as ended:
        _leave(ended.code)
        raise


def _leave(status: object) -> None:
    """End the process here, if nothing else goes on in it. Taking PyTorch apart would last as long as a small image."""
    if not isinstance(status, int | None) or threading.active_count() > 1:
        return
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    except OSError:  # whoever read it has gone; the interpreter has its own way with that
        return
    os._exit(status or 0)


if __name__ == "__main__":
    main()
