"""Counts and measures networks, and shows the results as tables and figures."""

from serpent_ir.profiling.count import Counts as Counts
from serpent_ir.profiling.count import count as count
from serpent_ir.profiling.profile import profile as profile
