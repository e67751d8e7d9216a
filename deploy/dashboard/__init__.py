"""The page on which a deployment is watched, and what makes its picture."""
