"""Checkpoints: where they stand (`layout`), how they become trustworthy (`store`), and the tensors in them."""
