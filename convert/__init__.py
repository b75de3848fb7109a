"""Checkpoint -> store. The format is written down in FORMAT.md beside this file."""
