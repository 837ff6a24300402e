"""Lets `python -m serpent_ir.cli` run the command line."""

from serpent_ir.cli import main

if __name__ == "__main__":
    main()
