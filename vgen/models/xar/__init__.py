"""xAR: next-X prediction with flow matching inside the backbone."""
