"""Converts a checkpoint into a store. FORMAT.md, beside this file, specifies the format."""
