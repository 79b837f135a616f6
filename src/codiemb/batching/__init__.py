"""The plan of global batches, and the loader that turns a rank's slice of each into tokens."""
