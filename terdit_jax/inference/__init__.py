"""Drawing pictures from a trained model."""
