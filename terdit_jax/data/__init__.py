"""Data: a source of images is prepared once into a TFDS data set of latents, and training reads that through Grain.

What happens to a batch after it is read (scaling, posterior samples, noise) belongs to training.
"""
