"""The former name of `serpent_ir.files`'s Source, kept for one release."""

import warnings

from serpent_ir.files import Source as Source

warnings.warn(
    "serpent_ir.streaming will be removed; import Source from serpent_ir.files", DeprecationWarning, stacklevel=2
)
