"""Streamed layers, which replace a model's feed-forward layers."""
