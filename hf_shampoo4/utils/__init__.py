"""Small helpers with no opinion about optimizers."""
