"""The model: its shape, its weights, its adapters, its loss."""
