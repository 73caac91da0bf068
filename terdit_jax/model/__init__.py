"""TerDiT, Large-DiT and DiT in Flax: the parameters as NNX modules, the forward pass as functions of their operands."""
