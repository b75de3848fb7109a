"""Shared parts of the measurements: reports, plots, child processes, memory limits, scores."""
