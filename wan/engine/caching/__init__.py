"""Step caches: which steps may reuse what an earlier one computed, and how. `--cache` chooses among them."""
