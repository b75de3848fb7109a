"""Turns the model that a user names into a folder with valid files: the Hub, checkpoints, the cache folder."""
