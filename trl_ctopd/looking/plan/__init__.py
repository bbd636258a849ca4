"""An estimate of the memory that a run needs on each device: `ctopd plan`."""
