"""Programs with a window, around the runtime."""
