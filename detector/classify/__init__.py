"""Pictures of one class each: their readers, augmentation and measures, to train a backbone as a classifier."""
