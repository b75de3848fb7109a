"""What the measurements share: reports, plots, child processes, limits, scores."""
