"""From a folder to a model within a memory budget: the plan, and how each kind of model is built."""
