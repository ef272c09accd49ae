"""Cut any convolutional classifier into trunk and RoI head by tracing it."""
