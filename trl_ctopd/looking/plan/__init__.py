"""What a device has to hold, before it has to: `ctopd plan`."""
