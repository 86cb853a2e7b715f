"""GGUF, the file that llama.cpp reads: one result of ours as blocks of 32, without solving again and without loss.

    OUT (codes, scales) ──blocks.py──> Q4_0, Q8_0 …  ┐
    config.json ────────families.py──> fields, names ├──export.py──> OUT.gguf ──gguf's own dequantizer──> bit-equal?
    tokenizer.json ─────tokenizer.py─> tokens, merges┘

`blocks` is plain arithmetic on arrays; the package `gguf` (the format's own library) writes, reads and dequantizes.
"""
