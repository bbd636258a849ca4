"""What goes on around a step: checks of the arguments, checkpoints, metrics, timing."""
