"""What goes on around a step: checks of the arguments, the choice of losses, the student as it is opened, checkpoints, metrics, timing."""
