"""The device rule under its earlier name; it is `loading.best_device`."""

from llmcompress.models.loading import best_device as best

__all__ = ["best"]
