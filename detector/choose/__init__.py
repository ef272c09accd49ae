"""Choose a recipe for somebody's pictures: find the data, look at the objects and the machine, and time some updates."""
