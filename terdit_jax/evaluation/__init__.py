"""Scores of images: the ADM suite, and proxies where it cannot be had; drawing the samples is left to inference."""
