"""The training run: optimizer, state, step, metrics, the loop and what is due after a step."""
