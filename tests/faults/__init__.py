"""Faults done to runs by name and number of rounds: `python -m tests.faults --case=kill --rounds=50`."""
