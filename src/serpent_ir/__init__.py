"""Image restoration with linear-time state space networks."""

__version__ = "0.1.0"
