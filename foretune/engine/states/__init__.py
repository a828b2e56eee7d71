"""Optimizer states where, or as, DeepSpeed does not have them; and their way from one layout to another."""
