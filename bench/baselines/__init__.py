"""What flash loading is compared with, and how both are run."""
