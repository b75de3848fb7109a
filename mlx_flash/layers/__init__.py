"""What stands in a model where its feed-forward layers stood."""
