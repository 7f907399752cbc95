"""Pictures of what vgen does: decode orders (orders.py)."""
