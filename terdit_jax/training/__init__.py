"""The training run: optimizer, state, step, checkpoints, metrics and the loop over them."""
