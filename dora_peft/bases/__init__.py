"""What W0 is: the seam to dense, transposed, grouped, quantised, opaque and offloaded base weights."""
