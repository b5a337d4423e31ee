"""What a trained model is used for beyond its loss."""
