"""Doors into other libraries: our losses and batches under the names and interfaces that they expect."""
