"""Scores a trained model: a classifier proxy and Frechet distances; drawing the samples is left to inference."""
