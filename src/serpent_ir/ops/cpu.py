"""The scan on the CPU (placeholder until the C library lands)."""

from serpent_ir.ops.chunked import backward, forward  # noqa: F401


def unavailable() -> str:
    return "the C library was not built"
