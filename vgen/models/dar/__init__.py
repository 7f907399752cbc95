"""DAR: one token a call along a zig-zag of diagonals."""
