"""Transformer Engine's kernels, each behind one operator that takes and gives plain tensors."""
