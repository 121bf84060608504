"""What a model is worth, before and after."""
