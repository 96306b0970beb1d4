"""How a model is run: plan, weights, placement, sampling. Knows no model; the rest of `wan` says what a model is."""
