"""What the commands have in common: how they begin, run, end, and talk to a terminal."""
