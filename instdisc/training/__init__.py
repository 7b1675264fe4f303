"""One training run, rank by rank: the step, the loop around it, what is measured and saved."""
