"""From what a user names to a folder with sound files: the Hub, checkpoints, the cache folder."""
