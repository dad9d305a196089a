"""Where the GPU's tests run: on the GPU, or in a dry run on the CPU (see conftest.py)."""

import os

import torch

DRY = os.environ.get("LLMBUILDER_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
