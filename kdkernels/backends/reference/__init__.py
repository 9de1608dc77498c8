"""The definition of every loss in plain PyTorch, a file a family: what the kernels are tested against."""
