"""The training objective, the adapter and the optimizer step."""
