"""Networks counted and measured, with the tables and figures of that."""

from serpent_ir.profiling.count import Counts as Counts
from serpent_ir.profiling.count import count as count
from serpent_ir.profiling.profile import profile as profile
