"""What a training will take, from shapes alone."""
