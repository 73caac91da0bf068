"""The device mesh and the one table that says how every array lies on it."""
