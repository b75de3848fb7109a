"""The packaged demo model and the scripts that train it and its siblings."""
