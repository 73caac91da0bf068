"""Programs compiled ahead of time, also for machines that are not here: what they hold, send, and at best cost."""
