"""ragdistill: turn an LLM agent's failures into a cheaper, better model (arXiv 2510.01375)."""

__version__ = "0.1.0"
