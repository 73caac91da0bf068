"""The diffusion process: its tables, its training loss, its samplers and classifier-free guidance.

Networks reach this layer only as arrays or as a `denoise` function; the transformer itself lives in `model`.
"""
