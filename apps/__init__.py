"""Programs with windows that use the runtime."""
