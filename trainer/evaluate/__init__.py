"""What a trained model is worth: pictures of what it makes of images, and its accuracy as a classifier."""
