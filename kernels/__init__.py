"""Triton kernels, installed as llmbuilder.kernels. Importing one of its files needs triton."""
