"""Train video transformers from cached features of a frozen spatial encoder."""

__version__ = "0.1.0"
