"""The packaged demo model and the script that makes it."""
