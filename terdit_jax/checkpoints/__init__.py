"""The checkpoints of a workdir: reading, writing, checksums, the best weights, and what a disk's errors mean."""
