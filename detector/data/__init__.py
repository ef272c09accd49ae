"""Read, augment and batch data sets of images and boxes."""
