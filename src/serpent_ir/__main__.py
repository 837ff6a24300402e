"""The command `serpent`, also `python -m serpent_ir`. It sets up what must be in place before any heavy import."""

import sys

from serpent_ir.system import interrupts


def main() -> None:
    """Entry point of the console script."""
    interrupts.install()
    try:
        from serpent_ir.system.memory import WORK, check_process

        check_process(WORK)
        from serpent_ir.cli import main
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        from serpent_ir.errors import is_out_of_memory, memory_line

        if not is_out_of_memory(error):
            raise
        sys.exit(f"serpent: error: {memory_line(error)}")
    main()


if __name__ == "__main__":
    main()
