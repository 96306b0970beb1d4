"""From noise to latents: which noise levels (schedule), how to move between them (solvers), where to (guidance)."""
