"""Shared by all commands: how they begin, run, end, and talk to a terminal."""
