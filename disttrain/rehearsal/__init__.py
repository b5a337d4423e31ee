"""A training step without numbers: every rank of a layout, one after the other in one process, on fake tensors."""
