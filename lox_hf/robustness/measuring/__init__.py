"""What is measured of a model: safety, utility, the task of an attack."""
