"""What the demo brings of its own: text that every machine has, and a small real pretraining."""
