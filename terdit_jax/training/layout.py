"""Names of what a run leaves in its workdir beside its checkpoints, for those who write and who read it: nothing here
needs JAX."""

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
GOODPUT_FILE, HEARTBEAT_FILE = "goodput.json", "heartbeat.json"
GRIDS = "samples"  # a folder
