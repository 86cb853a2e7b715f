"""llmcompress: make a language-model checkpoint small, measure what that cost, and ship it with the evidence."""

__version__ = "0.1.0"
