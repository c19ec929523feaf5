"""Tensors in, tensors out: one folder or file per operator, no module, no parameter, no configuration."""
