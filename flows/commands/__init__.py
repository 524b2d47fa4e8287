"""The commands, by what they need: the service, nothing but checkpoints, or a DVC pipeline."""
