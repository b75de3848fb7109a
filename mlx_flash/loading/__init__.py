"""Loads a model from a folder within a memory budget: plans its memory and builds each kind of model."""
