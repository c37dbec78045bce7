"""Studies: many optimizers on the same text from the same weights, each at its own best rate; see docs/compare.md."""
