"""The streaming engine: files, reader, memory pools and cache. It knows nothing of transformers."""
