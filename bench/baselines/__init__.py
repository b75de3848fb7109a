"""The baselines that flash loading is compared with, and the code that runs both."""
