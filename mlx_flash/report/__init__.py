"""The machine report: one command measures a model on a stranger's machine, and says nothing of the stranger."""
