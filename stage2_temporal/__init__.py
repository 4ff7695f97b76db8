"""Stage 2: adapter, temporal transformer and heads, trained on cached features."""
