"""Pretraining and fine-tuning by configuration file."""
