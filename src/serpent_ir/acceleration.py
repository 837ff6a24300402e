"""Whether and how networks are accelerated: `off` runs the definition alone, `why` tells which way serves what."""

from serpent_ir.models.acceleration import off as off
from serpent_ir.models.acceleration import why as why
