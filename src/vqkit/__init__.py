"""vqkit: codebooks for PyTorch."""
