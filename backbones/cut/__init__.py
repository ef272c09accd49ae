"""Any convolutional classifier, cut in two by tracing it."""
