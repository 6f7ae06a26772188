"""What a trained model is worth: pictures now, numbers later."""
