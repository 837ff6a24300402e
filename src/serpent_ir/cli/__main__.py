"""python -m serpent_ir.cli."""

from serpent_ir.cli import main

if __name__ == "__main__":
    main()
