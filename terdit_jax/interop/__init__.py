"""Exchange with other codebases: names and layouts of the published PyTorch checkpoints."""
