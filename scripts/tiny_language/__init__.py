"""The small language of the bundled checkpoint: its world, its documents, its evaluation items, its training."""
