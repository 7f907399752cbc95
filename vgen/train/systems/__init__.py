"""What can be trained: one module for each system, and what they share."""
