"""Triton kernels, installed as llmbuilder.kernels. Importing this package does nothing; importing one of its files needs triton."""
