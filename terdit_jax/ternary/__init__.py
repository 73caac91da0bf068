"""Ternary weights: the quantiser, the 2-bit packing and the linear map that reads them.

Nothing here knows of transformers, diffusion or meshes; `model/` decides which matrices are ternary.
"""
