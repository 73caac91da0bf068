"""TerDiT in JAX: ternary diffusion transformers, trained from scratch and run at 2 bits a weight."""
