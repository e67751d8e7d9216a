"""One suite per seam, run against everything that fills it."""
