"""Messages to tokens and back: templates, tokenizers, sampling, generation."""
