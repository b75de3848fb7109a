"""Stores and checkpoints of published shapes with random weights."""
