"""A drop-in for the public selective scan, opt-in: `install()`, or `python -m serpent_ir.compat script.py args...`.

The public name of what stands in `serpent_ir.models`.
"""

from serpent_ir.models.public_names import install as install
from serpent_ir.models.script import main as main
from serpent_ir.models.spandrel_bridge import register_spandrel as register_spandrel

if __name__ == "__main__":
    main()
